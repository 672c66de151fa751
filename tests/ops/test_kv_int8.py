"""The int8 KV cache: smaller, close to bf16, and as independent of the batch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmserve import ops
from llmserve.checkpoints import open_checkpoint
from llmserve.config import ExecutorConfig, KVCacheDtype
from llmserve.errors import InvalidRequest
from llmserve.models.catalog import load_model
from llmserve.ops.protocol import Executor
from tests.ops.running import Piece, available_isas, make_step, new_sequence
from tests.tiny import checkpoints
from tests.tiny.models import MODELS, VOCAB_SIZE

PROMPT = np.random.default_rng(7).integers(0, VOCAB_SIZE, 300).tolist()


def build(path: Path, dtype: KVCacheDtype, *, isa: str = "", device: str = "cpu") -> Executor:
    checkpoint = open_checkpoint(path)
    config = ExecutorConfig(
        max_num_tokens=512, max_num_seqs=4, max_logit_rows=512, max_model_len=512, exact=True, isa=isa,
        kv_cache_dtype=dtype,
    )  # fmt: skip
    forward = load_model(checkpoint)
    executor = ops.load(device).build(checkpoint.config, forward, config, progress=lambda what, done, total: None)
    executor.allocate_kv(64)
    return executor


def score(executor: Executor, *, chunk: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """Log-probabilities of the prompt's tokens, computed `chunk` tokens a step."""
    handle = new_sequence(executor, len(PROMPT))
    parts = []
    for start in range(0, len(PROMPT) - 1, chunk):
        tokens = PROMPT[start : min(start + chunk, len(PROMPT) - 1)]
        targets = PROMPT[start + 1 : start + 1 + len(tokens)]
        executor.launch(make_step([Piece(handle, tokens, start)], num_logprobs=0, targets=targets))
        parts.append(executor.collect().logprobs.copy())
    executor.block_pool.release(handle)  # type: ignore[attr-defined]
    return np.concatenate(parts)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.write(MODELS["qwen2"], tmp_path_factory.mktemp("qwen2"))


@pytest.mark.parametrize("isa", available_isas())
def test_it_is_near_the_bf16_cache_and_really_another_one(path: Path, isa: str) -> None:
    exact, rounded = score(build(path, "bf16", isa=isa), chunk=512), score(build(path, "int8", isa=isa), chunk=512)
    difference = np.abs(exact - rounded)
    spread = float(exact.std())
    # One scale for each token and head: half a step of 1/127 of the largest value, some times larger than bf16's.
    assert 0 < difference.mean() < 0.03 * spread
    assert difference.max() < 0.15 * spread


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_chunks_give_the_same_bits(path: Path, isa: str, chunk: int) -> None:
    executor = build(path, "int8", isa=isa)
    whole, cut = score(executor, chunk=512), score(executor, chunk=chunk)
    assert whole.tobytes() == cut.tobytes()


def test_it_takes_about_half_the_memory(path: Path) -> None:
    small, large = build(path, "int8").kv_bytes_per_block(), build(path, "bf16").kv_bytes_per_block()
    assert 0.5 <= small / large < 0.76, "codes are half; the scales weigh most where heads are small"


def test_the_reference_executor_refuses_it(path: Path) -> None:
    with pytest.raises(InvalidRequest, match="kv_cache_dtype"):
        build(path, "int8", device="reference")
