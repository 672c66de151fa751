"""What may come next in one sequence, and how likely it is to be right.

Every token that is generated is compared with the one predicted for it, whether that was verified in a step or not: the
chances follow a text that begins or ceases to repeat itself without a row being spent on finding out. They are kept by
the length of the match, for the longer it is, the more often it goes on. Invariant: a chance lies in (0, 1).
"""

from __future__ import annotations

from array import array
from typing import Final, Protocol

from llmserve.engine.suffix_index import MIN_MATCH, SuffixIndex

_CHANCES: Final = (0.5, 0.6, 0.75, 0.85, 0.9)
"""Before anything was seen; by the bit length of a match's length, the shortest match first."""
_RATE: Final = 0.1
"""Weight of the newest observation. The chances of one length forget the rest with a half-life of about seven."""


class Drafter(Protocol):
    """Predicts the tokens of one sequence. `catch_up` comes before `chances` and `draft`, in every step."""

    def catch_up(self) -> None:
        """Take in the tokens that the sequence got since the last call."""

    def chances(self, max_tokens: int) -> list[float]:
        """Per drafted token, the estimated probability that it and all before it are right; it may be empty."""

    def draft(self, num_tokens: int) -> list[int]:
        """As many tokens, at most the length of `chances`."""


class SuffixDrafter:
    """Predicts what came after the longest earlier occurrence of the sequence's end, in the prompt or the answer."""

    def __init__(self, token_ids: array[int]) -> None:
        self._index = SuffixIndex(token_ids)
        self._tokens = token_ids
        self._chances = list(_CHANCES)
        self._is_loaded = False

    def catch_up(self) -> None:
        """Take in the tokens that the sequence got since the last call."""
        index = self._index
        if not self._is_loaded:
            self._is_loaded = index.load()
            return
        for position in range(index.num_indexed, len(self._tokens)):
            if index.match_length:
                self._learn(index.match_length, index.predicted == self._tokens[position])
            index.follow(position)

    def chances(self, max_tokens: int) -> list[float]:
        """Per drafted token, the estimated probability that it and all before it are right; it may be empty."""
        length, chance = self._index.match_length, 1.0
        if not length:
            return []
        found = []
        for number in range(max_tokens):
            chance *= self._chances[_class_of(length + number)]
            found.append(chance)
        return found

    def draft(self, num_tokens: int) -> list[int]:
        """As many tokens, at most the length of `chances`."""
        return self._index.draft(num_tokens)

    def _learn(self, length: int, was_right: bool) -> None:
        number = _class_of(length)
        self._chances[number] += _RATE * (was_right - self._chances[number])


def _class_of(length: int) -> int:
    """The shortest matches, those from 4, 8, 16 and 32 tokens on."""
    return min(length.bit_length() - MIN_MATCH.bit_length(), len(_CHANCES) - 1)
