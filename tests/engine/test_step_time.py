"""The model of step times, and the chunks it makes."""

from __future__ import annotations

import random
from collections import deque

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmserve.engine.step_time import DECODE_FACTOR, MIN_CHUNK_TOKENS, StepTimeModel
from tests.engine.test_engine import make_engine, make_request, run

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
    assert model.prefill_token_s() == pytest.approx(TOKEN_S, rel=0.25)
    assert model.max_chunk_tokens(0.05, 8) in (32, 48)


def test_follows_a_change_within_a_window() -> None:
    model = trained(0.0)
    for _ in range(12):
        model.observe(8, 100, DECODE_S + 100 * TOKEN_S * 4)
    assert model.prefill_token_s() == pytest.approx(4 * TOKEN_S)


def test_decodes_that_got_quicker_do_not_make_prompts_free() -> None:
    """Small chunks beside decodes that take less than they were measured to: the difference would be negative."""
    model = StepTimeModel()
    for _ in range(12):
        model.observe(32, 0, 0.200)
    for _ in range(12):
        model.observe(32, 16, 0.150)
    assert model.prefill_token_s() == pytest.approx(0.3 * 0.150 / 48)
    limit = model.max_chunk_tokens(0.050, 32)
    assert limit is not None
    assert limit <= 224


def test_prefill_always_gets_a_share() -> None:
    model = trained(0.0)
    assert model.max_chunk_tokens(0.001, 8) == MIN_CHUNK_TOKENS
    for _ in range(12):
        model.observe(8, 0, 1.0)
    model.observe(8, 1000, DECODE_S + 1000 * TOKEN_S)  # a chunk from which it may grow so far
    num_tokens = model.max_chunk_tokens(0.001, 8)
    assert num_tokens == pytest.approx((DECODE_FACTOR - 1) * 1.0 / TOKEN_S, abs=MIN_CHUNK_TOKENS)


def test_no_limit_before_anything_is_known() -> None:
    assert StepTimeModel().max_chunk_tokens(0.05, 8) is None


@given(
    st.lists(st.tuples(st.integers(0, 300), st.integers(0, 600), st.floats(0, 1e9))),
    st.floats(1e-6, 1e3),
    st.integers(1, 300),
    st.integers(0, 10**6),
)
def test_estimates_stay_finite(
    steps: list[tuple[int, int, float]], target_s: float, num_decodes: int, context: int
) -> None:
    model = StepTimeModel()
    for number, step in enumerate(steps):
        model.observe(*step, context=number * 97 % 5000)
    assert 0 <= model.decode_s(num_decodes) <= 1e9
    assert 0 <= model.prefill_token_s(context) <= 1e9
    limit = model.max_chunk_tokens(target_s, num_decodes, context)
    assert limit is None or limit >= MIN_CHUNK_TOKENS


def long_prompts(model: StepTimeModel, *, num_tokens: int, num_prompts: int) -> list[list[float]]:
    """Seconds of the steps, by prompt, in which long prompts come beside 32 decodes. Measured on two cores:

    34 ms of decodes, and for a prefill token 0.62 ms and 0.5 µs for each token before it; small chunks are cheaper.
    """
    for _ in range(20):
        model.observe(32, 0, 0.034)
    model.observe(32, 16, 0.040)
    taken_s: list[list[float]] = []
    for _ in range(num_prompts):
        start = 0
        taken_s.append([])
        while start < num_tokens:
            size = min(model.max_chunk_tokens(0.068, 32, start) or num_tokens, num_tokens - start)
            context = start + size // 2
            seconds = 0.034 + size * ((0.62 if size > 32 else 0.40) + 0.0005 * context) / 1000
            model.observe(32, size, seconds, context=context)
            taken_s[-1].append(seconds)
            start += size
    return taken_s


def test_every_step_of_long_prompts_is_near_the_target() -> None:
    """Also where the last prompt's end, far dearer than the next one's begin, was what it learned from."""
    first, *others = long_prompts(StepTimeModel(), num_tokens=4000, num_prompts=4)
    assert max(first) < 1.25 * 0.068
    for taken_s in others:
        assert max(taken_s) < 1.2 * 0.068
        assert sum(taken_s) / len(taken_s) > 0.85 * 0.068, "it must not be timid either"


def test_what_was_learned_at_the_end_of_a_prompt_does_not_slow_the_next() -> None:
    model = StepTimeModel()
    long_prompts(model, num_tokens=4000, num_prompts=1)
    end, begin = model.max_chunk_tokens(0.068, 32, 4000), model.max_chunk_tokens(0.068, 32, 0)
    assert end == MIN_CHUNK_TOKENS
    assert begin is not None
    assert begin >= 2 * MIN_CHUNK_TOKENS


def test_chunks_grow_at_most_twofold() -> None:
    """Sixteen tokens may take hardly any time beside decodes; a hundred do not."""
    model = StepTimeModel()
    model.observe(32, 0, 0.034)
    for _ in range(12):
        model.observe(32, 16, 0.035)
    assert model.max_chunk_tokens(0.068, 32) == 32


def test_cached_prefixes_count_as_context() -> None:
    engine, executor = make_engine(
        max_num_tokens=128, num_blocks=200, max_model_len=400, policy={"itl_target_ms": 50.0}
    )
    times = engine._scheduler.step_times
    prompt = [3] * 100
    engine.submit(make_request("first", prompt, max_tokens=1))
    run(engine)
    for context, token_s in ((0, TOKEN_S / 2), (100, TOKEN_S)):
        times._tokens._values[context.bit_length()] = deque([token_s])
    times._decodes._values[1] = deque([DECODE_S])
    times._tokens._medians.clear()
    times._decodes._medians.clear()
    times.observe = lambda *step, **more: None  # type: ignore[method-assign]
    times._last_chunk_tokens = 100
    engine.submit(make_request("beside", [5], max_tokens=50))
    engine.step()
    engine.submit(make_request("hit", [*prompt, *[4] * 90], max_tokens=1))
    engine.step()
    assert len(executor.steps[-1].token_ids) == 1 + 32
    engine.submit(make_request("fresh", [6] * 90, max_tokens=1))
    num_before = len(executor.steps)
    run(engine)
    assert max(len(step.token_ids) for step in executor.steps[num_before:]) >= 1 + 64


def test_target_cuts_prompts_beside_decodes_and_not_alone() -> None:
    engine, executor = make_engine(max_num_tokens=128, num_blocks=200, policy={"itl_target_ms": 50.0})
    engine._scheduler.step_times = trained(0.0, num_steps=40)
    engine._scheduler.step_times.observe = lambda *step, **more: None  # type: ignore[method-assign]
    engine.submit(make_request("alone", [1] * 100, max_tokens=20))
    engine.step()
    assert len(executor.steps[-1].token_ids) == 100
    engine.submit(make_request("beside", [2] * 100, max_tokens=20))
    engine.step()
    assert len(executor.steps[-1].token_ids) == 1 + 32
