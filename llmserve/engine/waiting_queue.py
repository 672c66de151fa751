"""The waiting sequences and which of them is next.

Order: priority with ageing, then the tenant with the lowest token counter, then arrival. Sequences of one tenant and
one priority form a lane; only the heads of lanes are compared, so choosing costs as much as there are lanes. Inside a
lane one of the first few may go before the head because more of its prompt is cached.

Nobody starves. Ageing lifts a sequence one priority per `ageing_s`, but never past the most urgent one that waits:
there, shares and arrival decide, so a long backlog of one tenant does not outrank another tenant by its age. A tenant
of which nothing was admitted for `PATIENCE_S` goes first. A head is passed over at most `MAX_PASSES` times.
"""

from __future__ import annotations

import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator

from llmserve.engine.sequence import Sequence

LOOKAHEAD = 8
"""Sequences of a lane that are compared by what is cached of them."""
MAX_PASSES = 8
"""How often cached ones may go before an earlier sequence of the same lane."""
PATIENCE_S = 30.0

_Lane = OrderedDict[int, Sequence]
"""By `order`, ascending. An OrderedDict finds its first entry in constant time after many removals; a dict does not."""
_Rank = tuple[bool, float, float, int]


class WaitingQueue:
    """`num_cached` says how many tokens of a sequence the prefix cache holds now; None: order without it."""

    def __init__(self, *, ageing_s: float, num_cached: Callable[[Sequence], int] | None = None) -> None:
        self._ageing_s = ageing_s
        self._num_cached = num_cached
        self._lanes: dict[tuple[str, int], _Lane] = {}
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[Sequence]:
        return itertools.chain.from_iterable(lane.values() for lane in self._lanes.values())

    @property
    def num_lanes(self) -> int:
        return len(self._lanes)

    def add(self, seq: Sequence) -> None:
        """Take a sequence; one that has waited before gets its old place back."""
        lane = self._lanes.setdefault((seq.account.tenant, seq.priority), OrderedDict())
        last = next(reversed(lane), -1)
        lane[seq.order] = seq
        self._length += 1
        if seq.order < last:
            _restore_order(lane, seq.order)

    def remove(self, seq: Sequence) -> bool:
        """Forget a sequence; says whether it was here."""
        key = seq.account.tenant, seq.priority
        lane = self._lanes.get(key)
        if lane is None or lane.pop(seq.order, None) is None:
            return False
        if not lane:
            del self._lanes[key]
        self._length -= 1
        return True

    def admit(self, seq: Sequence, now_s: float) -> None:
        """Remove the sequence that `first` returned; those it went before have been passed over once more."""
        lane = self._lanes[seq.account.tenant, seq.priority]
        for other in lane.values():
            if other is seq:
                break
            other.num_passes += 1
        self.remove(seq)
        seq.account.last_admitted_s = now_s

    def first(self, now_s: float) -> Sequence | None:
        """The sequence to be admitted next. It stays here."""
        if not self._lanes:
            return None
        if len(self._lanes) == 1:
            [lane] = self._lanes.values()
        else:
            top = min(priority for _, priority in self._lanes)
            lane = min(self._lanes.values(), key=lambda lane: self._rank(next(iter(lane.values())), top, now_s))
        return self._prefer_cached(lane)

    def urgency(self, seq: Sequence, top: int, now_s: float) -> float:
        """The aged priority, smaller is more urgent; never below `top`, the most urgent priority there is."""
        aged = seq.priority
        if self._ageing_s > 0 and aged > top:
            aged -= int((now_s - seq.arrival_s) / self._ageing_s)
        return max(aged, top)

    def _rank(self, head: Sequence, top: int, now_s: float) -> _Rank:
        account = head.account
        patient = now_s - max(head.arrival_s, account.last_admitted_s) < PATIENCE_S
        if not patient:
            return False, 0.0, max(head.arrival_s, account.last_admitted_s), head.order
        return True, self.urgency(head, top, now_s), account.num_tokens, head.order

    def _prefer_cached(self, lane: _Lane) -> Sequence:
        candidates = itertools.islice(lane.values(), LOOKAHEAD)
        head = next(candidates)
        if self._num_cached is None or len(lane) == 1 or head.num_passes >= MAX_PASSES:
            return head
        best, most = head, self._num_cached(head)
        for seq in candidates:
            num_cached = self._num_cached(seq)
            if num_cached > most:
                best, most = seq, num_cached
        return best


def _restore_order(lane: _Lane, order: int) -> None:
    """Put the entry that was appended last where it belongs; mostly that is the front."""
    if order < next(iter(lane)):
        lane.move_to_end(order, last=False)
        return
    for later in [other for other in lane if other > order]:
        lane.move_to_end(later)
