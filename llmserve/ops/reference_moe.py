"""Mixture of experts of the reference executor: routing and the experts' feed-forward, one token after another.

`normalize="after_top_k"` makes the chosen weights sum to 1 (Mixtral; Qwen with norm_topk_prob; DeepSeek-V3),
`"before_top_k"` leaves the scores over all experts as they are. A `choice_bias` moves the choice, never the weights.
Groups are ranked by the sum of their two best biased scores when there is a bias (DeepSeek-V3), else by the best (V2).
Equal scores: the lower index wins.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from llmserve.ops import reference_math as math_
from llmserve.ops.protocol import ExpertsSpec, RouterSpec
from llmserve.ops.reference_math import Array
from llmserve.types import CheckpointTensor

Weights = Callable[[CheckpointTensor], Array]


def route(x: Array, router: RouterSpec, weights: Weights) -> tuple[NDArray[np.int64], Array]:
    """Experts of each token and their weights, both [T, top_k]."""
    raw = x @ weights(router.weight).T  # [T, num_experts]
    scores = math_.softmax(raw) if router.scoring == "softmax" else math_.sigmoid(raw)
    choice = scores if router.choice_bias is None else scores + weights(router.choice_bias)
    if router.num_groups > 1:
        choice = np.where(_allowed(choice, router), choice, np.float32(-np.inf))
    chosen = np.argsort(-choice, axis=-1, kind="stable")[:, : router.top_k]
    mixing = np.take_along_axis(scores, chosen, axis=-1)
    if router.normalize == "after_top_k":
        mixing = mixing / mixing.sum(axis=-1, keepdims=True)
    return chosen, mixing * np.float32(router.scaling)


def experts(x: Array, chosen: NDArray[np.int64], mixing: Array, spec: ExpertsSpec, weights: Weights) -> Array:
    """Weighted sum of each token's experts plus the shared ones, [T, hidden]."""
    gate, up, down = weights(spec.gate), weights(spec.up), weights(spec.down)
    y = np.zeros_like(x)
    for token, row in enumerate(x):
        for expert, weight in zip(chosen[token], mixing[token], strict=True):
            inner = math_.act(gate[expert] @ row, spec.act) * (up[expert] @ row)
            y[token] += weight * (down[expert] @ inner)
    if spec.shared is not None:
        everyone = np.tile(np.arange(spec.shared.gate.shape[0]), (len(x), 1))
        shared = experts(x, everyone, np.ones(everyone.shape, np.float32), spec.shared, weights)
        if spec.shared_gate is not None:
            shared = shared * math_.sigmoid(x @ weights(spec.shared_gate).reshape(-1, 1))
        y = y + shared
    return y


def _allowed(choice: Array, router: RouterSpec) -> NDArray[np.bool_]:
    """Experts in the best groups, [T, num_experts]."""
    size = router.num_experts // router.num_groups
    grouped = np.sort(choice.reshape(len(choice), router.num_groups, size), axis=-1)
    ranking = grouped[..., -2:].sum(axis=-1) if router.choice_bias is not None else grouped[..., -1]
    best = np.argsort(-ranking, axis=-1, kind="stable")[:, : router.top_k_groups]
    allowed = np.zeros(ranking.shape, np.bool_)
    np.put_along_axis(allowed, best, True, axis=-1)
    return np.repeat(allowed, size, axis=-1)
