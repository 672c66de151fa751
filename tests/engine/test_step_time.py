"""The model of step times, and the chunks it makes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.engine.step_time import DECODE_FACTOR, MIN_CHUNK_TOKENS, StepTimeModel
from tests.engine.test_engine import make_engine, make_request

DECODE_S, TOKEN_S = 0.010, 0.001


def trained(noise: float, *, outliers: float = 0.0, num_steps: int = 200) -> StepTimeModel:
    """A model that saw decodes of 10 ms and prefill tokens of 1 ms, with noise and steps that were held up."""
    rng = random.Random(5)
    model = StepTimeModel()
    for step in range(num_steps):
        num_chunk_tokens = (step % 2) * rng.randint(16, 200)
        seconds = DECODE_S + TOKEN_S * num_chunk_tokens
        seconds *= 1 + rng.uniform(-noise, noise)
        model.observe(8, num_chunk_tokens, seconds * (30 if rng.random() < outliers else 1))
    return model


@pytest.mark.parametrize(("noise", "outliers"), [(0.0, 0.0), (0.2, 0.0), (0.1, 0.2)])
def test_learns_and_ignores_held_up_steps(noise: float, outliers: float) -> None:
    model = trained(noise, outliers=outliers)
    assert model.decode_s(8) == pytest.approx(DECODE_S, rel=0.25)
    assert model.prefill_token_s == pytest.approx(TOKEN_S, rel=0.25)
    assert model.max_chunk_tokens(0.05, 8) in (32, 48)


def test_follows_a_change_within_a_window() -> None:
    model = trained(0.0)
    for _ in range(12):
        model.observe(8, 100, DECODE_S + 100 * TOKEN_S * 4)
    assert model.prefill_token_s == pytest.approx(4 * TOKEN_S)


def test_decodes_that_got_quicker_do_not_make_prompts_free() -> None:
    """Small chunks beside decodes that take less than they were measured to: the difference would be negative."""
    model = StepTimeModel()
    for _ in range(12):
        model.observe(32, 0, 0.200)
    for _ in range(12):
        model.observe(32, 16, 0.150)
    assert model.prefill_token_s == pytest.approx(0.3 * 0.150 / 48)
    limit = model.max_chunk_tokens(0.050, 32)
    assert limit is not None
    assert limit <= 224


def test_prefill_always_gets_a_share() -> None:
    model = trained(0.0)
    assert model.max_chunk_tokens(0.001, 8) == MIN_CHUNK_TOKENS
    for _ in range(12):
        model.observe(8, 0, 1.0)
    num_tokens = model.max_chunk_tokens(0.001, 8)
    assert num_tokens == pytest.approx((DECODE_FACTOR - 1) * 1.0 / TOKEN_S, abs=MIN_CHUNK_TOKENS)


def test_no_limit_before_anything_is_known() -> None:
    assert StepTimeModel().max_chunk_tokens(0.05, 8) is None


@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 600), st.floats(0, 1e9))),
    st.floats(1e-6, 1e3),
    st.integers(1, 300),
)
def test_estimates_stay_finite(steps: list[tuple[int, int, float]], target_s: float, num_decodes: int) -> None:
    model = StepTimeModel()
    for step in steps:
        model.observe(*step)
    assert 0 <= model.decode_s(num_decodes) <= 1e9
    assert 0 <= model.prefill_token_s <= 1e9
    limit = model.max_chunk_tokens(target_s, num_decodes)
    assert limit is None or limit >= MIN_CHUNK_TOKENS


def test_target_cuts_prompts_beside_decodes_and_not_alone() -> None:
    engine, executor = make_engine(max_num_tokens=128, num_blocks=200, policy={"itl_target_ms": 50.0})
    engine._scheduler.step_times = trained(0.0, num_steps=40)
    engine._scheduler.step_times.observe = lambda *step: None  # type: ignore[method-assign]
    engine.submit(make_request("alone", [1] * 100, max_tokens=20))
    engine.step()
    assert len(executor.steps[-1].token_ids) == 100
    engine.submit(make_request("beside", [2] * 100, max_tokens=20))
    engine.step()
    assert len(executor.steps[-1].token_ids) == 1 + 32
