"""Committed golden values of the tiny networks (see scripts/make_model_golden.py)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

DATA: Final = Path(__file__).parent.parent / "data"


@dataclass(frozen=True, slots=True)
class Golden:
    """What transformers computed in float32 for one network."""

    sha256: str
    """Of the stored weights, see `tests.tiny.models.digest`."""
    prompt: list[int]
    ids: NDArray[np.int64]  # [N]
    logprobs: NDArray[np.float32]  # [T, N] of `ids` after each prompt token

    @property
    def spread(self) -> float:
        """Standard deviation of the log-probabilities."""
        return float(self.logprobs.std())


@cache
def tiny_golden(name: str) -> Golden:
    """The golden values of a tiny network."""
    with np.load(DATA / "tiny_models_golden.npz") as file:
        return Golden(
            sha256=str(file[f"{name}.sha256"]),
            prompt=file[f"{name}.prompt"].tolist(),
            ids=file[f"{name}.ids"].astype(np.int64),
            logprobs=file[f"{name}.logprobs"],
        )
