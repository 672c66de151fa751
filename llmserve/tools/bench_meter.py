"""Whether a measurement had the machine for itself: the processor time that everybody else took meanwhile.

Two compute threads on two cores wait for each other at every layer, so a neighbour that takes half a core can cost far
more than a quarter of the speed, and not the same for every engine. Reads `/proc` (Linux).
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Final

_TICKS_A_SECOND: Final = os.sysconf("SC_CLK_TCK")
_IDLE_FIELDS: Final = (3, 4)
"""idle and iowait in the first line of /proc/stat."""
_GUEST_FIELD: Final = 8
"""From here on the fields are parts of earlier ones."""


class OthersMeter:
    """Measures from its creation on. "Others" are all processes but this one and its descendants, and stolen time."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._total, self._ours = _busy_s(), family_seconds()

    def cores(self) -> float:
        """Cores that others kept busy on average since the start; a hundredth of a second is the finest grain."""
        others_s = (_busy_s() - self._total) - (family_seconds() - self._ours)
        return round(max(0.0, others_s) / max(1e-9, time.monotonic() - self._started_s), 3)


def wait_until_quiet(*, max_cores: float, timeout_s: float, sample_s: float = 1.0) -> bool:
    """Sleep until others kept at most `max_cores` busy for a sample; False when they never did."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        meter = OthersMeter()
        time.sleep(sample_s)
        if meter.cores() <= max_cores:
            return True
        if time.monotonic() > deadline_s:
            return False


def _busy_s() -> float:
    """Processor time of the whole machine, stolen time included."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
    ticks = [int(value) for index, value in enumerate(fields[:_GUEST_FIELD]) if index not in _IDLE_FIELDS]
    return sum(ticks) / _TICKS_A_SECOND


def family_seconds() -> float:
    """Processor time of this process and its descendants, the ended and waited-for included."""
    parents: dict[int, int] = {}
    ticks: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue  # it has just ended
        pid = int(entry.name)
        parents[pid] = int(fields[1])
        ticks[pid] = sum(int(value) for value in fields[11:15])  # own and waited-for children's, user and system
    return sum(ticks[pid] for pid in parents if _descends(pid, os.getpid(), parents)) / _TICKS_A_SECOND


def _descends(pid: int, ancestor: int, parents: dict[int, int]) -> bool:
    while pid in parents and pid != ancestor:
        pid = parents[pid]
    return pid == ancestor
