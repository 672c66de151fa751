"""A value that is not finite reaches the logits of its own sequence, whatever the kernels, and no other's."""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

import numpy as np
import pytest

from llmserve.config import ExecutorConfig, KVCacheDtype
from llmserve.engine.kv_cache import PagedExecutor
from llmserve.ops.protocol import NO_TOKEN, NOT_FINITE, StepOutput
from tests.ops.poison import POISON, poisoned_executor
from tests.ops.running import Piece, available_isas, make_step, new_sequence
from tests.ops.sampling_states import make_states, sample_both
from tests.ops.test_sampler import Filters, make_rows
from tests.tiny import checkpoints
from tests.tiny.models import VOCAB_SIZE, TinyModel

Storage = Literal["hf_f32", "hf_bf16", "q4_0", "q4_1", "q8_0"]
STORAGES: Final[tuple[Storage, ...]] = ("hf_f32", "hf_bf16", "q4_0", "q4_1", "q8_0")
PROMPTS: Final = [
    [token if token != POISON else 0 for token in np.random.default_rng(seed).integers(0, VOCAB_SIZE, 20).tolist()]
    for seed in range(6)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("poison")


def build(folder: Path, storage: Storage, value: float, isa: str, kv: KVCacheDtype, *, exact: bool) -> PagedExecutor:
    model = TinyModel(name=f"tiny_{storage}", model_type="llama", storage=storage)
    found = list(folder.glob(f"{model.name}*"))
    config = ExecutorConfig(
        max_num_tokens=256, max_num_seqs=8, max_logit_rows=256, max_model_len=64, isa=isa, exact=exact,
        kv_cache_dtype=kv,
    )  # fmt: skip
    executor = poisoned_executor(found[0] if found else checkpoints.write(model, folder), config, value)
    executor.allocate_kv(32)
    return executor


def run(executor: PagedExecutor, prompts: list[list[int]]) -> StepOutput:
    handles = [new_sequence(executor, len(prompt)) for prompt in prompts]
    pieces = [Piece(handle, prompt, 0) for handle, prompt in zip(handles, prompts, strict=True)]
    executor.launch(make_step(pieces, num_logprobs=3))
    output = executor.collect()
    copy = StepOutput(*(getattr(output, name).copy() for name in StepOutput.__slots__))
    for handle in handles:
        executor.block_pool.release(handle)
    return copy


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize(
    ("storage", "exact", "kv"),
    [(storage, False, "bf16") for storage in STORAGES] + [("q4_1", True, "bf16"), ("q4_1", False, "int8")],
)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_poison_stays_in_its_sequence_and_from_its_token_on(
    folder: Path, storage: Storage, value: float, isa: str, kv: KVCacheDtype, *, exact: bool
) -> None:
    executor = build(folder, storage, value, isa, kv, exact=exact)
    clean = run(executor, PROMPTS)
    assert np.all(clean.token_ids >= 0)
    # First, in the middle, last: the tokens after it get it through attention alone. (What its own sequence computed in
    # the same step before it is lost too, where its value stands in the same block: 0 · NaN.)
    places = {1: 0, 2: 9, 4: 19}
    dirty = [[POISON if places.get(seq) == i else token for i, token in enumerate(ids)] for seq, ids in
             enumerate(PROMPTS)]  # fmt: skip
    found = run(executor, dirty)
    for row in range(len(clean.token_ids)):
        seq, position = divmod(row, 20)
        if position >= places.get(seq, 20):
            assert found.token_ids[row] == NOT_FINITE, (seq, position)
            assert np.isnan(found.logprobs[row])
        elif seq not in places:
            assert found.token_ids[row] == clean.token_ids[row], (seq, position)
            assert found.top_logprobs[row].tobytes() == clean.top_logprobs[row].tobytes(), (seq, position)


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_both_samplers_report_the_same_rows(isa: str, temperature: float) -> None:
    logits = np.random.default_rng(3).normal(size=(8, 50)).astype(np.float32)
    logits[1, 49] = np.nan
    logits[2, 0] = np.inf
    logits[3, :] = -np.inf
    logits[4, 1:] = -np.inf
    logits[5, 3] = logits[6, 0] = np.nan
    states, twins = make_states([{"allowed_token_ids": [1, 2]} if row in (4, 6) else None for row in range(8)], 50,
                                [[1]] * 8)  # fmt: skip
    step = make_rows(8, Filters(temperature=temperature))
    step.targets[5] = step.targets[7] = 4  # scored rows are reported too
    step.num_logprobs[:] = 0
    step.states, step.sample_position[:] = states, 1
    expected, found = sample_both(logits, step, twins, isa=isa)
    assert expected.token_ids.tolist() == found.token_ids.tolist()
    outcomes = [token if token < 0 else "token" for token in found.token_ids.tolist()]
    assert outcomes == ["token", *[NOT_FINITE] * 3, NO_TOKEN, NOT_FINITE, NOT_FINITE, "token"]
    assert np.isnan(found.logprobs).tolist() == [outcome != "token" for outcome in outcomes]
