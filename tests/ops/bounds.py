"""How far results may be apart: executors from transformers (log-probabilities), and ops from the reference (logits).

The one table of bounds. Each is proven by mistakes that it must reject: `test_model_mutants`, `test_kernels_mutants`.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import hypot, sqrt
from typing import Final

from tests.tiny.models import TinyModel


@dataclass(frozen=True, slots=True)
class Bound:
    """Absolute difference, the mean and the largest: of natural-log probabilities, or of what a table says."""

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

CUDA_TINY: Final = Bound(mean=0.02, max=0.2)
"""The same on the CUDA executor: weights, activations and residual stream are all BF16 (measured: 0.0142, 0.126)."""

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
    quantized = model.storage not in ("f32", "f16", "bf16")
    return TINY[precision(arm, quantized=quantized)].times(spread)


ROUNDING: Final = {
    # Float32 weights and activations: sums of a few hundred terms in another order (measured: 1e-7, 3e-6).
    "float32": Bound(mean=1e-6, max=2e-5),
    # 8 significant bits: an error uniform in ±2^-9 of a value, RMS 2^-9 / √3 = 1.1e-3 (measured: 1.4e-3, 7e-3).
    "bf16": Bound(mean=2e-3, max=1.5e-2),
    # A step of the group's largest / 127; of 32 normal values that is 2.1: RMS 2.1 / 127 / √12 = 4.8e-3 (measured:
    # 4.5e-3, 2.6e-2).
    "int8": Bound(mean=6e-3, max=6e-2),
}
"""Of one rounding of a matrix's input, in standard deviations of its output: width and scale cancel out."""

ATTENTION_ROUNDING: Final = Bound(mean=4e-3, max=8e-2)
"""Of one attention: scaled queries, keys, values and probabilities in BF16 (measured: 2.7e-3, 4.9e-2).

The largest error is that of a head whose values nearly cancel."""


def op_bound(kind: str, *, gemms: float, attends: bool) -> Bound:
    """For logits of a small network, in standard deviations of theirs. Roundings add in quadrature."""
    one = ROUNDING[kind].times(sqrt(gemms))
    if not attends:
        return one
    return Bound(mean=hypot(one.mean, ATTENTION_ROUNDING.mean), max=hypot(one.max, ATTENTION_ROUNDING.max))
