"""Rows to sample, drawn at random, and the reference's answer."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, device

from llmserve.ops.cuda.sample import SampleRows
from llmserve.ops.protocol import StepInput
from tests.ops.running import Piece, make_step

VOCABS: Final = (1, 31, 32, 33, 257, 1000, 5003)
Logits = NDArray[np.float32]


def random_step(draws: np.random.Generator, num_rows: int, vocab: int) -> StepInput:
    """Any combination of filters, one row in eight scored, one in eight greedy.

    No top_p is a round binary number: half of six equal tokens is a boundary that weights below the resolution decide.
    """
    step = make_step([Piece(0, range(num_rows), 0)], num_logprobs=-1)
    step.targets[:] = np.where(draws.random(num_rows) < 1 / 8, draws.integers(0, vocab, num_rows), -1)
    step.temperature[:] = draws.choice([0, 0.01, 0.3, 0.7, 1, 1, 1.5, 5], num_rows)
    step.top_k[:] = draws.choice([0, 0, 1, 2, 7, 50, vocab // 2, vocab, vocab + 5], num_rows)
    step.top_p[:] = draws.choice([1, 1, 0.999, 0.9, 0.45, 0.01], num_rows)
    step.min_p[:] = draws.choice([0, 0, 0.02, 0.3, 1], num_rows)
    step.seed[:] = draws.integers(0, 2**64, num_rows, dtype=np.uint64)
    step.sample_position[:] = draws.integers(0, 2**40, num_rows)
    return step


def random_logits(draws: np.random.Generator, num_rows: int, vocab: int) -> Logits:
    """Normal rows of any size around any mean, with ties, whole numbers, tokens that cannot be, and void rows."""
    logits = draws.normal(size=(num_rows, vocab)) * 10 ** draws.uniform(-2, 1.3, (num_rows, 1))
    logits += draws.normal(size=(num_rows, 1)) * 10
    for row in logits:
        kind = draws.integers(10)
        if kind == 0:
            row[:] = np.round(row)
        elif kind == 1:
            row[draws.random(vocab) < 0.9] = -np.inf
        elif kind == 2:
            row[:] = draws.choice([3.5, 1.0, -0.0, 0.0], vocab)
        elif kind == 3:
            row[draws.integers(0, vocab, 5)] = row.max()
        elif kind == 4:
            row[draws.integers(vocab)] = -1e30
        elif kind == 5 and draws.random() < 0.5:
            row[draws.integers(vocab)] = draws.choice([np.nan, np.inf])
        elif kind == 6 and draws.random() < 0.2:
            row[:] = -np.inf
    return logits.astype(np.float32)


def device_rows(step: StepInput, on: device, *, typical_p: Logits | None = None) -> SampleRows:
    """The step's parameters as tensors."""

    def bring(values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(on)

    return SampleRows(
        targets=bring(step.targets),
        temperature=bring(step.temperature),
        top_k=bring(step.top_k),
        top_p=bring(step.top_p),
        min_p=bring(step.min_p),
        seed=bring(step.seed.view(np.int64)),
        sample_position=bring(step.sample_position),
        typical_p=None if typical_p is None else bring(typical_p),
    )
