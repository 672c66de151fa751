"""Where the end of a sequence occurred before, and what came then.

A match is the longest earlier occurrence of the tokens at the end; of several as long as each other, the most recent.
Tokens are hashed by the `MIN_MATCH` that end at them, and occurrences of one hash are chained, newest first, as in an
LZ77 compressor. A match that goes on with the next token stays the longest, so it is only followed; one that ends is
looked for anew among the newest of its chain. Invariants: a token costs constant time, however long the sequence is;
the tokens themselves are the sequence's own and are not copied.
"""

from __future__ import annotations

from array import array

MIN_MATCH = 3
"""Tokens that must agree before anything is predicted."""
MAX_MATCH = 32
"""Longer matches are not told apart when they are looked for."""
MAX_CANDIDATES = 16
"""Occurrences that are looked at, newest first."""
MAX_TOKENS_PER_CALL = 2048
"""Tokens that one call takes in: a long prompt must not hold up a step."""

_Gram = tuple[int, int, int]


class SuffixIndex:
    """An index over tokens that are appended to by their owner."""

    def __init__(self, token_ids: array[int]) -> None:
        self._tokens = token_ids
        self._newest: dict[_Gram, int] = {}
        self._older = array("i")  # per token, the occurrence of its gram before this one; -1: none
        self._next = -1
        self.match_length = 0
        """Tokens at the end that occurred before; 0: fewer than MIN_MATCH, or not all tokens are taken in yet."""

    @property
    def num_indexed(self) -> int:
        """Tokens taken in."""
        return len(self._older)

    @property
    def predicted(self) -> int:
        """The token that came after the match; -1 when there is none."""
        return self._tokens[self._next] if self.match_length else -1

    def load(self) -> bool:
        """Take in what is there, or a part of it; says whether that was all, and then there may be a match."""
        end = min(len(self._tokens), self.num_indexed + MAX_TOKENS_PER_CALL)
        last = -1
        for position in range(self.num_indexed, end):
            last = self._insert(position)
        if end < len(self._tokens):
            return False
        self._search(last)
        return True

    def follow(self, position: int) -> None:
        """Take in the token at `position`, the first that is not indexed. All before it have been loaded."""
        goes_on = self.match_length > 0 and self._tokens[self._next] == self._tokens[position]
        last = self._insert(position)
        if goes_on:
            self.match_length += 1
            self._next += 1
        else:
            self._search(last)

    def draft(self, num_tokens: int) -> list[int]:
        """The tokens that came after the match; where they reach the end, what they repeat goes on."""
        if not self.match_length:
            return []
        start, end = self._next, self.num_indexed
        found = self._tokens[start : min(end, start + num_tokens)].tolist()
        while len(found) < num_tokens:
            found.append(found[len(found) - (end - start)])
        return found

    def _insert(self, position: int) -> int:
        """Chain a token; returns the newest occurrence of its gram before it, -1 when there is none."""
        if position < MIN_MATCH - 1:
            self._older.append(-1)
            return -1
        tokens = self._tokens
        gram = (tokens[position - 2], tokens[position - 1], tokens[position])
        older = self._newest.get(gram, -1)
        self._older.append(older)
        self._newest[gram] = position
        return older

    def _search(self, candidate: int) -> None:
        """Find the longest match of the end, from the newest candidate of its gram on."""
        last = self.num_indexed - 1
        best, best_at, num_seen = 0, -1, 0
        while candidate >= 0 and num_seen < MAX_CANDIDATES and best < MAX_MATCH:
            length = self._common(candidate, last)
            if length > best:
                best, best_at = length, candidate
            candidate = self._older[candidate]
            num_seen += 1
        self.match_length, self._next = best, best_at + 1

    def _common(self, first: int, second: int) -> int:
        """How many tokens that end at two positions are the same; those of the gram are known to be."""
        tokens = self._tokens
        length, limit = MIN_MATCH, min(first + 1, MAX_MATCH)
        while length < limit and tokens[first - length] == tokens[second - length]:
            length += 1
        return length
