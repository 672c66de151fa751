"""What became of drafts, counted since the start."""

from __future__ import annotations

from llmserve.types import DraftStats


class DraftCounts:
    """Running totals; `stats` makes a new one only after something was verified."""

    def __init__(self) -> None:
        self._num_drafts = 0
        self._num_draft_tokens = 0
        self._accepted: list[int] = []
        self._stats = DraftStats()
        self._is_current = True

    def note(self, num_draft_tokens: int, num_accepted: int) -> None:
        """A draft was verified; its first `num_accepted` tokens were right."""
        self._num_drafts += 1
        self._num_draft_tokens += num_draft_tokens
        self._accepted += [0] * (num_draft_tokens - len(self._accepted))
        for position in range(num_accepted):
            self._accepted[position] += 1
        self._is_current = False

    @property
    def stats(self) -> DraftStats:
        """The totals now."""
        if not self._is_current:
            self._stats = DraftStats(
                num_drafts=self._num_drafts,
                num_draft_tokens=self._num_draft_tokens,
                num_accepted_tokens=sum(self._accepted),
                num_accepted_per_position=tuple(self._accepted),
            )
            self._is_current = True
        return self._stats
