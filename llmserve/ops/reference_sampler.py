"""Sampling and log-probabilities of the reference executor. It is the definition that the compiled sampler follows.

A row whose raw logits hold a NaN or have no finite maximum yields `NOT_FINITE` and nothing else, sampled or scored.

Log-probabilities are taken first, of the raw logits: logit - m - log(Σ exp(logit - m)), where m is the largest. A rank
is 1 + the number of larger logits.

Then, where the row has a `SamplingState` or a mask, the logits are edited in float32, each step on what the one before
left:

1. bias: logit[i] += b for each (i, b) of `logit_bias`, in order.
2. repetition penalty r, of every token of the prompt or the generated tokens: logit / r where it is positive,
   logit * r elsewhere.
3. frequency penalty f and presence penalty p, of every token that was generated, n times: logit -= f * n, then
   logit -= p.
4. masks: -infinity for tokens outside `allowed_token_ids` and for tokens whose bit in the row's mask is clear; for the
   last token of each of `bad_words` whose other tokens are the last ones generated; and for `stop_token_ids` while
   fewer than `min_tokens` tokens were generated. When no token is left, the outcome is `NO_TOKEN`: nothing forbidden
   is ever sampled.

Then one token is chosen, in float64. With temperature t > 0 and m now the largest edited logit:

5. temperature: the weight of token i is w[i] = exp((logit[i] - m) / t).
6. top_k: keep exactly k tokens, the first by (logit descending, id ascending). 0, or k ≥ vocabulary, keeps all.
7. typical_p: with p the weights of the survivors divided by their sum and H = -Σ p log p, order the survivors by
   (|-log p - H| ascending, logit descending, id ascending) and keep the shortest prefix whose weights sum to at least
   typical_p times the sum over all survivors. 1 keeps all.
8. top_p: order the survivors by (logit descending, id ascending) and keep the shortest prefix whose weights sum to
   at least top_p times the sum over all survivors; both sums run one by one in that order. 1 keeps all.
9. min_p: keep the survivors with w[i] ≥ min_p times the largest weight among them.
10. draw: walk the survivors in ascending id with the running sum c of their weights and take the first with
   c > u · sum, where u = `philox.uniform(seed, sample_position)`.

t = 0 is greedy: the largest edited logit, the lowest id among equals; nothing is drawn.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from llmserve.ops import philox
from llmserve.ops.protocol import NO_TOKEN, NOT_FINITE, SamplingState, StepInput, StepOutput


def sample_step(logits: NDArray[np.float32], step: StepInput) -> StepOutput:
    """Sample or score every logit row of a step. `logits` is [R, vocab]. States record what was sampled.

    Raises `ValueError` when a state does not know all tokens before the position to sample.
    """
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
        output.token_ids[row] = _outcome(logits[row], step, row)
        if step.num_logprobs[row] >= 0 and output.token_ids[row] >= 0:
            _score_row(logits[row], output, row, count=int(step.num_logprobs[row]))
    for row in range(num_rows):
        state = _state(step, row)
        if state is not None and output.token_ids[row] >= 0:
            state.record(int(output.token_ids[row]))
    return output


def _outcome(logits: NDArray[np.float32], step: StepInput, row: int) -> int:
    if not np.isfinite(logits.max()):  # NaN when one of them is
        return NOT_FINITE
    target = int(step.targets[row])
    return target if target >= 0 else sample_row(logits, step, row)


def _state(step: StepInput, row: int) -> SamplingState | None:
    return step.states[row] if step.states and step.targets[row] < 0 else None


def sample_row(logits: NDArray[np.float32], step: StepInput, row: int) -> int:
    """The token drawn from one row of logits, [vocab], or NO_TOKEN, or NOT_FINITE."""
    state = _state(step, row)
    if state is not None:
        state.rewind(int(step.sample_position[row]))
        logits = edit(logits, state)
    if len(step.mask_rows) and step.mask_rows[row] >= 0:
        logits = np.where(unpack_mask(step.masks[step.mask_rows[row]], len(logits)), logits, np.float32(-np.inf))
    largest = logits.max()
    if np.isnan(largest):
        return NOT_FINITE
    if largest == -np.inf:
        return NO_TOKEN
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
        typical_p=1.0 if state is None else state.typical_p,
    )
    sums = np.cumsum(weights[kept])
    draw = philox.uniform(int(step.seed[row]), int(step.sample_position[row]))
    return int(kept[np.searchsorted(sums, draw * sums[-1], side="right")])


def edit(logits: NDArray[np.float32], state: SamplingState) -> NDArray[np.float32]:
    """The logits after bias, penalties and the state's own masks. Does not change its argument."""
    edited = logits.copy()
    for token, bias in state.logit_bias:
        edited[token] += np.float32(bias)
    _penalize(edited, state)
    if state.allowed_token_ids is not None:
        others = np.ones(len(edited), bool)
        others[list(state.allowed_token_ids)] = False
        edited[others] = -np.inf
    generated = list(state.token_ids)[state.num_prompt_tokens :]
    for *before, last in state.bad_words:
        if not before or generated[-len(before) :] == before:
            edited[last] = -np.inf
    if len(generated) < state.min_tokens:
        edited[list(state.stop_token_ids)] = -np.inf
    return edited


def _penalize(logits: NDArray[np.float32], state: SamplingState) -> None:
    ids = np.asarray(state.token_ids, np.int64)
    seen = np.unique(ids)
    repetition = np.float32(state.repetition_penalty)
    if repetition != 1:
        logits[seen] = np.where(logits[seen] > 0, logits[seen] / repetition, logits[seen] * repetition)
    generated, counts = np.unique(ids[state.num_prompt_tokens :], return_counts=True)
    logits[generated] -= np.float32(state.frequency_penalty) * counts.astype(np.float32)
    logits[generated] -= np.float32(state.presence_penalty)


def unpack_mask(mask: NDArray[np.uint32], vocab_size: int) -> NDArray[np.bool_]:
    """The bits of a mask row as truth values, [vocab_size]."""
    ids = np.arange(vocab_size)
    return np.asarray((mask[ids // 32] >> (ids % 32).astype(np.uint32)) & 1, bool)


def by_logit(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """Token ids by (logit descending, id ascending)."""
    return np.argsort(-logits, kind="stable")


def survivors(
    weights: NDArray[np.float64],
    order: NDArray[np.int64],
    *,
    top_k: int,
    top_p: float,
    min_p: float,
    typical_p: float = 1.0,
) -> NDArray[np.int64]:
    """Ids that pass the filters, ascending. `order` lists all ids, the most likely first."""
    kept = order[:top_k] if top_k > 0 else order
    if typical_p < 1.0:
        kept = _typical(weights, kept[weights[kept] > 0], typical_p)
    if top_p < 1.0:
        sums = np.cumsum(weights[kept])
        kept = kept[: int(np.searchsorted(sums, top_p * sums[-1], side="left")) + 1]
    return np.sort(kept[weights[kept] >= min_p * weights[kept].max()])


def _typical(weights: NDArray[np.float64], kept: NDArray[np.int64], typical_p: float) -> NDArray[np.int64]:
    """The survivors of typical_p, in the order they had."""
    probabilities = weights[kept] / weights[kept].sum()
    surprise = -np.log(probabilities)
    entropy = (probabilities * surprise).sum()
    nearest = np.argsort(np.abs(surprise - entropy), kind="stable")
    sums = np.cumsum(weights[kept][nearest])
    count = int(np.searchsorted(sums, typical_p * sums[-1], side="left")) + 1
    return kept[np.sort(nearest[:count])]


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
