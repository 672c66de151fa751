"""Sampling states and masks within a step: what is refused, recorded and kept apart."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest
from numpy.typing import NDArray

from llmserve import _C
from llmserve.ops.protocol import NO_TOKEN, StepInput
from tests.ops.running import available_isas
from tests.ops.sampling_states import (
    Options,
    make_state,
    make_states,
    random_filters,
    random_options,
    sample_both,
)
from tests.ops.seeds import fresh_seed
from tests.ops.test_sampler import F32, Filters, compiled_sample, make_rows, random_logits


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
    program.reserve_arena(program.value_bytes("logits", vocab, F32))
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
