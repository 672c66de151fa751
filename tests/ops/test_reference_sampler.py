"""The reference sampler against its definition, by hand-made cases and by frequency."""

from __future__ import annotations

import math

import numpy as np
import pytest

from llmserve.ops.protocol import StepInput
from llmserve.ops.reference_sampler import by_logit, sample_step, survivors
from tests.ops.running import Piece, make_step

LOGITS = np.log(np.array([0.1, 0.4, 0.1, 0.05, 0.35], np.float32))


def kept(*, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0) -> list[int]:
    weights = np.exp(LOGITS.astype(np.float64) - LOGITS.max())
    return [int(token) for token in survivors(weights, by_logit(LOGITS), top_k=top_k, top_p=top_p, min_p=min_p)]


def step_of(num_rows: int, *, num_logprobs: int = -1) -> StepInput:
    return make_step([Piece(0, [0] * num_rows, 0)], num_logprobs=num_logprobs)


def test_order_is_by_logit_then_id() -> None:
    assert by_logit(LOGITS).tolist() == [1, 4, 0, 2, 3]


@pytest.mark.parametrize(("top_k", "expected"), [(0, [0, 1, 2, 3, 4]), (1, [1]), (3, [0, 1, 4]), (9, [0, 1, 2, 3, 4])])
def test_top_k_keeps_exactly_k_and_breaks_ties_by_id(top_k: int, expected: list[int]) -> None:
    assert kept(top_k=top_k) == expected


@pytest.mark.parametrize(
    ("top_p", "expected"), [(1e-9, [1]), (0.39, [1]), (0.41, [1, 4]), (0.8, [0, 1, 4]), (0.96, [0, 1, 2, 3, 4])]
)
def test_top_p_keeps_the_shortest_prefix_that_reaches_it(top_p: float, expected: list[int]) -> None:
    assert kept(top_p=top_p) == expected


def test_top_p_counts_only_what_top_k_kept() -> None:
    assert kept(top_k=2, top_p=0.5) == [1]
    assert kept(top_p=0.5) == [1, 4]


@pytest.mark.parametrize(
    ("min_p", "expected"), [(0.0, [0, 1, 2, 3, 4]), (0.2, [0, 1, 2, 4]), (0.5, [1, 4]), (1.0, [1])]
)
def test_min_p_is_relative_to_the_most_likely(min_p: float, expected: list[int]) -> None:
    assert kept(min_p=min_p) == expected


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = np.array([[0, 3, 3, 1]], np.float32)
    assert sample_step(logits, step_of(1)).token_ids.tolist() == [1]


def test_draws_follow_the_distribution_after_temperature() -> None:
    num_rows = 20000
    step = step_of(num_rows)
    step.temperature[:] = 0.5
    step.seed[:] = 7
    tokens = sample_step(np.tile(LOGITS, (num_rows, 1)), step).token_ids
    expected = np.exp(2 * LOGITS) / np.exp(2 * LOGITS).sum()
    np.testing.assert_allclose(np.bincount(tokens, minlength=5) / num_rows, expected, atol=0.012)


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    rows = np.random.default_rng(3).normal(size=(64, 50)).astype(np.float32)
    step = step_of(64)
    step.temperature[:], step.seed[:] = 1.0, np.arange(64) // 8
    tokens = sample_step(rows, step).token_ids
    reverse = step_of(64)
    reverse.temperature[:], reverse.seed[:], reverse.sample_position[:] = (
        1.0,
        step.seed[::-1],
        step.sample_position[::-1],
    )
    assert sample_step(rows[::-1], reverse).token_ids.tolist() == tokens[::-1].tolist()


def test_logprobs_ranks_and_top_tokens_are_of_the_raw_logits() -> None:
    step = step_of(2, num_logprobs=2)
    step.temperature[:], step.top_k[:] = 2.0, 1
    step.targets[:] = [2, -1]
    step.num_logprobs[1] = -1
    output = sample_step(np.tile(LOGITS, (2, 1)) + np.float32(5), step)
    assert output.token_ids.tolist() == [2, 1]
    assert output.ranks.tolist() == [3, 0]
    assert output.logprobs[0] == pytest.approx(math.log(0.1), abs=1e-6)
    assert output.top_ids.tolist() == [[1, 4], [-1, -1]]
    assert output.top_logprobs[0] == pytest.approx([math.log(0.4), math.log(0.35)], abs=1e-6)
    assert math.isnan(output.logprobs[1])
    assert np.isnan(output.top_logprobs[1]).all()


def test_a_vanishing_temperature_is_greedy_and_finite() -> None:
    step = step_of(1)
    step.temperature[:] = 1e-6
    assert sample_step(LOGITS[None], step).token_ids.tolist() == [1]
