"""Rotary frequencies: `RopeConfig` → `RopeSpec`, in float64.

The base frequency of pair i is theta^(-2i / rotary_dim). Scaling changes frequencies only; positions stay as they are.
Sources: Su et al. (RoFormer); "linear" is position interpolation (Chen et al.); "llama3" is Meta's piecewise stretch by
wavelength; "factors" are divisors that the checkpoint states per frequency.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmserve.config import RopeConfig
from llmserve.errors import CheckpointError
from llmserve.ops.protocol import RopeSpec


def rope_spec(config: RopeConfig, head_dim: int) -> RopeSpec:
    """The spec that executors take. Raises `CheckpointError` if the factors do not fit the rotated channels."""
    rotary_dim = config.rotary_dim or head_dim
    inv_freq = config.theta ** (-np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim)  # [rotary_dim / 2]
    return RopeSpec(style=config.style, rotary_dim=rotary_dim, inv_freq=_scale(inv_freq, config))


def _scale(inv_freq: NDArray[np.float64], config: RopeConfig) -> NDArray[np.float64]:
    if config.scaling == "linear":
        return inv_freq / config.factor
    if config.scaling == "llama3":
        return _scale_llama3(inv_freq, config)
    if config.scaling == "factors":
        if len(config.factors) != len(inv_freq):
            raise CheckpointError(f"{len(config.factors)} rope factors for {len(inv_freq)} frequencies")
        return inv_freq / np.asarray(config.factors, np.float64)
    return inv_freq


def _scale_llama3(inv_freq: NDArray[np.float64], config: RopeConfig) -> NDArray[np.float64]:
    """Waves that turn often within the original context stay, slow ones are stretched, those between are blended."""
    turns = config.original_max_len * inv_freq / (2.0 * np.pi)
    span = config.high_freq_factor - config.low_freq_factor
    keep = np.clip((turns - config.low_freq_factor) / span, 0.0, 1.0)  # 1: unchanged, 0: stretched by `factor`
    return inv_freq * (keep + (1.0 - keep) / config.factor)
