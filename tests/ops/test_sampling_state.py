"""States and masks: the compiled sampler against its definition, each parameter by hand, planted mistakes, and what a
failed or repeated step leaves behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from llmserve import _C
from llmserve.ops import philox, reference_sampler
from llmserve.ops.protocol import NO_TOKEN, SamplingState, StepInput, StepOutput
from tests.ops.op_running import available_isas
from tests.ops.sampling_state_twin import SamplingStateTwin
from tests.ops.seeds import fresh_seed
from tests.ops.test_sampler import F32, NEAR, Filters, compiled_sample, make_rows, random_logits

Logits = NDArray[np.float32]
Options = dict[str, Any]
Twins = list[SamplingStateTwin | None]
NUM_STEPS: Final = 8


def sample_both(logits: Logits, step: StepInput, twins: Twins, *, isa: str = "") -> tuple[StepOutput, StepOutput]:
    """One step in the definition over `twins`, and in the extension over the step's own states."""
    states, step.states = step.states, cast("Sequence[SamplingState | None]", twins)
    expected = reference_sampler.sample_step(logits, step)
    step.states = states
    return expected, compiled_sample(logits, step, isa=isa)


def make_state(prompt: list[int], options: Options) -> _C.SamplingState:
    return _C.SamplingState(prompt, **options)


def make_states(options: Sequence[Options | None], vocab: int, prompts: list[list[int]]) -> tuple[list[Any], Twins]:
    pairs = [
        (None, None) if own is None else (_C.SamplingState(prompt, vocab_size=vocab, **own),
                                          SamplingStateTwin.of(prompt, vocab_size=vocab, **own))
        for own, prompt in zip(options, prompts, strict=True)
    ]  # fmt: skip
    return [state for state, _ in pairs], [twin for _, twin in pairs]


