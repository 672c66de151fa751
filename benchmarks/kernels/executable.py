"""Runs `llmserve_kernel_bench`."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Final

from benchmarks.kernels.records import Printed, parse

DEFAULT: Final = Path(__file__).resolve().parents[2] / "build" / "benchmarks" / "llmserve_kernel_bench"


def measure(executable: Path, options: list[str]) -> Printed:
    """One run; what it says of its progress goes to stderr. Raises `CalledProcessError`, `ValueError`."""
    done = subprocess.run([executable, *options], check=True, stdout=subprocess.PIPE, text=True)
    return parse(done.stdout.splitlines())
