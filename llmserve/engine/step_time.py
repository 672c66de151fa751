"""How long a step takes, learned from the steps themselves, and how much prefill therefore fits beside decodes.

The model: time of a step = time of its decodes alone + prefill tokens × time per prefill token. A prefill token attends
to all before it, so its time is kept by context: in powers of two, of which the nearest measured one counts. All parts
are medians of the last few measurements, so a step that was held up (another process, a page fault, a suspended
machine) moves none. The time per prefill token is what a mixed step took beyond its decodes: an error in the decode
part is absorbed there and the sum stays right. It is never taken for less than a share of what a token of that step
took on average, or a few quick steps with small chunks would make prompts look free. Small chunks are also quicker by
the token than large ones, so chunks grow no faster than twofold. Invariant: estimates are finite and never negative.
"""

from __future__ import annotations

from collections import deque
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


class StepTimeModel:
    """Measured step times. All times are in seconds."""

    def __init__(self) -> None:
        self._decodes = _Medians(DECODE_WINDOW)
        self._tokens = _Medians(TOKEN_WINDOW)
        self._last_chunk_tokens = 0

    def observe(self, num_decodes: int, num_chunk_tokens: int, seconds: float, *, context: int = 0) -> None:
        """Learn from one step. `context` is the mean number of tokens before a token of its chunks."""
        if num_chunk_tokens == 0:
            self._decodes.add(num_decodes, seconds)
        elif num_chunk_tokens >= MIN_CHUNK_TOKENS or not self._tokens:
            beyond_decodes = (seconds - self.decode_s(num_decodes)) / num_chunk_tokens
            average = seconds / (num_decodes + num_chunk_tokens)
            self._tokens.add(context, max(beyond_decodes, MIN_TOKEN_SHARE * average))
            self._last_chunk_tokens = num_chunk_tokens

    def decode_s(self, num_decodes: int) -> float:
        """Estimate of a step of so many decodes and nothing else; from the nearest batch size measured."""
        return self._decodes.nearest(num_decodes) if num_decodes else 0.0

    def prefill_token_s(self, context: int = 0) -> float:
        """Estimate of one more prefill token after so many others; 0 before anything was measured."""
        return self._tokens.nearest(context)

    def max_chunk_tokens(self, target_s: float, num_decodes: int, context: int = 0) -> int | None:
        """Prefill tokens with which a step beside these decodes meets the target; None: no limit is known."""
        token_s = self.prefill_token_s(context)
        if token_s <= 0.0:
            return None
        decode_s = self.decode_s(num_decodes)
        room_s = max(target_s, DECODE_FACTOR * decode_s) - decode_s
        fitting = min(room_s / token_s, MAX_GROWTH * self._last_chunk_tokens)
        return max(MIN_CHUNK_TOKENS, int(fitting) // MIN_CHUNK_TOKENS * MIN_CHUNK_TOKENS)


class _Medians:
    """Medians of the last measurements, by the power of two of what they were measured at."""

    def __init__(self, window: int) -> None:
        self._window = window
        self._values: dict[int, deque[float]] = {}
        self._medians: dict[int, float] = {}

    def __bool__(self) -> bool:
        return bool(self._values)

    def add(self, size: int, value: float) -> None:
        bucket = size.bit_length()
        self._values.setdefault(bucket, deque(maxlen=self._window)).append(value)
        self._medians.pop(bucket, None)

    def nearest(self, size: int) -> float:
        """Of the bucket nearest to the size's, the smaller of two; 0 when there is none."""
        if not self._values:
            return 0.0
        wanted = size.bit_length()
        bucket = min(self._values, key=lambda known: (abs(known - wanted), known))
        found = self._medians.get(bucket)
        if found is None:
            found = self._medians[bucket] = median(self._values[bucket])
        return found
