"""Sampling by the reference sampler, row by row."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from llmserve.ops import philox
from llmserve.ops.cuda.sample import SampleRows, check_arguments
from llmserve.ops.protocol import NO_TOKEN, NOT_FINITE
from llmserve.ops.reference_sampler import by_logit, survivors


def sample(
    logits: Tensor,
    rows: SampleRows,
    token_ids: Tensor,
    workspace: Tensor,
    *,
    edited: Tensor | None = None,
    edited_rows: Tensor | None = None,
) -> None:
    check_arguments(logits, rows, token_ids, workspace, edited, edited_rows)
    workspace.fill_(0xAB)
    for row in range(len(logits)):
        own = logits[row]
        token_ids[row] = NOT_FINITE
        if not np.isfinite(own.numpy().max()):
            continue
        if rows.targets[row] >= 0:
            token_ids[row] = rows.targets[row]
            continue
        if edited is not None and edited_rows is not None and edited_rows[row] >= 0:
            own = edited[int(edited_rows[row])]
        token_ids[row] = _draw(own, rows, row)


def _draw(logits: Tensor, rows: SampleRows, row: int) -> int:
    values = logits.numpy()
    largest = values.max()
    if np.isnan(largest):
        return NOT_FINITE
    if largest == -np.inf:
        return NO_TOKEN
    temperature = float(rows.temperature[row])
    if temperature == 0.0:
        return int(np.argmax(values))
    weights = np.exp((values.astype(np.float64) - float(largest)) / temperature)
    kept = survivors(
        weights,
        by_logit(values),
        top_k=int(rows.top_k[row]),
        top_p=float(rows.top_p[row]),
        min_p=float(rows.min_p[row]),
        typical_p=1.0 if rows.typical_p is None else float(rows.typical_p[row]),
    )
    sums = np.cumsum(weights[kept])
    uniform = philox.uniform(int(rows.seed[row]) % 2**64, int(rows.sample_position[row]))
    return int(kept[np.searchsorted(sums, uniform * sums[-1], side="right")])
