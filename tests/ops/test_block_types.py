"""Every block type in the executors: the look-up of embeddings bit by bit, and whole tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Final, cast

import numpy as np
import pytest

from llmserve.checkpoints import open_checkpoint
from llmserve.checkpoints.dequantize import dequantize
from llmserve.models import llama
from llmserve.models.catalog import load_model
from llmserve.ops import Forward
from llmserve.ops import nodes as n
from llmserve.ops.compiler import Plan
from llmserve.ops.protocol import AttentionSpec, Executor, Ops, Value
from llmserve.types import CheckpointTensor
from tests.ops.bounds import TINY, precision, tiny_bound
from tests.ops.networks import VOCAB, Maker
from tests.ops.op_running import OpenCpuExecutor, executor_config
from tests.ops.running import (
    ARMS,
    Piece,
    available_isas,
    build_executor,
    errors,
    make_step,
    new_sequence,
    prompt_logprobs,
)
from tests.ops.seeds import fresh_seed
from tests.tiny import checkpoints
from tests.tiny.models import BLOCK_MODELS, VOCAB_SIZE, TinyModel, prompt_ids
from tests.tiny.quantizers import BLOCK_TYPES, INTEGER_TYPES, quantize_integers
from tests.tiny.random_blocks import random_tensor

COLUMNS = 768
INTEGER_MODEL: Final = TinyModel(
    name="llama_integers", model_type="llama", storage="f32", hidden_size=128, intermediate_size=256
)
"""What is quantized to each integer type; rows are whole groups of 128."""


def embed_only(maker: Maker, table: CheckpointTensor) -> Forward:
    """A look-up and the least that the executor wants after it."""
    q, k, v = (maker.matrix(32, COLUMNS) for _ in range(3))
    head = maker.matrix(VOCAB, 32)

    def forward(ops: Ops) -> Value:
        x = ops.embed(table)
        spec = AttentionSpec(heads=1, kv_heads=1, head_dim=32, scale=0.2)
        return ops.logits(ops.attention(ops.linear(x, q), ops.linear(x, k), ops.linear(x, v), spec, layer=0), head)

    return forward


def looked_up(forward: Forward, token_ids: list[int], isa: str) -> np.ndarray:
    """The rows that the embed node of the CPU executor writes."""
    kept: list[n.Buffer] = []

    def keep(plan: Plan) -> None:
        embed = next(node for node in plan.nodes if isinstance(node, n.EmbedNode))
        assert embed.out is not None
        embed.out.forms |= n.F32
        kept.append(embed.out)
        plan.nodes[-1].reads.append(embed.out)  # its place in the arena is not given away

    opened = OpenCpuExecutor(forward, executor_config(isa), keep)
    handle = new_sequence(cast(Executor, opened.executor), len(token_ids))
    opened.executor.launch(make_step([Piece(handle, token_ids, 0)], num_logprobs=-1))
    return opened.executor.program.read(opened._values[kept[0]], len(token_ids))


@pytest.mark.parametrize("dtype", [*BLOCK_TYPES, *INTEGER_TYPES])
def test_embeddings_are_looked_up_bit_for_bit(dtype: str) -> None:
    seed = fresh_seed()
    maker = Maker(seed, "bf16")
    table = random_tensor(maker.random, dtype, VOCAB, COLUMNS)
    token_ids = maker.random.permutation(VOCAB)[:41].tolist()
    expected = dequantize(table)[token_ids]
    for isa in available_isas():
        rows = looked_up(embed_only(maker, table), token_ids, isa)
        np.testing.assert_array_equal(rows.view(np.uint32), expected.view(np.uint32), err_msg=f"{isa} seed={seed}")


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "reference"])
@pytest.mark.parametrize("name", BLOCK_MODELS)
def test_whole_models_agree_with_the_reference(name: str, arm: str, tmp_path: Path) -> None:
    model = BLOCK_MODELS[name]
    checkpoint = open_checkpoint(checkpoints.write(model, tmp_path))
    forward, prompt = load_model(checkpoint), prompt_ids(model)
    tables = []
    for each in ("reference", arm):
        executor = build_executor(each, checkpoint.config, forward, num_tokens=64, num_blocks=64)
        tables.append(prompt_logprobs(executor, prompt, chunks=(1, 17, 23), vocab_size=VOCAB_SIZE))
    expected, measured = tables
    assert np.std(expected) > 2  # flat logits would agree with anything
    bound = tiny_bound(model, arm, spread=float(np.std(expected)))
    found = errors(measured, expected)
    assert bound.holds(found), f"{found} exceeds {bound}"


def as_integers(tensor: CheckpointTensor, dtype: str) -> CheckpointTensor:
    """Matrices quantized, vectors as they are."""
    if len(tensor.shape) == 1:
        return tensor
    stored = quantize_integers(dequantize(tensor), dtype)
    return CheckpointTensor(tensor.name, dtype, tensor.shape, memoryview(stored.tobytes()))


@pytest.mark.parametrize("arm", [arm for arm in ARMS if arm != "reference"])
@pytest.mark.parametrize("dtype", INTEGER_TYPES)
def test_whole_models_of_integers_agree_with_the_reference(dtype: str, arm: str, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(checkpoints.write(INTEGER_MODEL, tmp_path))
    tensors = {name: as_integers(tensor, dtype) for name, tensor in checkpoint.tensors.items()}
    forward, prompt = llama.build(checkpoint.config, tensors), prompt_ids(INTEGER_MODEL)
    expected, measured = (
        prompt_logprobs(
            build_executor(each, checkpoint.config, forward, num_tokens=64, num_blocks=64),
            prompt, chunks=(1, 17, 23), vocab_size=VOCAB_SIZE,
        )
        for each in ("reference", arm)
    )  # fmt: skip
    assert np.std(expected) > 2  # flat logits would agree with anything
    bound = TINY[precision(arm, quantized=True)].times(float(np.std(expected)))
    found = errors(measured, expected)
    assert bound.holds(found), f"{found} exceeds {bound}"


@pytest.mark.parametrize("name", BLOCK_MODELS)
def test_the_reader_and_the_reference_see_the_stored_weights(name: str, tmp_path: Path) -> None:
    model = BLOCK_MODELS[name]
    checkpoint = open_checkpoint(checkpoints.write(model, tmp_path))
    stored = checkpoints.stored_tensors(model)
    assert {tensor.dtype for tensor in checkpoint.tensors.values()} == {"f32", model.storage}
    for part, hf in (("embed", "model.embed_tokens.weight"), ("layers.1.down", "model.layers.1.mlp.down_proj.weight")):
        np.testing.assert_array_equal(dequantize(checkpoint.tensors[part]), stored[hf])
