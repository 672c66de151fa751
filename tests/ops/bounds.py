"""How far an executor's log-probabilities may be from transformers' float32. The one table of model-level bounds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from tests.tiny.models import TinyModel


@dataclass(frozen=True, slots=True)
class Bound:
    """Absolute difference of natural-log probabilities: the mean and the largest."""

    mean: float
    max: float

    def holds(self, measured: Bound) -> bool:
        """Is what was measured within this bound? NaN never is."""
        return measured.mean <= self.mean and measured.max <= self.max

    def times(self, factor: float) -> Bound:
        return Bound(mean=self.mean * factor, max=self.max * factor)


TINY: Final = {
    # float32 throughout: only the order of sums differs (measured: 1.1e-6, 8e-6).
    "float": Bound(mean=1e-5, max=1e-4),
    # BF16 activations, keys and values (simulated: 0.011, 0.07).
    "bf16": Bound(mean=0.016, max=0.15),
    # int8 activations with a scale per 256 values, BF16 keys and values (simulated: 0.032, 0.21).
    "int8": Bound(mean=0.045, max=0.35),
}
"""For the networks of `tests.tiny`, in units of the standard deviation of their golden log-probabilities (3 to 6).

Random weights amplify rounding far more than trained ones do; the default model's bounds speak of quality.
"""

SMOLLM2: Final = {
    "float": Bound(mean=5e-5, max=5e-4),
    "bf16": Bound(mean=0.01, max=0.25),
    "int8": Bound(mean=0.04, max=1.0),
}
"""For the default model, SmolLM2-135M-Instruct in Q4_1, in natural-log units."""

SMOLLM2_MIN_TOP1: Final = 0.95
"""Share of positions whose most likely token is transformers' own."""


def precision(arm: str, *, quantized: bool) -> str:
    """Which line of a table an executor arm has to meet."""
    if arm == "reference":
        return "float"
    return "int8" if quantized and not arm.endswith("-exact") else "bf16"


def tiny_bound(model: TinyModel, arm: str, *, spread: float) -> Bound:
    """The bound of an executor arm for a tiny network. `spread`: standard deviation of its golden log-probabilities."""
    quantized = model.storage in ("q4_0", "q4_1", "q8_0")
    return TINY[precision(arm, quantized=quantized)].times(spread)
