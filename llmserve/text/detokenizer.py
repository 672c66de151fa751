"""`Detokenizer`: one stream of tokens → text that is safe to send.

Owns what is held back: bytes of an unfinished character (at most 3) and text that may be the beginning of a stop
string. Invariant, whatever the grouping of the pushed tokens: the deltas joined are the decoded whole, cut at the
stop string that is complete first (of those complete at the same character, the longest).

    pushed bytes    H e l l o   E2 98 | 83 \\n | U s e r
    sent            "Hello "           "☃"       held: "\\n", then "\\nUser" may still become the stop string "\\nUser:"
"""

from __future__ import annotations

import codecs
from collections import deque
from collections.abc import Sequence

from llmserve.text.tokenizer import Tokenizer

_new_utf8_decoder = codecs.getincrementaldecoder("utf-8")


class Detokenizer:
    """Incremental decoding of one sequence; the cost of a push depends on what is pushed, not on what came before."""

    def __init__(
        self, tokenizer: Tokenizer, *, stop: Sequence[str] = (), include_stop: bool = False, skip_special: bool = True
    ) -> None:
        self._token_bytes = tokenizer.token_bytes
        self._token_text = tokenizer.token_text
        self._skipped: frozenset[int] = tokenizer.control_ids if skip_special else frozenset()
        self._stops = tuple(text for text in stop if text)
        self._include_stop = include_stop
        self._utf8 = _new_utf8_decoder("replace")
        self._held = ""  # decoded, not sent
        self._num_decoded = 0  # characters, all of them
        self._ends: deque[int] = deque()  # of each token not fully sent: index of its last character + 1
        self._last_start = 0
        self.stopped: str | None = None
        """The stop string that was met; nothing is sent after it."""

    @property
    def pending_tokens(self) -> int:
        """How many of the tokens pushed last have not been sent in full: their logprob entries wait with the text.

        After a stop: how many contributed nothing to the text sent. After `finish` without one: 0.
        """
        return len(self._ends)

    def push(self, token_ids: Sequence[int]) -> str:
        """Takes the next tokens, returns the text that is now certain (possibly empty)."""
        if len(token_ids) == 1 and not self._stops and not self._ends:  # nothing is held, nothing can stop
            token_id = token_ids[0]
            text = "" if token_id in self._skipped else self._token_text(token_id)
            if text is not None:
                self._num_decoded += len(text)
                return text
        if self.stopped is not None:
            self._ends.extend([self._num_decoded + 1] * len(token_ids))
            return ""
        pieces = [self._decode(token_id) for token_id in token_ids]
        return self._send("".join(pieces), final=False)

    def finish(self) -> str:
        """Ends the stream, returns what was held back; an unfinished character becomes U+FFFD."""
        if self.stopped is not None:
            return ""
        rest = self._utf8.decode(b"", True)
        self._num_decoded += len(rest)
        return self._send(rest, final=True)

    def _decode(self, token_id: int) -> str:
        data = b"" if token_id in self._skipped else self._token_bytes(token_id)
        text = self._utf8.decode(data)
        self._num_decoded += len(text)
        unfinished = self._utf8.getstate()[0]
        # One character, or more where the codec waits with bytes that can no longer become one (ED A0 … ED BF).
        num_to_come = len(unfinished.decode("utf-8", "replace")) if unfinished else 0
        self._ends.append(self._num_decoded + num_to_come)
        return text

    def _send(self, new: str, *, final: bool) -> str:
        text = self._held + new
        base = self._num_decoded - len(text)  # characters sent so far
        match = self._first_stop(text)
        if match is not None:
            start, self.stopped = match
            sent = text[: start + len(self.stopped)] if self._include_stop else text[:start]
            self._held = ""
            self._release_touched(base + len(sent))
            return sent
        num_held = 0 if final else self._num_undecided(text)
        sent = text[: len(text) - num_held]
        self._held = text[len(sent) :]
        self._release(base + len(sent))
        return sent

    def _first_stop(self, text: str) -> tuple[int, str] | None:
        """Start and text of the stop string whose end comes first."""
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0]
        return min(found)[1:] if found else None

    def _num_undecided(self, text: str) -> int:
        """Length of the longest suffix that begins some stop string."""
        longest = 0
        for stop in self._stops:
            at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while at >= 0 and not stop.startswith(text[at:]):
                at = text.find(stop[0], at + 1)
            longest = max(longest, len(text) - at if at >= 0 else 0)
        return longest

    def _release(self, num_sent: int) -> None:
        """Drops the tokens whose last character has been sent."""
        while self._ends and self._ends[0] <= num_sent:
            self._last_start = self._ends.popleft()

    def _release_touched(self, num_sent: int) -> None:
        """At a stop: also drops the token that was sent in part."""
        self._release(num_sent)
        if self._ends and self._last_start < num_sent:
            self._ends.popleft()
