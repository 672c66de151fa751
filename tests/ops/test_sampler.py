"""The compiled sampler against its definition, the reference executor's: draws, log-probabilities, ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, cast

import numpy as np
import pytest
from numpy.typing import NDArray

from llmserve import _C
from llmserve.ops import philox, reference_sampler
from llmserve.ops.protocol import NOT_FINITE, StepInput, StepOutput
from tests.ops.running import Piece, available_isas, make_step
from tests.ops.seeds import fresh_seed

Logits = NDArray[np.float32]
NEAR: Final = 1e-5
"""How near a boundary of the distribution a draw may lie for float32 weights to decide otherwise."""
F32: Final = 1


@dataclass(frozen=True, slots=True)
class Filters:
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


FILTERS: Final = {
    "greedy": Filters(temperature=0.0),
    "temperature": Filters(),
    "cold": Filters(temperature=0.3),
    "hot": Filters(temperature=2.0),
    "top_k": Filters(top_k=20),
    "top_p": Filters(top_p=0.8),
    "min_p": Filters(min_p=0.05),
    "top_k_top_p": Filters(top_k=50, top_p=0.9),
    "top_p_min_p": Filters(temperature=1.5, top_p=0.95, min_p=0.02),
    "all": Filters(temperature=0.8, top_k=40, top_p=0.9, min_p=0.01),
}


def compiled_sample(logits: Logits, step: StepInput, *, isa: str = "") -> StepOutput:
    """Rows of `logits` [R, vocab] through the extension: an embedding whose rows are the logits, then the sampler."""
    num_rows, vocab = logits.shape
    program = _C.Program(
        isa, 2, max_num_tokens=num_rows, max_num_seqs=1, max_logit_rows=num_rows, max_position=num_rows
    )
    size = program.value_bytes("logits", vocab, F32)
    program.reserve_arena(2 * size)
    tokens, gathered = program.add_value("tokens", vocab, F32, 0), program.add_value("logits", vocab, F32, size)
    table = _C.TensorView(memoryview(np.ascontiguousarray(logits).tobytes()), "f32", num_rows, vocab, "logits")
    program.add_embed(table, None, 1.0, tokens)
    program.add_gather(tokens, gathered)
    program.add_sample(gathered)
    num_blocks = -(-num_rows // 16)
    program.allocate_kv(1, num_blocks, 1, 16)
    pool = _C.BlockPool(num_blocks, 16)
    handle = pool.create()
    assert pool.reserve([handle], [num_rows]) == 1
    step.block_tables[:] = handle
    return _run(program, pool, step)


def _run(program: _C.Program, pool: _C.BlockPool, step: StepInput) -> StepOutput:
    num_rows, width = len(step.logit_rows), max(0, int(step.num_logprobs.max(initial=0)))
    output = StepOutput(
        token_ids=np.empty(num_rows, np.int32), logprobs=np.empty(num_rows, np.float32),
        ranks=np.empty(num_rows, np.int32), top_ids=np.full((num_rows, width), -1, np.int32),
        top_logprobs=np.full((num_rows, width), np.nan, np.float32),
    )  # fmt: skip
    assert program.run(
        pool, step.token_ids, step.positions, step.query_start, step.seq_lens, step.block_tables, step.logit_rows,
        step.targets, step.temperature, step.top_k, step.top_p, step.min_p, step.seed, step.sample_position,
        step.num_logprobs, output.token_ids, output.logprobs, output.ranks, output.top_ids, output.top_logprobs,
        states=cast("list[_C.SamplingState | None]", step.states), mask_rows=step.mask_rows, masks=step.masks,
    )  # fmt: skip
    return output


def make_rows(
    num_rows: int, filters: Filters, *, seed: int = 0, num_logprobs: int = -1, targets: Sequence[int] | None = None
) -> StepInput:
    """Row i stands at position i and draws with a seed of its own."""
    step = make_step([Piece(0, range(num_rows), 0)], num_logprobs=num_logprobs, targets=targets)
    step.temperature[:], step.top_k[:] = filters.temperature, filters.top_k
    step.top_p[:], step.min_p[:] = filters.top_p, filters.min_p
    step.seed[:] = np.random.default_rng(seed).integers(0, 2**64, num_rows, dtype=np.uint64)
    return step


def random_logits(seed: int, num_rows: int, vocab: int) -> Logits:
    draws = np.random.default_rng(seed)
    return (draws.normal(size=(num_rows, vocab)) * draws.uniform(1, 6, (num_rows, 1))).astype(np.float32)


def nearly_drawn(logits: Logits, step: StepInput, row: int) -> set[int]:
    """Tokens that the definition draws when its draw and thresholds move by less than NEAR."""
    weights = np.exp((logits.astype(np.float64) - logits.max()) / float(step.temperature[row]))
    order = reference_sampler.by_logit(logits)
    draw = philox.uniform(int(step.seed[row]), int(step.sample_position[row]))
    found = set()
    for top_p in (step.top_p[row], step.top_p[row] - NEAR, min(1.0, step.top_p[row] + NEAR)):
        for min_p in (step.min_p[row] * (1 - NEAR), step.min_p[row] * (1 + NEAR)):
            kept = reference_sampler.survivors(
                weights, order, top_k=int(step.top_k[row]), top_p=float(top_p), min_p=float(min_p)
            )
            sums = np.cumsum(weights[kept])
            for u in (draw - NEAR, draw, draw + NEAR):
                index = int(np.searchsorted(sums, u * sums[-1], side="right"))
                found.add(int(kept[min(index, len(kept) - 1)]))
    return found


@pytest.mark.parametrize("vocab", [5, 256, 1000])
@pytest.mark.parametrize("name", FILTERS)
def test_draws_are_those_of_the_definition(name: str, vocab: int) -> None:
    seed, num_rows = fresh_seed(), 1000
    logits, step = random_logits(seed, num_rows, vocab), make_rows(num_rows, FILTERS[name], seed=seed)
    expected = reference_sampler.sample_step(logits, step).token_ids
    found = compiled_sample(logits, step).token_ids
    others = np.flatnonzero(found != expected)
    for row in others:
        assert int(found[row]) in nearly_drawn(logits[row], step, int(row)), f"row {row} seed={seed}"
    # A draw is that near to one of two boundaries (or a threshold to one of two) with 8 NEAR: one row in 12,500.
    assert len(others) <= 3, f"{len(others)} draws near a boundary, seed={seed}"
    if FILTERS[name].temperature == 0:
        assert len(others) == 0


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("vocab", [1, 3, 257, 1200])
def test_logprobs_ranks_and_most_likely_tokens(vocab: int, isa: str) -> None:
    seed, num_rows = fresh_seed(), 60
    logits = random_logits(seed, num_rows, vocab)
    targets = np.random.default_rng(seed).integers(-1, vocab, num_rows).tolist()
    step = make_rows(num_rows, Filters(temperature=0.0), seed=seed, num_logprobs=8, targets=targets)
    step.num_logprobs[::3] = 0
    step.num_logprobs[1::7] = -1
    expected, found = reference_sampler.sample_step(logits, step), compiled_sample(logits, step, isa=isa)
    np.testing.assert_array_equal(found.token_ids, expected.token_ids)
    np.testing.assert_array_equal(found.ranks, expected.ranks)
    np.testing.assert_array_equal(found.top_ids, expected.top_ids)
    np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=NEAR)
    np.testing.assert_allclose(found.top_logprobs, expected.top_logprobs, atol=NEAR)


def test_ties_go_to_the_smaller_id_and_share_a_rank() -> None:
    seed = fresh_seed()
    logits = np.random.default_rng(seed).integers(-2, 3, (80, 40)).astype(np.float32)
    for filters in (Filters(temperature=0.0), Filters(top_k=3), Filters(top_k=7, top_p=0.5)):
        step = make_rows(80, filters, seed=seed, num_logprobs=10)
        expected, found = reference_sampler.sample_step(logits, step), compiled_sample(logits, step)
        np.testing.assert_array_equal(found.token_ids, expected.token_ids, err_msg=f"seed={seed}")
        np.testing.assert_array_equal(found.top_ids, expected.top_ids, err_msg=f"seed={seed}")
        np.testing.assert_array_equal(found.ranks, expected.ranks, err_msg=f"ranks of equals, seed={seed}")


@pytest.mark.parametrize("name", ["temperature", "top_k", "top_p", "all"])
def test_draws_follow_the_distribution(name: str) -> None:
    """Chi-square over tokens expected at least five times; passed by chance but once in a million runs."""
    seed, num_draws, vocab = fresh_seed(), 4000, 50
    logits = np.repeat(random_logits(seed, 1, vocab) / np.float32(3), num_draws, axis=0)
    step = make_rows(num_draws, FILTERS[name], seed=seed)
    counts = np.bincount(compiled_sample(logits, step).token_ids, minlength=vocab)
    weights = np.exp((logits[0].astype(np.float64) - logits[0].max()) / FILTERS[name].temperature)
    kept = reference_sampler.survivors(
        weights, reference_sampler.by_logit(logits[0]), top_k=FILTERS[name].top_k, top_p=FILTERS[name].top_p,
        min_p=FILTERS[name].min_p,
    )  # fmt: skip
    expected = np.zeros(vocab)
    expected[kept] = weights[kept] / weights[kept].sum() * num_draws
    assert counts[expected == 0].sum() == 0, f"a token that was filtered out was drawn, seed={seed}"
    frequent = expected >= 5
    chi_square = float(((counts - expected)[frequent] ** 2 / expected[frequent]).sum())
    freedom = max(1, int(frequent.sum()) - 1)
    # Wilson-Hilferty: the cube root of chi-square / freedom is nearly normal; 4.9 standard deviations.
    assert (chi_square / freedom) ** (1 / 3) < 1 - 2 / (9 * freedom) + 4.9 * (2 / (9 * freedom)) ** 0.5, f"seed={seed}"


def test_all_equal_logits_are_drawn_evenly() -> None:
    step = make_rows(500, Filters(), seed=fresh_seed())
    found = compiled_sample(np.full((500, 64), 0.25, np.float32), step).token_ids
    draws = [philox.uniform(int(s), int(p)) for s, p in zip(step.seed, step.sample_position, strict=True)]
    np.testing.assert_array_equal(found, (np.array(draws) * 64).astype(np.int32))


@pytest.mark.parametrize("odd", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("share", [0.02, 0.5, 1.0])
@pytest.mark.parametrize("name", ["greedy", "temperature", "top_p", "all"])
def test_rows_without_a_finite_maximum_are_reported_and_others_are_not(name: str, share: float, odd: float) -> None:
    seed = fresh_seed()
    logits = random_logits(seed, 30, 300)
    logits[np.random.default_rng(seed).random(logits.shape) < share] = odd
    found = compiled_sample(logits, make_rows(30, FILTERS[name], seed=seed, num_logprobs=3))
    broken = ~np.isfinite(logits.max(axis=1))  # NaN where one of them is
    assert (found.token_ids[broken] == NOT_FINITE).all(), f"seed={seed}"
    assert ((found.token_ids[~broken] >= 0) & (found.token_ids[~broken] < 300)).all(), f"seed={seed}"


@pytest.mark.parametrize("isa", available_isas())
def test_a_row_does_not_depend_on_the_others(isa: str) -> None:
    seed = fresh_seed()
    logits, step = random_logits(seed, 40, 500), make_rows(40, FILTERS["all"], seed=seed, num_logprobs=5)
    together = compiled_sample(logits, step, isa=isa)
    again = compiled_sample(logits, step, isa=isa)
    np.testing.assert_array_equal(together.token_ids, again.token_ids)
    for row in (0, 17, 39):
        alone = make_rows(1, FILTERS["all"], num_logprobs=5)
        alone.seed[0], alone.sample_position[0] = step.seed[row], step.sample_position[row]
        found = compiled_sample(logits[row : row + 1], alone, isa=isa)
        assert found.token_ids[0] == together.token_ids[row]
        assert found.logprobs.view(np.uint32)[0] == together.logprobs.view(np.uint32)[row]
        np.testing.assert_array_equal(found.top_logprobs[0], together.top_logprobs[row])


def test_seed_and_position_both_move_the_draw() -> None:
    logits = np.zeros((64, 1000), np.float32)
    step = make_rows(64, Filters())
    step.seed[:] = 5
    by_position = compiled_sample(logits, step).token_ids
    step.sample_position[:] = 9
    assert len(set(compiled_sample(logits, step).token_ids.tolist())) == 1
    assert len(set(by_position.tolist())) > 50
    step.seed[:] = np.arange(64, dtype=np.uint64) << np.uint64(32)
    assert len(set(compiled_sample(logits, step).token_ids.tolist())) > 50


def test_philox_of_the_extension_is_the_plain_one() -> None:
    draws = np.random.default_rng(fresh_seed())
    for _ in range(200):
        words = [int(word) for word in draws.integers(0, 2**32, 6)]
        counter = (words[0], words[1], words[2], words[3])
        assert tuple(_C.philox4x32(counter, words[4:])) == philox.philox4x32(counter, (words[4], words[5]))
