"""Sampling and log-probabilities of the reference executor. It is the definition that the compiled sampler follows.

Everything is computed in float64 from the row's float32 logits. For one row with temperature t > 0 and largest
logit m:

1. temperature: the weight of token i is w[i] = exp((logit[i] - m) / t).
2. top_k: keep exactly k tokens, the first by (logit descending, id ascending). 0, or k ≥ vocabulary, keeps all.
3. top_p: order the survivors by (logit descending, id ascending) and keep the shortest prefix whose weights sum to
   at least top_p times the sum over all survivors; both sums run one by one in that order. 1 keeps all.
4. min_p: keep the survivors with w[i] ≥ min_p; w is 1 for the most likely token.
5. draw: walk the survivors in ascending id with the running sum c of their weights and take the first with c > u · sum,
   where u = `philox.uniform(seed, sample_position)`.

t = 0 is greedy: the largest logit, the lowest id among equals; nothing is drawn.
Log-probabilities are those of the raw logits: logit - m - log(Σ exp(logit - m)). A rank is 1 + the number of larger
logits.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmserve.ops import philox
from llmserve.ops.protocol import StepInput, StepOutput


def sample_step(logits: NDArray[np.float32], step: StepInput) -> StepOutput:
    """Sample or score every logit row of a step. `logits` is [R, vocab]."""
    num_rows = len(step.logit_rows)
    width = max(0, int(step.num_logprobs.max(initial=0)))
    output = StepOutput(
        token_ids=np.zeros(num_rows, np.int32),
        logprobs=np.full(num_rows, np.nan, np.float32),
        ranks=np.zeros(num_rows, np.int32),
        top_ids=np.full((num_rows, width), -1, np.int32),
        top_logprobs=np.full((num_rows, width), np.nan, np.float32),
    )
    for row in range(num_rows):
        target = int(step.targets[row])
        output.token_ids[row] = target if target >= 0 else sample_row(logits[row], step, row)
        if step.num_logprobs[row] >= 0:
            _score_row(logits[row], output, row, count=int(step.num_logprobs[row]))
    return output


def sample_row(logits: NDArray[np.float32], step: StepInput, row: int) -> int:
    """The token drawn from one row of logits, [vocab]."""
    temperature = float(step.temperature[row])
    if temperature == 0.0:
        return int(np.argmax(logits))
    wide = logits.astype(np.float64)
    weights = np.exp((wide - wide.max()) / temperature)
    kept = survivors(
        weights,
        by_logit(logits),
        top_k=int(step.top_k[row]),
        top_p=float(step.top_p[row]),
        min_p=float(step.min_p[row]),
    )
    sums = np.cumsum(weights[kept])
    draw = philox.uniform(int(step.seed[row]), int(step.sample_position[row]))
    return int(kept[np.searchsorted(sums, draw * sums[-1], side="right")])


def by_logit(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """Token ids by (logit descending, id ascending)."""
    return np.argsort(-logits, kind="stable")


def survivors(
    weights: NDArray[np.float64], order: NDArray[np.int64], *, top_k: int, top_p: float, min_p: float
) -> NDArray[np.int64]:
    """Ids that pass the filters, ascending. `order` lists all ids, the most likely first."""
    kept = order[:top_k] if top_k > 0 else order
    if top_p < 1.0:
        sums = np.cumsum(weights[kept])
        kept = kept[: int(np.searchsorted(sums, top_p * sums[-1], side="left")) + 1]
    return np.sort(kept[weights[kept] >= min_p])


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Raw log-probabilities over the last axis."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True)))


def _score_row(logits: NDArray[np.float32], output: StepOutput, row: int, *, count: int) -> None:
    logprobs = log_softmax(logits)
    token = int(output.token_ids[row])
    output.logprobs[row] = logprobs[token]
    output.ranks[row] = 1 + int(np.count_nonzero(logits > logits[token]))
    best = by_logit(logits)[:count]
    output.top_ids[row, : len(best)] = best
    output.top_logprobs[row, : len(best)] = logprobs[best]
