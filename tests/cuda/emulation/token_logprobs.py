"""Log-probabilities by the reference sampler's own functions."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from llmserve.ops.cuda.token_logprobs import check_arguments
from llmserve.ops.reference_sampler import by_logit, log_softmax


def token_logprobs(
    logits: Tensor,
    token_ids: Tensor,
    num_logprobs: Tensor,
    logprobs: Tensor,
    ranks: Tensor,
    top_ids: Tensor,
    top_logprobs: Tensor,
) -> None:
    check_arguments(logits, token_ids, num_logprobs, logprobs, ranks, top_ids, top_logprobs)
    logprobs.fill_(float("nan"))
    ranks.zero_()
    top_ids.fill_(-1)
    top_logprobs.fill_(float("nan"))
    for row, values in enumerate(logits.numpy()):
        token, count = int(token_ids[row]), int(num_logprobs[row])
        if token < 0 or count < 0:
            continue
        own = log_softmax(values)
        best = by_logit(values)[: min(count, top_ids.shape[1])]
        logprobs[row], ranks[row] = float(own[token]), 1 + int(np.count_nonzero(values > values[token]))
        top_ids[row, : len(best)] = torch.from_numpy(best)
        top_logprobs[row, : len(best)] = torch.from_numpy(own[best])