def random_options(draws: np.random.Generator, vocab: int) -> Options | None:
    """Any parameter with probability 1/2; one row in eight has no state."""
    if draws.random() < 1 / 8:
        return None

    def ids(num: int) -> list[int]:
        return [int(token) for token in draws.integers(0, vocab, num)]

    every: Options = {
        "repetition_penalty": float(draws.choice([0.5, 1.1, 1.5, 3.0])),
        "frequency_penalty": float(draws.uniform(-2, 2)),
        "presence_penalty": float(draws.uniform(-2, 2)),
        "logit_bias": [(token, float(draws.uniform(-5, 5))) for token in ids(5)],
        "min_tokens": int(draws.integers(0, 6)),
        "stop_token_ids": ids(vocab // 3),
        "bad_words": [ids(num) for num in (1, 1, 2, 2, 3)],
        "allowed_token_ids": ids(max(3, vocab // 2)),
        "typical_p": float(draws.uniform(0.1, 1)),
    }
    return {name: value for name, value in every.items() if draws.random() < 0.5}


def random_filters(draws: np.random.Generator, step: StepInput) -> None:
    num_rows = len(step.logit_rows)
    step.temperature[:] = draws.choice([0, 0.5, 1, 1.5], num_rows)
    step.top_k[:] = draws.choice([0, 0, 7, 30], num_rows)
    step.top_p[:] = draws.choice([1, 0.9, 0.5], num_rows)
    step.min_p[:] = draws.choice([0, 0, 0.05], num_rows)


def nearly_drawn(logits: Logits, step: StepInput, row: int, twin: SamplingStateTwin | None) -> set[int]:
    """Tokens that the definition draws from edited logits when its draw and thresholds move by less than NEAR."""
    weights = np.exp((logits.astype(np.float64) - logits.max()) / float(step.temperature[row]))
    order = reference_sampler.by_logit(logits)
    draw = philox.uniform(int(step.seed[row]), int(step.sample_position[row]))
    top_p, min_p = float(step.top_p[row]), float(step.min_p[row])
    typical_p = 1.0 if twin is None else twin.typical_p
    found = set()
    for move in (-NEAR, 0.0, NEAR):
        for typical_move in (-NEAR, 0.0, NEAR):
            for min_move in (-NEAR, NEAR):
                kept = reference_sampler.survivors(
                    weights, order, top_k=int(step.top_k[row]), top_p=min(1.0, top_p + move),
                    min_p=min_p * (1 + min_move), typical_p=min(1.0, typical_p + typical_move),
                )  # fmt: skip
                sums = np.cumsum(weights[kept])
                for u in (draw - NEAR, draw, draw + NEAR):
                    index = int(np.searchsorted(sums, u * sums[-1], side="right"))
                    found.add(int(kept[min(index, len(kept) - 1)]))
    return found


def run_rows(
    options: Sequence[Options | None], *, vocab: int, seed: int, isa: str = "", greedy: bool = False
) -> tuple[int, int]:
    """Decode a few tokens of every row in both. Returns how many outcomes differ, and how many differ by more than
    rounding explains. Where they differ, the definition goes on with the extension's token."""
    draws = np.random.default_rng(seed)
    num_rows = len(options)
    prompts = [draws.integers(0, vocab, draws.integers(1, 9)).tolist() for _ in options]
    states, twins = make_states(options, vocab, prompts)
    step = make_rows(num_rows, Filters(temperature=0.0), seed=seed)
    if not greedy:
        random_filters(draws, step)
    num_different = num_wrong = 0
    for offset in range(NUM_STEPS):
        logits = random_logits(seed + offset, num_rows, vocab)
        step.states = states
        step.sample_position[:] = [len(prompt) + offset for prompt in prompts]
        expected, found = sample_both(logits, step, twins, isa=isa)
        for row in np.flatnonzero(found.token_ids != expected.token_ids).tolist():
            twin = twins[row]
            num_different += 1
            if twin is not None:
                twin.rewind(int(step.sample_position[row]))
            edited = logits[row] if twin is None else reference_sampler.edit(logits[row], twin)
            drawn = step.temperature[row] > 0 and expected.token_ids[row] != NO_TOKEN
            near = nearly_drawn(edited, step, row, twin) if drawn else set()
            num_wrong += int(found.token_ids[row]) not in near
            if twin is not None:
                twin.record(int(found.token_ids[row]))
        for index, token in enumerate(found.token_ids.tolist()):
            if token == NO_TOKEN:  # the engine ends such a sequence
                states[index] = twins[index] = None
    for state, twin in zip(states, twins, strict=True):
        assert twin is None or state.token_ids == twin.token_ids, f"seed={seed}"
    return num_different, num_wrong


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


MISTAKES: Final[dict[str, tuple[Options, Callable[[Logits, SamplingStateTwin], Logits]]]] = {
    "repetition over the output alone": (
        {"repetition_penalty": 2.0}, altered(token_ids=generated_of, num_prompt_tokens=lambda _: 0)),
    "repetition over the prompt alone": (
        {"repetition_penalty": 2.0}, altered(token_ids=lambda s: s.token_ids[: s.num_prompt_tokens])),
    "repetition upside down": ({"repetition_penalty": 2.0}, altered(repetition_penalty=lambda s: 0.5)),
    "frequency over the prompt too": ({"frequency_penalty": 1.5}, altered(num_prompt_tokens=lambda _: 0)),
    "frequency taken once": (
        {"frequency_penalty": 1.5},
        altered(presence_penalty=lambda s: s.frequency_penalty, frequency_penalty=lambda _: 0.0)),
    "frequency one too many": (
        {"frequency_penalty": 1.5}, altered(presence_penalty=lambda s: s.frequency_penalty)),
    "presence over the prompt too": ({"presence_penalty": 1.5}, altered(num_prompt_tokens=lambda _: 0)),
    "presence for each time": (
        {"presence_penalty": 1.5},
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
    "every token allowed": ({"allowed_token_ids": [1, 5, 7]}, altered(allowed_token_ids=lambda _: None)),
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


def pack_mask(allowed: NDArray[np.bool_]) -> NDArray[np.uint32]:
    words = np.zeros(-(-len(allowed) // 32) * 32, np.uint8)
    words[: len(allowed)] = allowed
    return np.packbits(words, bitorder="little").view(np.uint32)


@pytest.mark.parametrize("vocab", [31, 32, 33, 500])
def test_masks_of_a_step(vocab: int) -> None:
    seed, num_rows = fresh_seed(), 200
    draws = np.random.default_rng(seed)
    allowed = draws.random((5, vocab)) < np.array([0.05, 0.5, 0.95, 0, 1])[:, None]
    step = make_rows(num_rows, Filters(temperature=0.7, top_p=0.9), seed=seed)
    step.temperature[::2] = 0
    step.masks = np.stack([pack_mask(row) for row in allowed])
    step.mask_rows = draws.integers(-1, 5, num_rows).astype(np.int32)
    options = [{"repetition_penalty": 1.3, "bad_words": [[1]]} if row % 3 == 0 else None for row in range(num_rows)]
    states, twins = make_states(options, vocab, [[row % vocab] for row in range(num_rows)])
    step.states, step.sample_position[:] = states, 1
    expected, found = sample_both(random_logits(seed, num_rows, vocab), step, twins)
    assert int((found.token_ids != expected.token_ids).sum()) <= 2, f"seed={seed}"
    for token, mask in zip(found.token_ids.tolist(), step.mask_rows.tolist(), strict=True):
        assert mask == -1 or token == NO_TOKEN or allowed[mask, token], f"seed={seed}"
        assert mask != 3 or token == NO_TOKEN, f"seed={seed}"


def test_masks_and_states_that_do_not_fit_are_refused() -> None:
    logits = random_logits(1, 2, 40)
    for rows, masks in (([0, 0], (1, 3)), ([0, 1], (1, 2)), ([0, -2], (1, 2)), ([0], (1, 2))):
        step = make_rows(2, Filters())
        step.mask_rows, step.masks = np.array(rows, np.int32), np.zeros(masks, np.uint32)
        with pytest.raises(ValueError, match="mask"):
            compiled_sample(logits, step)
    for states in ([None], [None, _C.SamplingState([0], vocab_size=41)]):
        step = make_rows(2, Filters())
        step.states = states
        with pytest.raises(ValueError, match="states"):
            compiled_sample(logits, step)


# --- what a step leaves behind ----------------------------------------------------------------------------------------


def one_row(state: _C.SamplingState, position: int, *, target: int = -1) -> StepInput:
    step = make_rows(1, Filters(temperature=0.0), num_logprobs=0, targets=[target])
    step.states, step.sample_position[0] = [state], position
    return step


def test_a_position_sampled_again_counts_once() -> None:
    state = _C.SamplingState([4, 4], vocab_size=8, frequency_penalty=1.0)
    logits = np.array([[9, 7.5, 0, 0, 0, 0, 0, 0]], np.float32)
    for _ in range(3):
        assert compiled_sample(logits, one_row(state, 2)).token_ids.tolist() == [0]
        assert state.token_ids == [4, 4, 0]
    assert compiled_sample(logits, one_row(state, 3)).token_ids.tolist() == [0], "9 - 1 > 7.5"
    assert compiled_sample(logits, one_row(state, 4)).token_ids.tolist() == [1], "9 - 2 < 7.5"
    state.rewind(3)
    assert state.token_ids == [4, 4, 0]
    assert compiled_sample(logits, one_row(state, 3)).token_ids.tolist() == [0]


def test_a_gap_is_refused() -> None:
    state = _C.SamplingState([4, 4], vocab_size=8)
    for position in (1, 3):
        with pytest.raises(ValueError, match="states"):
            compiled_sample(np.zeros((1, 8), np.float32), one_row(state, position))
    assert state.token_ids == [4, 4]


def test_a_scored_row_neither_uses_nor_changes_its_state() -> None:
    state = _C.SamplingState([4, 4], vocab_size=8, allowed_token_ids=[1])
    found = compiled_sample(np.zeros((1, 8), np.float32), one_row(state, 0, target=3))
    assert (found.token_ids.tolist(), state.token_ids) == ([3], [4, 4])
    assert found.logprobs[0] == pytest.approx(-np.log(8))


def test_raw_logprobs_are_not_those_of_the_edited_logits() -> None:
    state = _C.SamplingState([0], vocab_size=8, logit_bias=[(5, 100.0)], bad_words=[[7]])
    step = one_row(state, 1)
    step.num_logprobs[0] = 8
    found = compiled_sample(np.zeros((1, 8), np.float32), step)
    assert found.token_ids.tolist() == [5]
    np.testing.assert_allclose(found.top_logprobs, -np.log(8), rtol=1e-6)
    assert found.top_ids.tolist() == [list(range(8))]


def sampling_only(vocab: int) -> tuple[_C.Program, _C.BlockPool]:
    """A program whose only node samples, from logits that are zero."""
    program = _C.Program("", 1, max_num_tokens=4, max_num_seqs=1, max_logit_rows=4, max_position=16)
    program.reserve_arena(_C.value_bytes(4, vocab, F32))
    program.add_sample(program.add_value("logits", vocab, F32, 0))
    program.allocate_kv(1, 1, 1, 16)
    return program, _C.BlockPool(1, 16)


def run_one(program: _C.Program, pool: _C.BlockPool, step: StepInput) -> tuple[bool, int]:
    handle = pool.create()
    assert pool.reserve([handle], [1]) == 1
    step.block_tables[:] = handle
    token, floats, top = np.full(1, -7, np.int32), np.empty(1, np.float32), np.empty((1, 0), np.int32)
    try:
        finished = program.run(
            pool, step.token_ids, step.positions, step.query_start, step.seq_lens, step.block_tables, step.logit_rows,
            step.targets, step.temperature, step.top_k, step.top_p, step.min_p, step.seed, step.sample_position,
            step.num_logprobs, token, floats, np.empty(1, np.int32), top, top.astype(np.float32),
            states=cast("list[_C.SamplingState | None]", step.states),
        )  # fmt: skip
    finally:
        pool.release(handle)
    return finished, int(token[0])


def test_an_aborted_step_records_nothing(tmp_path: Path) -> None:
    program, pool = sampling_only(8)
    cell = _C.ProgressCell(str(tmp_path / "cell"), True)
    program.attach_progress(cell)
    state = _C.SamplingState([3], vocab_size=8, bad_words=[[0]])
    cell.abort = True
    assert run_one(program, pool, one_row(state, 1)) == (False, -7), "the abort is seen before the row is sampled"
    assert state.token_ids == [3]
    cell.abort = False
    assert run_one(program, pool, one_row(state, 1)) == (True, 1)
    assert state.token_ids == [3, 1]


def test_a_step_that_is_refused_records_nothing() -> None:
    program, pool = sampling_only(8)
    state = _C.SamplingState([3], vocab_size=8, bad_words=[[0]])
    step = one_row(state, 1)
    step.positions[:] = 1
    with pytest.raises(ValueError, match="positions"):
        run_one(program, pool, step)
    assert state.token_ids == [3]


@pytest.mark.parametrize("isa", available_isas())
def test_a_row_does_not_depend_on_the_others(isa: str) -> None:
    seed, vocab, num_rows = fresh_seed(), 500, 40
    draws = np.random.default_rng(seed)
    options = [random_options(draws, vocab) for _ in range(num_rows)]
    prompts = [[row, row + 1] for row in range(num_rows)]
    logits, step = random_logits(seed, num_rows, vocab), make_rows(num_rows, Filters(), seed=seed, num_logprobs=5)
    random_filters(draws, step)
    step.states, step.sample_position[:] = make_states(options, vocab, prompts)[0], 2
    together = compiled_sample(logits, step, isa=isa)
    for row in range(num_rows):
        alone = make_rows(1, Filters(), num_logprobs=5)
        for name in ("temperature", "top_k", "top_p", "min_p", "seed", "sample_position"):
            getattr(alone, name)[0] = getattr(step, name)[row]
        alone.states = make_states(options[row : row + 1], vocab, prompts[row : row + 1])[0]
        found = compiled_sample(logits[row : row + 1], alone, isa=isa)
        assert found.token_ids[0] == together.token_ids[row], f"row {row} seed={seed}"
        assert found.logprobs.view(np.uint32)[0] == together.logprobs.view(np.uint32)[row], f"row {row} seed={seed}"


@pytest.mark.parametrize(
    ("prompt", "options", "named"),
    [
        ([8], {}, "prompt_token_ids"),
        ([-1], {}, "prompt_token_ids"),
        ([0], {"vocab_size": 0}, "vocab_size"),
        ([0], {"repetition_penalty": 0.0}, "repetition_penalty"),
        ([0], {"repetition_penalty": float("nan")}, "repetition_penalty"),
        ([0], {"typical_p": 0.0}, "typical_p"),
        ([0], {"typical_p": 1.1}, "typical_p"),
        ([0], {"min_tokens": -1}, "min_tokens"),
        ([0], {"logit_bias": [(8, 1.0)]}, "logit_bias"),
        ([0], {"stop_token_ids": [8]}, "stop_token_ids"),
        ([0], {"bad_words": [[]]}, "bad_words"),
        ([0], {"bad_words": [[1, 8]]}, "bad_words"),
        ([0], {"allowed_token_ids": [-1]}, "allowed_token_ids"),
    ],
)
def test_a_bad_state_is_refused_by_name(prompt: list[int], options: Options, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        make_state(prompt, {"vocab_size": 8} | options)


def test_a_token_outside_the_vocabulary_is_not_recorded() -> None:
    state = _C.SamplingState([0], vocab_size=8)
    for token in (-1, 8):
        with pytest.raises(ValueError, match="token_id"):
            state.record(token)
