"""The alternation: in each round every engine once, one at a time, each round in the other order."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Collection, Coroutine, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

import uvloop

from benchmarks.peers.peer import Peer, Setting
from benchmarks.peers.results import OURS, Alone, Served
from llmserve.errors import LLMServeError
from llmserve.tools.bench_load import prepare, run_level
from llmserve.tools.bench_server import free_port, running_server
from llmserve.tools.bench_stats import LevelReport

HTTP: Final = "http"
ALONE: Final = "alone"
PARTS: Final = (HTTP, ALONE)
"""Over HTTP, and the engine without it."""
_T = TypeVar("_T")


def run_rounds(
    setting: Setting,
    engines: Sequence[Peer],
    files: Sequence[Path],
    num_rounds: int,
    parts: Collection[str] = PARTS,
) -> tuple[list[Served], list[Alone]]:
    """All measurements of the parts. A peer that fails loses that turn, which is told; if llmserve fails, it raises."""
    served: list[Served] = []
    alone: list[Alone] = []
    for number in range(1, num_rounds + 1):
        for model in files:
            for engine in order(engines, number):
                try:
                    if HTTP in parts:
                        served += serve_round(setting, engine, model, number)
                    if ALONE in parts:
                        alone += alone_round(setting, engine, model, number)
                except (LLMServeError, subprocess.CalledProcessError) as error:
                    if engine.name == OURS:
                        raise
                    print(f"round {number} {engine.name} failed with {model.name}: {error}", file=sys.stderr)
    return served, alone


def order(engines: Sequence[Peer], number: int) -> list[Peer]:
    """Of a round: every second one goes backwards, so that a drift of the machine meets all alike."""
    return list(engines) if number % 2 else list(reversed(engines))


def serve_round(setting: Setting, engine: Peer, model: Path, number: int) -> list[Served]:
    """All levels against one engine's server; none where it has no server."""
    port = free_port()
    server = engine.server(model, port)
    if server is None:
        return []
    records = []
    variables = os.environ | dict(server.variables)
    with running_server(server.command, port=port, timeout_s=server.timeout_s, env=variables) as running:
        load = _run(prepare(running.endpoint, setting.load))

        def measure(num_streams: int) -> LevelReport:
            return _run(run_level(running.endpoint, load, num_streams))

        for num_streams in setting.levels:
            level, others = setting.quiet.measure(partial(measure, num_streams))
            print(
                f"round {number} {engine.name:13} {num_streams:2} streams: {level.output_tokens_per_s:7.1f} tok/s, "
                f"{level.num_failures} of {level.num_requests} failed, others {others:.2f} cores",
                flush=True,
            )
            records.append(Served(engine=engine.name, file=model.name, round=number, others_cores=others, level=level))
    return records


def alone_round(setting: Setting, engine: Peer, model: Path, number: int) -> list[Alone]:
    """Prefill and decode without HTTP; none where it cannot be measured so."""
    opened = engine.alone(model)
    if opened is None:
        return []
    records = []
    with opened as bench:
        works = [(f"prefill {setting.prefill_tokens}", bench.prefill)]
        works += [(f"decode B={batch}", partial(bench.decode, batch)) for batch in setting.levels]
        for what, work in works:
            speed, others = setting.quiet.measure(work)
            print(
                f"round {number} {engine.name:13} {what:12}: {speed:7.1f} tok/s, others {others:.2f} cores", flush=True
            )
            records.append(
                Alone(
                    engine=engine.name,
                    file=model.name,
                    round=number,
                    others_cores=others,
                    what=what,
                    tokens_per_s=round(speed, 2),
                )
            )
    return records


def _run(work: Coroutine[Any, Any, _T]) -> _T:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)
