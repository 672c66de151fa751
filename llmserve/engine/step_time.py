"""How long a step takes, learned from the steps themselves, and how much prefill therefore fits beside decodes.

The model: time of a step = time of its decodes alone + prefill tokens × time per prefill token. A prefill token attends
to all before it, so its time is kept by context: in powers of two, of which the nearest measured one counts. All parts
are medians of the last few measurements, so a step that was held up (another process, a page fault, a suspended
machine) moves none. The time per prefill token is what a mixed step took beyond its decodes: an error in the decode
part is absorbed there and the sum stays right. It is never taken for less than a share of what a token of that step
took on average, or a few quick steps with small chunks would make prompts look free. Small chunks are also quicker by
the token than large ones, so chunks grow no faster than twofold.

Drafts are rows beside decodes as well, yet few. A step of hardly any rows is bound by reading weights: until measured,
one row more of those is taken to be free, and of all others to cost what a prefill token costs. A measurement that
nothing has confirmed for long is forgotten: it may have been of a step that was held up, and what it forbids would not
be measured again. Invariant: estimates are finite and never negative.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from statistics import median

DECODE_WINDOW, TOKEN_WINDOW = 11, 7
"""Measurements a median is taken of. A prompt visits a context for a few steps only: fewer of those."""
MIN_CHUNK_TOKENS = 16
"""Prefill tokens of a step whatever they cost: a prompt always gets on."""
MIN_TOKEN_SHARE = 0.3
DECODE_FACTOR = 2.0
"""A target below this multiple of the decodes' own time is raised to it: prefill gets a share of every step."""
MAX_GROWTH = 2
"""Of a chunk, from one measured step to the next."""
MAX_AGE = 256
"""Steps without chunks after which the time of drafts at some number of rows is forgotten, if not measured again."""
NUM_FREE_ROWS = 4
"""Rows of a step that is bound by memory."""


class StepTimeModel:
    """Measured step times. All times are in seconds."""

    def __init__(self) -> None:
        self._decodes = _Medians(DECODE_WINDOW)
        self._tokens = _Medians(TOKEN_WINDOW)
        self._few_drafts = _Medians(DECODE_WINDOW, int)
        self._drafts = _Medians(DECODE_WINDOW, _eights)
        self._num_steps = 0
        self._last_chunk_tokens = 0

    def observe(self, num_decodes: int, num_chunk_tokens: int, seconds: float, *, context: int = 0) -> None:
        """Learn from one step. `context` is the mean number of tokens before a token of its chunks."""
        if num_chunk_tokens == 0:
            self._decodes.add(num_decodes, seconds)
            self._age_drafts()
        elif num_chunk_tokens >= MIN_CHUNK_TOKENS or not self._tokens:
            beyond_decodes = (seconds - self.decode_s(num_decodes)) / num_chunk_tokens
            average = seconds / (num_decodes + num_chunk_tokens)
            self._tokens.add(context, max(beyond_decodes, MIN_TOKEN_SHARE * average))
            self._last_chunk_tokens = num_chunk_tokens

    def observe_drafts(self, num_decodes: int, num_draft_tokens: int, seconds: float) -> None:
        """Learn from a step of decodes of which some verified drafts, so many in all."""
        beyond_decodes = (seconds - self.decode_s(num_decodes)) / num_draft_tokens
        num_rows = num_decodes + num_draft_tokens
        drafts = self._few_drafts if num_rows <= NUM_FREE_ROWS else self._drafts
        drafts.add(num_rows, max(0.0, beyond_decodes))
        self._age_drafts()

    def decode_s(self, num_decodes: int) -> float:
        """Estimate of a step of so many decodes and nothing else; from the nearest batch size measured."""
        return self._decodes.nearest(num_decodes) if num_decodes else 0.0

    def prefill_token_s(self, context: int = 0) -> float:
        """Estimate of one more prefill token after so many others; 0 before anything was measured."""
        return self._tokens.nearest(context)

    def draft_token_s(self, num_rows: int) -> float:
        """Estimate of what each draft of a step adds to its decodes, when it has so many rows in all."""
        if num_rows <= NUM_FREE_ROWS:
            return self._few_drafts.nearest(num_rows)
        return self._drafts.nearest(num_rows) if self._drafts else self.prefill_token_s()

    def max_chunk_tokens(self, target_s: float, num_decodes: int, context: int = 0) -> int | None:
        """Prefill tokens with which a step beside these decodes meets the target; None: no limit is known."""
        token_s = self.prefill_token_s(context)
        if token_s <= 0.0:
            return None
        decode_s = self.decode_s(num_decodes)
        room_s = max(target_s, DECODE_FACTOR * decode_s) - decode_s
        fitting = min(room_s / token_s, MAX_GROWTH * self._last_chunk_tokens)
        return max(MIN_CHUNK_TOKENS, int(fitting) // MIN_CHUNK_TOKENS * MIN_CHUNK_TOKENS)

    def _age_drafts(self) -> None:
        self._num_steps += 1
        if self._num_steps % MAX_AGE == 0:
            self._few_drafts.forget_unconfirmed()
            self._drafts.forget_unconfirmed()


def _eights(size: int) -> int:
    """Rows are computed in eights: one more of them may cost as much as all."""
    return (size + 7) // 8


class _Medians:
    """Medians of the last measurements, by what they were measured at: by powers of two, or other buckets."""

    def __init__(self, window: int, bucket_of: Callable[[int], int] = int.bit_length) -> None:
        self._window = window
        self._bucket_of = bucket_of
        self._values: dict[int, deque[float]] = {}
        self._medians: dict[int, float] = {}
        self._confirmed: set[int] = set()

    def __bool__(self) -> bool:
        return bool(self._values)

    def add(self, size: int, value: float) -> None:
        bucket = self._bucket_of(size)
        self._values.setdefault(bucket, deque(maxlen=self._window)).append(value)
        self._medians.pop(bucket, None)
        self._confirmed.add(bucket)

    def forget_unconfirmed(self) -> None:
        """Drop the buckets that got no measurement since the last call."""
        for bucket in self._values.keys() - self._confirmed:
            del self._values[bucket]
            self._medians.pop(bucket, None)
        self._confirmed.clear()

    def nearest(self, size: int) -> float:
        """Of the bucket nearest to the size's, the smaller of two; 0 when there is none."""
        if not self._values:
            return 0.0
        wanted = self._bucket_of(size)
        return self._median(min(self._values, key=lambda known: (abs(known - wanted), known)))

    def _median(self, bucket: int) -> float:
        found = self._medians.get(bucket)
        if found is None:
            found = self._medians[bucket] = median(self._values[bucket])
        return found
