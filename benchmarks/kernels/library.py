"""The square matrix by oneDNN and by our kernels, in turn within each round."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Final

import msgspec

from benchmarks.kernels.executable import measure
from benchmarks.kernels.records import Gemm, Versus
from benchmarks.line_worker import LineWorker
from benchmarks.peers.quiet import Quiet

ROWS: Final = (16, 64, 512, 2048)
SIDE: Final = 2048
SHAPE: Final = "square-2048"
_SECONDS: Final = 0.15
_WORKER: Final = Path(__file__).with_name("library_worker.py")


class LibraryError(Exception):
    """The library could not be measured."""


class _Answer(msgspec.Struct, frozen=True):
    library: str = ""
    ops_per_s: float = 0.0
    error: str = ""


class Library(LineWorker):
    """The worker process; a context manager."""

    def __init__(self, python: Path, num_threads: int) -> None:
        super().__init__(python, _WORKER)
        self._threads = num_threads
        self.name = ""

    def ops_per_s(self, kind: str, m: int) -> float:
        """Of one product. Raises `LibraryError`."""
        request = {"kind": kind, "m": m, "n": SIDE, "k": SIDE, "threads": self._threads, "seconds": _SECONDS}
        line = self.ask(request)
        answer = msgspec.json.decode(line, type=_Answer) if line else _Answer(error="the worker ended; has it torch?")
        if answer.error:
            raise LibraryError(f"{kind}: {answer.error}")
        self.name = answer.library
        return answer.ops_per_s


def compare(python: Path, executable: Path, *, num_rounds: int, num_threads: int, options: list[str]) -> list[Versus]:
    """Medians of the rounds, each made again while others compute. Raises `LibraryError`."""
    theirs: dict[tuple[str, int], list[float]] = {}
    ours: dict[tuple[str, int, str], list[float]] = {}
    command = ["--shapes", SHAPE, "--m", ",".join(map(str, ROWS)), "--rounds", "1", "--seconds", "2", *options]
    with Library(python, num_threads) as library:

        def measure_round() -> tuple[dict[tuple[str, int], float], list[Gemm]]:
            products = [(kind, m) for kind in ("int8", "bf16") for m in ROWS]
            return {one: library.ops_per_s(*one) for one in products}, measure(executable, command).gemms

        for _ in range(num_rounds):
            (products, gemms), _others = Quiet(max_cores=0.2, timeout_s=20.0).measure(measure_round)
            for product, value in products.items():
                theirs.setdefault(product, []).append(value)
            for one in gemms:
                ours.setdefault((one.roof, one.m, one.type), []).append(one.ops_per_s)
        return [
            Versus(
                kind=kind,
                n=SIDE,
                k=SIDE,
                m=m,
                library=library.name,
                library_ops_per_s=statistics.median(values),
                ours={one[2]: statistics.median(own) for one, own in ours.items() if one[:2] == (kind, m)},
            )
            for (kind, m), values in theirs.items()
        ]
