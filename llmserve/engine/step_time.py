"""How long a step takes, learned from the steps themselves, and how much prefill therefore fits beside decodes.

The model: time of a step = time of its decodes alone + prefill tokens × time per prefill token. Both parts are medians
of the last few measurements, so a step that was held up (another process, a page fault, a suspended machine) moves
neither. The time per prefill token is what a mixed step took beyond its decodes: an error in the decode part is
absorbed there and the sum stays right. It is never taken for less than a share of what a token of that step took on
average, or a few quick steps with small chunks would make prompts look free. Invariant: estimates are finite and never
negative.
"""

from __future__ import annotations

from collections import deque
from statistics import median

WINDOW = 11
"""Measurements a median is taken of."""
MIN_CHUNK_TOKENS = 16
"""Prefill tokens of a step whatever they cost: a prompt always gets on."""
MIN_TOKEN_SHARE = 0.3
DECODE_FACTOR = 2.0
"""A target below this multiple of the decodes' own time is raised to it: prefill gets a share of every step."""


class StepTimeModel:
    """Measured step times. All times are in seconds."""

    def __init__(self) -> None:
        self._decode_times: dict[int, deque[float]] = {}
        self._decode_medians: dict[int, float] = {}
        self._token_times: deque[float] = deque(maxlen=WINDOW)

    def observe(self, num_decodes: int, num_chunk_tokens: int, seconds: float) -> None:
        """Learn from one step."""
        if num_chunk_tokens == 0:
            bucket = num_decodes.bit_length()
            times = self._decode_times.setdefault(bucket, deque(maxlen=WINDOW))
            times.append(seconds)
            self._decode_medians.pop(bucket, None)
        elif num_chunk_tokens >= MIN_CHUNK_TOKENS or not self._token_times:
            beyond_decodes = (seconds - self.decode_s(num_decodes)) / num_chunk_tokens
            average = seconds / (num_decodes + num_chunk_tokens)
            self._token_times.append(max(beyond_decodes, MIN_TOKEN_SHARE * average))

    def decode_s(self, num_decodes: int) -> float:
        """Estimate of a step of so many decodes and nothing else; from the nearest batch size measured."""
        if num_decodes == 0 or not self._decode_times:
            return 0.0
        wanted = num_decodes.bit_length()
        bucket = min(self._decode_times, key=lambda known: (abs(known - wanted), known))
        found = self._decode_medians.get(bucket)
        if found is None:
            found = self._decode_medians[bucket] = median(self._decode_times[bucket])
        return found

    @property
    def prefill_token_s(self) -> float:
        """Estimate of one more prefill token; 0 before anything was measured."""
        return median(self._token_times) if self._token_times else 0.0

    def max_chunk_tokens(self, target_s: float, num_decodes: int) -> int | None:
        """Prefill tokens with which a step beside these decodes meets the target; None: no limit is known."""
        token_s = self.prefill_token_s
        if token_s <= 0.0:
            return None
        decode_s = self.decode_s(num_decodes)
        room_s = max(target_s, DECODE_FACTOR * decode_s) - decode_s
        fitting = min(room_s / token_s, 1e9)
        return max(MIN_CHUNK_TOKENS, int(fitting) // MIN_CHUNK_TOKENS * MIN_CHUNK_TOKENS)
