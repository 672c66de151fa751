"""How full one engine's queue is, as its frontend sees it: the refusal of what would wait without end."""

from __future__ import annotations

import math
import time
from collections import deque

from llmserve.errors import Overloaded
from llmserve.types import EngineInfo, EngineStats

_MAX_RETRY_S = 30.0
_NUM_ENDS = 64


class QueueLoad:
    """Judges from the engine's last statistics and from what this frontend has open, without asking the engine."""

    def __init__(self) -> None:
        self._ends: deque[float] = deque(maxlen=_NUM_ENDS)

    def note_end(self) -> None:
        """A request ended: the rate of ends tells when a place gets free."""
        self._ends.append(time.monotonic())

    def check(self, info: EngineInfo, stats: EngineStats, *, num_open: int) -> None:
        """Raise `Overloaded` when one request more would find the queue full."""
        limit = info.max_num_waiting
        if limit == 0:
            return
        if stats.num_waiting >= limit or num_open >= info.max_num_seqs + limit:
            num_ahead = max(stats.num_waiting, num_open - info.max_num_seqs)
            raise Overloaded(
                f"{num_ahead} requests wait already; {limit} may", retry_after_s=self._retry_after_s(num_ahead)
            )

    def _retry_after_s(self, num_ahead: int) -> float:
        """When half of those ahead will have gone, going by the latest ends."""
        if len(self._ends) < 2:
            return 1.0
        each_s = (time.monotonic() - self._ends[0]) / len(self._ends)
        return min(_MAX_RETRY_S, max(1.0, math.ceil(each_s * num_ahead / 2)))
