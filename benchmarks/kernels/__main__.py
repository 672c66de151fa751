"""GEMM kernels of the CPU against the roofs that the same run measures, and against oneDNN.

    make kernel-bench                                  # builds and runs everything, about 5 minutes
    python -m benchmarks.kernels --quick               # two matrices, 20 seconds
    python -m benchmarks.kernels --types q4_0 --m 1,8  # what is left is passed on; see the executable's --help

Prints a table, writes benchmarks/results/kernels.json and .svg (a full run) or those named by --output, and says which
floors (floors.py) are missed; the exit status is 1 when any is.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Final

from benchmarks.engine.probe import conclude
from benchmarks.kernels import executable, floors, library, report
from benchmarks.kernels.records import Kernels, Printed, Versus
from benchmarks.peers.quiet import Quiet
from benchmarks.peers.results import RESULTS
from llmserve.tools.bench_host import describe_host

_REFERENCE: Final = Path(".venv-reference/bin/python")
_FORWARDED: Final = ("--isa", "--threads", "--types")
"""Options of the executable that hold for the comparison too."""


def main() -> int:
    """Measure, print, save, judge."""
    arguments, options = _parse()
    host = describe_host()
    options = ["--commit", host.commit, *options]

    def measure() -> tuple[Printed, list[Versus]]:
        printed = executable.measure(arguments.executable, options)
        return printed, _versus(arguments, options, printed.run.threads)

    (printed, versus), others = Quiet(max_attempts=1, timeout_s=60.0).measure(measure)
    result = Kernels(
        host=host,
        run=printed.run,
        others_cores=others,
        roofs=printed.roofs,
        gemms=printed.gemms,
        disturbed=printed.disturbed,
        versus=versus,
    )
    print(report.text(result))
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.with_suffix(".svg").write_text(report.plot(result))
    if printed.run.isa == floors.UNJUDGED_ISA:
        print("nothing is promised for the matrix unit: --isa avx512 is judged", file=sys.stderr)
        return conclude(result, arguments.output, [])
    return conclude(result, arguments.output, floors.misses(printed.gemms, versus, printed.disturbed))


def _parse() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--executable", type=Path, default=executable.DEFAULT, help="llmserve_kernel_bench")
    parser.add_argument("--reference", type=Path, help=f"a Python with torch (default: {_REFERENCE} where it exists)")
    parser.add_argument("--no-reference", action="store_true", help="do not compare with oneDNN")
    parser.add_argument("--output", type=Path, help="result file (default: kernels.json, local/ unless a full run)")
    arguments, options = parser.parse_known_args()
    if not arguments.executable.exists():
        parser.error(f"{arguments.executable} is missing: make kernel-bench-build")
    if arguments.output is None:
        arguments.output = (RESULTS / "local" if options else RESULTS) / "kernels.json"
    return arguments, options


def _versus(arguments: argparse.Namespace, options: list[str], num_threads: int) -> list[Versus]:
    python = arguments.reference or (_REFERENCE if _REFERENCE.exists() else None)
    if python is None or arguments.no_reference:
        print("oneDNN is not measured: no --reference and no .venv-reference", file=sys.stderr)
        return []
    kept = [word for at, word in enumerate(options) if {word, options[at - 1]} & set(_FORWARDED)]
    num_rounds = 2 if "--quick" in options else 5
    try:
        return library.compare(
            python, arguments.executable, num_rounds=num_rounds, num_threads=num_threads, options=kept
        )
    except (library.LibraryError, subprocess.SubprocessError) as error:
        print(f"oneDNN is not measured: {error}", file=sys.stderr)
        return []


if __name__ == "__main__":
    sys.exit(main())
