"""Measure while nobody else computes: wait for quiet, measure, look whether it stayed quiet, else again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from llmserve.tools.bench_meter import OthersMeter, wait_until_quiet

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Quiet:
    """The rule, the same for every engine."""

    max_cores: float = 0.1
    """Cores that others may keep busy during a measurement."""
    max_attempts: int = 3
    timeout_s: float = 60.0
    """Longest wait for quiet before each attempt."""
    sample_s: float = 0.5
    """How long it must have been quiet."""

    def measure(self, work: Callable[[], _T]) -> tuple[_T, float]:
        """The least disturbed of the attempts, and how disturbed it was, in cores."""
        best: tuple[_T, float] | None = None
        for _ in range(self.max_attempts):
            wait_until_quiet(max_cores=self.max_cores / 2, timeout_s=self.timeout_s, sample_s=self.sample_s)
            meter = OthersMeter()
            value = work()
            cores = meter.cores()
            if best is None or cores < best[1]:
                best = value, cores
            if cores <= self.max_cores:
                break
            print(f"  others used {cores:.2f} cores meanwhile", file=sys.stderr)
        assert best is not None
        return best
