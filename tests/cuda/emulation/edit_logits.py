"""Edits of logits, entry by entry in float32."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from llmserve.ops.cuda.edit_logits import check_arguments
from llmserve.ops.cuda.edits import FORBIDDEN, SEEN, DeviceEdits
from llmserve.ops.reference_sampler import unpack_mask


def edit_logits(logits: Tensor, edits: DeviceEdits, edited: Tensor) -> None:
    check_arguments(logits, edits, edited)
    for index, row in enumerate(edits.rows.tolist()):
        if row < 0:
            continue
        out = edited[index].numpy()
        out[:] = logits[row].numpy()
        for entry in range(int(edits.entry_start[index]), int(edits.entry_start[index + 1])):
            _edit(out, edits, index, entry)
        if edits.mask_rows[index] >= 0:
            mask = edits.masks[int(edits.mask_rows[index])].numpy().view(np.uint32)
            out[~unpack_mask(mask, len(out))] = -np.inf


def _edit(out: np.ndarray, edits: DeviceEdits, row: int, entry: int) -> None:
    token, flags, count = (int(values[entry]) for values in (edits.tokens, edits.flags, edits.counts))
    logit = out[token]
    for bias in edits.biases[int(edits.bias_start[entry]) : int(edits.bias_start[entry + 1])].numpy():
        logit += bias
    repetition = edits.repetition[row].numpy()
    if flags & SEEN and repetition != 1:
        logit = logit / repetition if logit > 0 else logit * repetition
    if count:
        logit = logit - edits.frequency[row].numpy() * np.float32(count) - edits.presence[row].numpy()
    out[token] = -np.inf if flags & FORBIDDEN else logit
