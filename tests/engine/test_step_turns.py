"""Two engine processes on the same cores: they take turns, and the death of one is not the other's problem."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from llmserve.client.process import ProcessClient
from llmserve.config import EngineConfig
from llmserve.errors import EngineDied
from llmserve.types import Request, SamplingParams
from tests.engine.test_clients import until
from tests.engine.test_trace import Event, load, spans
from tests.tiny.checkpoints import write
from tests.tiny.models import TinyModel

extension = pytest.importorskip("llmserve._C", reason="the extension is not built")

MAX_TOKENS = 110
NUM_STREAMS = 4
PATIENCE_S = 2.0
"""How long an engine waits for a holder that does not move."""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    """A network whose steps take some milliseconds: an engine is in one most of the time."""
    model = TinyModel(
        name="wide", model_type="llama", storage="hf_bf16", hidden_size=512, intermediate_size=1408, num_layers=6,
        num_heads=8, num_kv_heads=4, head_dim=64,
    )  # fmt: skip
    return EngineConfig(model_path=write(model, tmp_path_factory.mktemp("wide")), kv_cache_bytes=1 << 24)


@pytest.fixture
def runtime(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A runtime folder that no other engine of this machine uses. Sockets need a short path."""
    folder = Path(tempfile.mkdtemp(prefix="lease", dir="/tmp"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    yield folder / "llmserve"
    shutil.rmtree(folder)


async def generate(client: ProcessClient, request_id: str, times_s: list[float]) -> None:
    """One long stream; the times of its tokens."""
    sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=0.0)
    request = Request(request_id=request_id, prompt_token_ids=[1, 2, 3], sampling=sampling)
    async with contextlib.aclosing(client.submit(request)) as stream:
        async for output in stream:
            times_s.append(time.monotonic())
            assert output.finish_reason in (None, "length"), output.error


async def occupy(client: ProcessClient, times_s: list[float]) -> None:
    """Streams without end, on a client that may die."""
    with contextlib.suppress(EngineDied):
        for number in range(1000):
            ids = [f"{number} {stream}" for stream in range(NUM_STREAMS)]
            await asyncio.gather(*[generate(client, request_id, times_s) for request_id in ids])


def with_two(config: EngineConfig, folder: Path, use: Callable[[list[ProcessClient]], Awaitable[None]]) -> list[Path]:
    """Start two engines, use them, stop them; their traces."""
    traces = [folder / f"{number}.json" for number in range(2)]

    async def run() -> None:
        clients = [ProcessClient(replace(config, trace_path=trace)) for trace in traces]
        try:
            await asyncio.gather(*[client.start() for client in clients])
            await use(clients)
        finally:
            await asyncio.gather(*[client.stop() for client in clients])

    asyncio.run(run())
    return traces


def computed(trace: Path) -> list[tuple[int, int]]:
    """When an engine computed, step by step, in microseconds: from its first node to the end of its last."""
    events = load(trace)
    launches = spans(events, "launch")
    starts = [launch["ts"] for launch in launches] + [1 << 62]
    steps: dict[int, tuple[int, int]] = {}
    index = 0
    on_nodes: list[Event] = [event for event in events if event["ph"] == "X" and event["tid"] == 2]
    for event in on_nodes:
        while event["ts"] >= starts[index + 1]:
            index += 1
        begin, _ = steps.get(index, (event["ts"], 0))
        steps[index] = begin, event["ts"] + event["dur"]
    return list(steps.values())


def both_busy(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """The steps of each while both had work."""
    begin, end = max(first[0][0], second[0][0]), min(first[-1][1], second[-1][1])
    return [[step for step in steps if step[0] >= begin and step[1] <= end] for steps in (first, second)]


def share_overlapping(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> float:
    """Of the time in which the first engine computed, how much the second did too."""
    common = sum(max(0, min(a[1], b[1]) - max(a[0], b[0])) for a in first for b in second)
    return common / sum(end - begin for begin, end in first)


def run_both(config: EngineConfig, folder: Path) -> list[list[tuple[int, int]]]:
    async def use(clients: list[ProcessClient]) -> None:
        times_s: list[float] = []
        await asyncio.gather(
            *[generate(client, str(number), times_s) for client in clients for number in range(NUM_STREAMS)]
        )
        assert len(times_s) == 2 * NUM_STREAMS * MAX_TOKENS

    first, second = (computed(trace) for trace in with_two(config, folder, use))
    return both_busy(first, second)


def test_two_engines_take_turns(config: EngineConfig, runtime: Path, tmp_path: Path) -> None:
    unfair = []
    for attempt in range(6):  # a third process that keeps one of them from its core makes the turns uneven, at times
        folder = tmp_path / str(
            attempt
        )  # a trace that is there would be continued, and all attempts judged by the first
        folder.mkdir()
        first, second = run_both(config, folder)
        assert (runtime / "step-lease").exists()
        assert min(len(first), len(second)) >= MAX_TOKENS // 2, "they were hardly busy together"
        # A launch ends a little after the lease was given back.
        assert share_overlapping(first, second) < 0.1
        unfair.append(unevenness(first, second))
        if not unfair[-1]:
            return
    raise AssertionError(f"uneven each time: {unfair}")


def unevenness(first: list[tuple[int, int]], second: list[tuple[int, int]]) -> str:
    """What is wrong with the order of the turns; empty: nothing."""
    owners = [owner for _, owner in sorted([(begin, 0) for begin, _ in first] + [(begin, 1) for begin, _ in second])]
    changes = sum(before != after for before, after in pairwise(owners))
    if changes > 0.8 * (len(owners) - 1) and abs(len(first) - len(second)) < 0.1 * len(owners):
        return ""
    return f"{changes} changes of {len(owners)} turns, {len(first)} of one and {len(second)} of the other"


def test_uneven_turns_are_noticed() -> None:
    steps = [(10 * number, 10 * number + 9) for number in range(20)]
    assert unevenness(steps[::2], steps[1::2]) == ""
    assert unevenness(steps[:10], steps[10:]) != ""
    assert unevenness(steps[::4], [step for step in steps if step not in steps[::4]]) != ""


def test_without_the_lease_they_would_not(config: EngineConfig, runtime: Path, tmp_path: Path) -> None:
    """What the test above measures is there to be measured."""
    first, second = run_both(replace(config, step_lease=False), tmp_path)
    assert not (runtime / "step-lease").exists()
    assert share_overlapping(first, second) > 0.3


async def stop_inside_a_step(pid: int, lease_path: Path) -> None:
    """Stop a process so that it holds the lease, or the next place in line: nobody else gets a turn."""
    for _ in range(200):
        os.kill(pid, signal.SIGSTOP)
        with extension.StepLease(str(lease_path), patience_s=0.25) as acquired:
            pass
        if not acquired:
            return
        os.kill(pid, signal.SIGCONT)
        await asyncio.sleep(0.01)
    raise AssertionError("it was never found inside a step")


async def kill_inside_a_step(victim: ProcessClient, lease_path: Path, survivor_s: list[float]) -> None:
    """The survivor's next token comes at once, not after the patience that a frozen holder would be worth."""
    pid = victim.pid
    assert pid is not None
    await stop_inside_a_step(pid, lease_path)
    await asyncio.sleep(0.05)  # what the survivor had sent before
    num_before = len(survivor_s)
    await asyncio.sleep(0.1)
    assert len(survivor_s) == num_before, "it computed beside the holder"
    os.kill(pid, signal.SIGKILL)
    killed_s = time.monotonic()
    await until(lambda: len(survivor_s) >= num_before + 10 * NUM_STREAMS, PATIENCE_S)
    assert survivor_s[num_before] - killed_s < 0.5


def test_killed_holder_is_not_waited_for(config: EngineConfig, runtime: Path, tmp_path: Path) -> None:
    async def use(clients: list[ProcessClient]) -> None:
        victim, survivor = clients
        victim_s: list[float] = []
        survivor_s: list[float] = []
        survives = asyncio.create_task(occupy(survivor, survivor_s))
        for _ in range(3):
            num_seen = len(victim_s), len(survivor_s)
            dies = asyncio.create_task(occupy(victim, victim_s))
            for times_s, seen in zip((victim_s, survivor_s), num_seen, strict=True):
                await until(lambda times_s=times_s, seen=seen: len(times_s) >= seen + 20 * NUM_STREAMS)  # type: ignore[misc]
            await kill_inside_a_step(victim, runtime / "step-lease", survivor_s)
            await dies
            await until(lambda: victim.state == "ready")
        survives.cancel()
        await asyncio.gather(survives, return_exceptions=True)

    with_two(config, tmp_path, use)
