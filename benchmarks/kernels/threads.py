"""What a second thread brings, alone and beside a third one that never sleeps.

    python -m benchmarks.kernels.threads

Prefill of 512 tokens by one thread, by two, and by two while another process keeps a core busy; the three take turns.
Beside a busy process the threads of a step get two thirds of two cores at most: work items are taken one by one, so
the thread that runs does the work of the one that waits.
"""

from __future__ import annotations

import contextlib
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec

from benchmarks.engine.probe import Conditions, arguments_of, conclude, conditions, resolve
from benchmarks.peers.quiet import Quiet
from llmserve.tools.bench_offline import OfflineLoad, run_offline

MIN_SPEEDUP: Final = 1.8
MIN_FAIR_SHARE: Final = 0.9
_LOAD: Final = OfflineLoad(prefill_tokens=(512,), batch_sizes=(), repetitions=5)


class Threads(msgspec.Struct, frozen=True, kw_only=True):
    """Prefill, tokens/s, one figure a round."""

    conditions: Conditions
    one: list[float]
    two: list[float]
    two_beside_a_busy_one: list[float]
    speedup: float
    """Two threads over one; medians."""
    fair_share: float
    """Two threads beside the busy process, over what two thirds of two cores give."""


@contextlib.contextmanager
def busy() -> Iterator[None]:
    """Another process that never sleeps."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def prefill(model: Path, num_threads: int) -> float:
    """tokens/s"""
    return run_offline(model, _LOAD, num_threads=num_threads).prefill[0].tokens_per_s


def main() -> int:
    parser = arguments_of(__doc__, "threads.json")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    model = resolve(arguments.model)
    one: list[float] = []
    two: list[float] = []
    beside: list[float] = []
    others: list[float] = []
    for _ in range(arguments.rounds):
        for figures, num_threads in ((one, 1), (two, 2)):
            figure, cores = Quiet(timeout_s=20.0, max_attempts=2).measure(lambda n=num_threads: prefill(model, n))  # type: ignore[misc]
            figures.append(round(figure, 1))
            others.append(cores)
        with busy():
            beside.append(round(prefill(model, 2), 1))
        print(f"one {one[-1]:.0f}, two {two[-1]:.0f}, two beside a busy process {beside[-1]:.0f} tokens/s", flush=True)
    single = statistics.median(one)
    result = Threads(
        conditions=conditions(model, max(others)),
        one=one,
        two=two,
        two_beside_a_busy_one=beside,
        speedup=round(statistics.median(two) / single, 3),
        fair_share=round(statistics.median(beside) / (single * 4 / 3), 3),
    )
    print(f"two threads: × {result.speedup:.2f}; beside a busy process: {result.fair_share:.0%} of a fair share")
    misses = []
    if result.speedup < MIN_SPEEDUP:
        misses.append(f"two threads × {result.speedup}, not ≥ × {MIN_SPEEDUP}")
    if result.fair_share < MIN_FAIR_SHARE:
        misses.append(f"{result.fair_share:.0%} of a fair share, not ≥ {MIN_FAIR_SHARE:.0%}")
    return conclude(result, arguments.output, misses)


if __name__ == "__main__":
    sys.exit(main())
