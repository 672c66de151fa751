"""Which living sequences are past their deadline.

Invariant: a sequence that is past its deadline at a call of `take_expired` is returned by that call, once. Ended
sequences may linger in the heap until their own deadline; they are recognised by `ended`.
"""

from __future__ import annotations

import heapq

from llmserve.engine.sequence import Sequence


class Deadlines:
    """The sequences that have a deadline, soonest first."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Sequence]] = []

    def watch(self, seq: Sequence) -> None:
        """Take note of a sequence's deadline, if it has one."""
        if seq.deadline_s is not None:
            heapq.heappush(self._heap, (seq.deadline_s, seq.order, seq))

    def take_expired(self, now_s: float) -> list[Sequence]:
        """The living sequences whose deadline has passed; constant time when there is none."""
        expired: list[Sequence] = []
        heap = self._heap
        while heap and (heap[0][0] <= now_s or heap[0][2].ended):
            seq = heapq.heappop(heap)[2]
            if not seq.ended:
                expired.append(seq)
        return expired
