"""States and masks: the compiled sampler against its definition, each parameter by hand, planted mistakes, and what a
failed or repeated step leaves behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import numpy as np
import pytest

from llmserve import _C
from llmserve.ops import reference_sampler
from llmserve.ops.protocol import NO_TOKEN
from tests.ops.running import available_isas
from tests.ops.sampling_state_twin import SamplingStateTwin
from tests.ops.sampling_states import (
    NUM_STEPS,
    Logits,
    Options,
    make_states,
    random_options,
    run_rows,
    sample_both,
)
from tests.ops.seeds import fresh_seed
from tests.ops.test_sampler import Filters, compiled_sample, make_rows


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("vocab", [6, 33, 400])
def test_random_combinations_agree_with_the_definition(vocab: int, isa: str) -> None:
    seed = fresh_seed()
    draws = np.random.default_rng(seed)
    num_rows = 250
    options = [random_options(draws, vocab) for _ in range(num_rows)]
    num_different, num_wrong = run_rows(options, vocab=vocab, seed=seed, isa=isa)
    assert num_wrong == 0, f"{num_wrong} outcomes are not those of the definition, seed={seed}"
    assert num_different <= 6, f"{num_different} of {num_rows * NUM_STEPS} draws near a boundary, seed={seed}"


# --- one parameter at a time, by hand ---------------------------------------------------------------------------------


def outcome(logits: Sequence[float], prompt: list[int], generated: Sequence[int], **options: Any) -> int:
    """The greedy token, which both samplers must agree on."""
    row = np.array([logits], np.float32)
    states, twins = make_states([options], len(logits), [prompt])
    for token in generated:
        states[0].record(token)
        cast(SamplingStateTwin, twins[0]).record(token)
    step = make_rows(1, Filters(temperature=0.0))
    step.states, step.sample_position[0] = states, len(prompt) + len(generated)
    expected, found = sample_both(row, step, twins)
    assert found.token_ids.tolist() == expected.token_ids.tolist()
    return int(found.token_ids[0])


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_prompt_and_output() -> None:
    assert outcome([3, 2, 0], [0], [], repetition_penalty=1.4) == 0
    assert outcome([3, 2, 0], [0], [], repetition_penalty=1.6) == 1
    assert outcome([3, 2, 0], [2], [0], repetition_penalty=1.6) == 1
    assert outcome([-2, -3, -9], [0], [], repetition_penalty=1.6) == 1
    assert outcome([3, 2, 0], [0, 0, 0], [0, 0], repetition_penalty=1.4) == 0, "once, however often it was seen"
    assert outcome([3, 2.9, 0], [1], [], repetition_penalty=0.9) == 1


def test_frequency_penalty_grows_with_the_count_of_generated_tokens_alone() -> None:
    assert outcome([3, 2, 0], [0, 0, 0, 0], [], frequency_penalty=0.6) == 0
    assert outcome([3, 2, 0], [2], [0], frequency_penalty=0.6) == 0
    assert outcome([3, 2, 0], [2], [0, 0], frequency_penalty=0.6) == 1
    assert outcome([3, 2, 0], [2], [1, 1, 1], frequency_penalty=-0.6) == 1


def test_presence_penalty_is_taken_once_for_generated_tokens_alone() -> None:
    assert outcome([3, 2, 0], [0, 0], [], presence_penalty=1.5) == 0
    assert outcome([3, 2, 0], [2], [0], presence_penalty=1.5) == 1
    assert outcome([3, 2, 0], [2], [0, 0, 0, 0], presence_penalty=0.9) == 0


def test_logit_bias_comes_before_the_penalties() -> None:
    assert outcome([3, 2, 0], [1], [], logit_bias=[(2, 3.5)]) == 2
    assert outcome([3, 2, 0], [1], [], logit_bias=[(0, -100)]) == 1
    # (-1 + 5) / 2 = 2 loses; -1 * 2 + 5 = 3 would win.
    assert outcome([2.5, -1], [1], [], logit_bias=[(1, 5)], repetition_penalty=2) == 0


def test_min_tokens_holds_back_stop_tokens_until_so_many_were_generated() -> None:
    options: Options = {"min_tokens": 2, "stop_token_ids": [0]}
    assert [outcome([3, 2, 0], [1, 1, 1], [1] * num, **options) for num in range(4)] == [1, 1, 0, 0]


def test_bad_words_are_not_completed() -> None:
    assert outcome([3, 2, 0], [1], [], bad_words=[[0]]) == 1
    options: Options = {"bad_words": [[2, 1, 0]]}
    assert outcome([3, 2, 0], [1], [2, 1], **options) == 1
    assert outcome([3, 2, 0], [1], [1, 2], **options) == 0
    assert outcome([3, 2, 0], [1], [1], **options) == 0, "shorter than the word"
    assert outcome([3, 2, 0], [2, 1], [], **options) == 0, "what the prompt began is not counted"


def test_allowed_token_ids_are_the_only_ones() -> None:
    assert outcome([3, 2, 0], [1], [], allowed_token_ids=[2]) == 2
    assert outcome([3, 2, 0], [1], [], allowed_token_ids=[2, 1]) == 1


def test_no_token_left_is_no_token() -> None:
    assert outcome([3, 2, 0], [1], [], allowed_token_ids=[1], bad_words=[[1]]) == NO_TOKEN
    assert outcome([3, 2, 0], [1], [], allowed_token_ids=[0], stop_token_ids=[0], min_tokens=1) == NO_TOKEN


def test_typical_p_keeps_the_tokens_nearest_the_entropy() -> None:
    probabilities = np.array([0.4, *[0.1] * 6])  # H = 1.75; surprises 0.92 and 2.30
    weights = probabilities / probabilities.max()
    order = np.argsort(-weights, kind="stable")
    for typical_p, expected in ((0.35, [1, 2, 3, 4]), (0.45, [1, 2, 3, 4, 5]), (0.65, [0, 1, 2, 3, 4, 5, 6])):
        kept = reference_sampler.survivors(weights, order, top_k=0, top_p=1, min_p=0, typical_p=typical_p)
        assert kept.tolist() == expected
    rows = np.tile(np.log(probabilities).astype(np.float32), (500, 1))
    step = make_rows(500, Filters(), seed=1)
    step.states = [_C.SamplingState([0], vocab_size=7, typical_p=0.35) for _ in range(500)]
    step.sample_position[:] = 1
    assert set(compiled_sample(rows, step).token_ids.tolist()) == {1, 2, 3, 4}


def test_min_p_is_relative_to_the_most_likely_that_typical_p_left() -> None:
    weights, order = np.array([1.0, *[0.25] * 6]), np.arange(7)
    kept = reference_sampler.survivors(weights, order, top_k=0, top_p=1, min_p=0.9, typical_p=0.25)
    assert kept.tolist() == [1, 2, 3]


# --- planted mistakes -------------------------------------------------------------------------------------------------


def altered(**change: Callable[[SamplingStateTwin], Any]) -> Callable[[Logits, SamplingStateTwin], Logits]:
    """The definition over a state that is wrong in one way."""
    right = reference_sampler.edit

    def edit(logits: Logits, state: SamplingStateTwin) -> Logits:
        return right(logits, dataclasses.replace(state, **{name: make(state) for name, make in change.items()}))

    return edit


without_bias = altered(logit_bias=lambda _: ())


def biased_last(logits: Logits, state: SamplingStateTwin) -> Logits:
    edited = without_bias(logits, state)
    for token, bias in state.logit_bias:
        edited[token] += np.float32(bias)
    return edited


def generated_of(state: SamplingStateTwin) -> list[int]:
    return state.token_ids[state.num_prompt_tokens :]


# Eight draws from three tokens repeat some of them in every row: counts above one are what tells these mistakes apart.
FEW: Final[Options] = {"allowed_token_ids": [1, 5, 7]}

MISTAKES: Final[dict[str, tuple[Options, Callable[[Logits, SamplingStateTwin], Logits]]]] = {
    "repetition over the output alone": (
        {"repetition_penalty": 2.0}, altered(token_ids=generated_of, num_prompt_tokens=lambda _: 0)),
    "repetition over the prompt alone": (
        {"repetition_penalty": 2.0}, altered(token_ids=lambda s: s.token_ids[: s.num_prompt_tokens])),
    "repetition upside down": ({"repetition_penalty": 2.0}, altered(repetition_penalty=lambda s: 0.5)),
    "frequency over the prompt too": ({"frequency_penalty": 1.5}, altered(num_prompt_tokens=lambda _: 0)),
    "frequency taken once": (
        {"frequency_penalty": 1.5, **FEW},
        altered(presence_penalty=lambda s: s.frequency_penalty, frequency_penalty=lambda _: 0.0)),
    "frequency one too many": (
        {"frequency_penalty": 1.5}, altered(presence_penalty=lambda s: s.frequency_penalty)),
    "presence over the prompt too": ({"presence_penalty": 1.5}, altered(num_prompt_tokens=lambda _: 0)),
    "presence for each time": (
        {"presence_penalty": 1.5, **FEW},
        altered(frequency_penalty=lambda s: s.presence_penalty, presence_penalty=lambda _: 0.0)),
    "bias after the penalties": (
        {"repetition_penalty": 3.0, "logit_bias": [(token, 6.0) for token in range(0, 12, 3)]}, biased_last),
    "bias of the wrong sign": (
        {"logit_bias": [(3, 4.0)]}, altered(logit_bias=lambda s: [(token, -bias) for token, bias in s.logit_bias])),
    "min_tokens one too late": (
        {"min_tokens": 3, "stop_token_ids": list(range(6))}, altered(min_tokens=lambda s: s.min_tokens + 1)),
    "min_tokens one too early": (
        {"min_tokens": 3, "stop_token_ids": list(range(6))}, altered(min_tokens=lambda s: s.min_tokens - 1)),
    "min_tokens counts the prompt": (
        {"min_tokens": 6, "stop_token_ids": list(range(6))}, altered(token_ids=generated_of)),
    "bad words without their beginning": (
        {"bad_words": [[1, 2], [3, 4]]}, altered(bad_words=lambda s: [word[-1:] for word in s.bad_words])),
    "bad words of one token only": (
        {"bad_words": [[a, b] for a in range(6) for b in range(6)]},
        altered(bad_words=lambda s: [word for word in s.bad_words if len(word) == 1])),
    "bad words begun by the prompt": (
        {"bad_words": [[a, b] for a in range(12) for b in range(6)]}, altered(num_prompt_tokens=lambda _: 0)),
    "every token allowed": (FEW, altered(allowed_token_ids=lambda _: None)),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_planted_mistake_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options, mistaken = MISTAKES[name]
    seed = fresh_seed()
    assert run_rows([options] * 60, vocab=12, seed=seed, greedy=True) == (0, 0), f"seed={seed}"
    monkeypatch.setattr(reference_sampler, "edit", mistaken)
    num_different, _ = run_rows([options] * 60, vocab=12, seed=seed, greedy=True)
    assert num_different > 0, f"seed={seed}"


# --- masks ------------------------------------------------------------------------------------------------------------
