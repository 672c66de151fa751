"""What the serving path costs: both processes of a real server under closed loops of 1, 8, 32 and 128 streams.

    python -m benchmarks.serving_path [--against TREE] [--streams 1,8,32,128] [--rounds 3]

`--against` names another tree with its extension built in place: its server is measured in alternation with this one's
by the same interpreter and libraries, so that what the machine does meanwhile hits both. The load generator runs on the
same cores. Frontend time is all of its threads' time while the level ran, its share of reading requests included, per
output token; `sleeps` is how often its main thread went to sleep, per output token.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
from pathlib import Path
from typing import Final

import msgspec

from benchmarks.peers.results import RESULTS, save_json
from benchmarks.serving_path.engine_loop import LoopShare, measure
from benchmarks.serving_path.processes import engine_pid, use_of
from llmserve.checkpoints import pull
from llmserve.tools.bench_host import Host, describe_host
from llmserve.tools.bench_load import Load, prepare, run_level
from llmserve.tools.bench_meter import OthersMeter, wait_until_quiet
from llmserve.tools.bench_server import RunningServer, free_port, llmserve_command, running_server
from llmserve.tools.bench_stats import LevelReport

ROOT: Final = Path(__file__).resolve().parent.parent.parent
MAX_FRONTEND_US: Final = 30.0
"""Per streamed token, at 32 streams."""
MAX_OTHER_SHARES: Final = {1: 0.06, 32: 0.04}
"""Of an engine step, outside the compiled program, by batch size."""
_QUIET_CORES: Final = 0.1
_QUIET_WAIT_S: Final = 20.0
"""For other processes to leave the cores before a level; it is measured all the same, and `others_cores` tells."""


class Level(msgspec.Struct, frozen=True, kw_only=True):
    """One closed loop."""

    tree: str
    round: int
    others_cores: float
    frontend_us: float
    """Processor time of the frontend process per output token."""
    engine_us: float
    frontend_sleeps: float
    """Per output token."""
    level: LevelReport


class ServingPath(msgspec.Struct, frozen=True, kw_only=True):
    """The result file."""

    host: Host
    load: Load
    levels: list[Level]
    engine_loop: list[LoopShare]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.serving_path", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--against", type=Path, default=None, metavar="TREE", help="another tree, built")
    parser.add_argument("--streams", default="1,8,32,128")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200, help="steps of the engine loop; 0 leaves it out")
    parser.add_argument("--json", type=Path, default=RESULTS / "local" / "serving_path.json")
    return parser.parse_args()


def main() -> int:
    """Measure, print, write. Returns 1 when a bound is missed."""
    args = _parse()
    model = pull.resolve(args.model)
    load = Load(output_tokens=args.output_tokens)
    streams = [int(number) for number in args.streams.split(",")]
    trees = [ROOT] if args.against is None else [ROOT, args.against.resolve()]
    levels: list[Level] = []
    for number in range(args.rounds):
        for tree in trees if number % 2 == 0 else trees[::-1]:
            levels += _serve(tree, model, load, streams, number)
    loop = measure(model, MAX_OTHER_SHARES, num_steps=args.steps) if args.steps else []
    save_json(ServingPath(host=describe_host(), load=load, levels=levels, engine_loop=loop), args.json)
    missed = _report(levels, loop)
    return 1 if missed else 0


def _serve(tree: Path, model: Path, load: Load, streams: list[int], number: int) -> list[Level]:
    port = free_port()
    # The working directory must not stand before the tree.
    env = os.environ | {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(tree)}
    with running_server(llmserve_command(str(model), port=port), port=port, env=env) as server:
        return asyncio.run(_run_levels(server, tree.name, load, streams, number))


async def _run_levels(server: RunningServer, tree: str, load: Load, streams: list[int], number: int) -> list[Level]:
    load = await prepare(server.endpoint, load)
    pids = (server.pid, engine_pid(server.pid))
    levels = []
    for num_streams in streams:
        wait_until_quiet(max_cores=_QUIET_CORES, timeout_s=_QUIET_WAIT_S, sample_s=0.5)
        meter, before = OthersMeter(), [use_of(pid) for pid in pids]
        report = await run_level(server.endpoint, load, num_streams)
        frontend, engine = (use_of(pid).since(then) for pid, then in zip(pids, before, strict=True))
        num_tokens = max(1.0, report.output_tokens * (report.num_requests - report.num_failures))
        levels.append(
            Level(
                tree=tree,
                round=number,
                others_cores=meter.cores(),
                frontend_us=round(frontend.cpu_s / num_tokens * 1e6, 2),
                engine_us=round(engine.cpu_s / num_tokens * 1e6, 1),
                frontend_sleeps=round(frontend.num_sleeps / num_tokens, 3),
                level=report,
            )
        )
        print(_line(levels[-1]), flush=True)
    return levels


def _line(level: Level) -> str:
    report = level.level
    return (
        f"{level.tree:>12} {report.num_streams:4d} streams  {report.output_tokens_per_s:7.1f} tok/s  "
        f"ITL p50 {report.itl_ms.p50:6.1f} p99 {report.itl_ms.p99:6.1f} ms  TTFT p50 {report.ttft_ms.p50:7.1f} ms  "
        f"frontend {level.frontend_us:6.1f} µs/token, {level.frontend_sleeps:.2f} sleeps  "
        f"engine {level.engine_us:7.1f} µs/token  failures {report.num_failures}  others {level.others_cores:.2f}"
    )


def _report(levels: list[Level], loop: list[LoopShare]) -> list[str]:
    """Print what was found over all rounds; returns the bounds that are missed."""
    for share in loop:
        print(
            f"engine loop B={share.num_sequences}: step {share.step_ms} ms, {share.other_us} µs outside the program "
            f"({share.other_share:.1%}; at most {share.max_share:.0%})"
        )
    missed = [f"engine loop B={share.num_sequences}" for share in loop if share.other_share > share.max_share]
    own = [level for level in levels if level.tree == ROOT.name]
    at_32 = [level.frontend_us for level in own if level.level.num_streams == 32]
    if at_32 and statistics.median(at_32) > MAX_FRONTEND_US:
        missed.append(f"frontend at 32 streams: {statistics.median(at_32):.1f} µs a token, {MAX_FRONTEND_US} at most")
    rates = {
        size: [level.level.output_tokens_per_s for level in own if level.level.num_streams == size]
        for size in (32, 128)
    }
    if all(rates.values()) and statistics.median(rates[128]) < statistics.median(rates[32]):
        missed.append("throughput at 128 streams is below that at 32")
    num_failures = sum(level.level.num_failures for level in own)
    if num_failures:
        missed.append(f"{num_failures} requests failed")
    for line in missed:
        print("MISSED", line)
    return missed


if __name__ == "__main__":
    sys.exit(main())
