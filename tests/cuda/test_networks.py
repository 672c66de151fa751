"""Every op and every fusion of the CUDA executor against the reference: the networks that the CPU executor is held to,
and mixtures of experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pytest

from llmserve.config import ExecutorConfig
from llmserve.errors import CheckpointError
from llmserve.ops import Forward
from llmserve.ops.protocol import AttentionSpec, ExpertsSpec, Ops, RopeSpec, RouterSpec, Value
from llmserve.types import CheckpointTensor
from tests.ops.bounds import op_bound
from tests.ops.networks import MAX_LEN, NETWORKS, QUANTIZED, VOCAB, Maker, Network, WeightType, _attention
from tests.ops.op_running import CHUNKS, NUM_TOKENS, Logits, deviation, draw, reference_logits
from tests.ops.running import Piece, make_step, new_sequence
from tests.ops.seeds import fresh_seed

torch = pytest.importorskip("torch", reason="torch is not installed in this environment: make test-cuda")

if TYPE_CHECKING:
    from torch import device

    from llmserve.ops.cuda.launchers import Launchers


ROUNDINGS: Final = 5
"""For each that the CPU executor has: here what a projection yields is rounded as well as what it reads, the embedding
too, and a square doubles what it is given (the worst seen: 1.43 times the bound of 2)."""


def cuda_logits(forward: Forward, token_ids: list[int], launchers: Launchers, **options: Any) -> Logits:
    """Logits after every token, [T, VOCAB], computed in chunks."""
    from llmserve.ops.cuda.executor import CudaExecutor

    config = ExecutorConfig(
        max_num_tokens=NUM_TOKENS, max_num_seqs=4, max_logit_rows=NUM_TOKENS, max_model_len=MAX_LEN, **options
    )
    executor = CudaExecutor(forward, config, launchers, progress=lambda what, done, total: None)
    executor.allocate_kv(16)
    assert executor.block_pool is not None
    handle, rows, start = new_sequence(executor, len(token_ids)), [], 0
    for size in CHUNKS:
        step = make_step([Piece(handle, token_ids[start : start + size], start)], num_logprobs=-1)
        executor.builder.sync_tables(executor.block_pool, [handle])
        with torch.inference_mode():
            rows.append(executor.program.run(executor.builder.build(step)).cpu().numpy().copy())
        start += size
    return np.concatenate(rows)


@pytest.mark.parametrize("weight_type", [*QUANTIZED, "bf16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_logits_agree_with_the_reference(name: str, weight_type: WeightType, launchers: Launchers) -> None:
    network, seed = NETWORKS[name], fresh_seed()
    forward, token_ids = draw(network, seed, weight_type)
    found = deviation(cuda_logits(forward, token_ids, launchers), reference_logits(forward, token_ids))
    bound = op_bound("bf16", gemms=ROUNDINGS * network.gemms, attends=network.attends)
    assert bound.holds(found), f"seed={seed}: {found} exceeds {bound}"


@pytest.mark.parametrize("name", ["attention_softcap", "gated_silu", "rms_norm"])
def test_deterministic_networks_agree_with_the_reference(name: str, kernel_launchers: Launchers) -> None:
    network, seed = NETWORKS[name], fresh_seed()
    forward, token_ids = draw(network, seed, "q8_0")
    measured = cuda_logits(forward, token_ids, kernel_launchers, deterministic=True)
    found = deviation(measured, reference_logits(forward, token_ids))
    bound = op_bound("bf16", gemms=ROUNDINGS * network.gemms, attends=network.attends)
    assert bound.holds(found), f"seed={seed}: {found} exceeds {bound}"


def test_a_width_that_the_fixed_product_does_not_take_is_refused(fast_launchers: Launchers) -> None:
    maker = Maker(1, "bf16")
    maker.hidden = 100
    forward = NETWORKS["head"].build(maker)
    with pytest.raises(CheckpointError, match="multiple of 8"):
        cuda_logits(forward, [1], fast_launchers, deterministic=True)


def mixture(maker: Maker, style: str) -> Forward:
    """Attention that adds zeros, then one layer of experts."""
    hidden, inner, num_experts = 64, 96, 6
    maker.hidden = hidden
    table, head = maker.table(VOCAB, hidden), maker.matrix(VOCAB, hidden)
    q, k, v, out = (maker.matrix(*shape) for shape in ((32, hidden), (32, hidden), (32, hidden), (hidden, 32)))
    extra: dict[str, Any] = {"mixtral": {}, "qwen": {"normalize": "before_top_k"}}.get(style) or {}
    if style == "deepseek":
        bias = maker.vector(num_experts)
        extra = {"scoring": "sigmoid", "choice_bias": bias, "num_groups": 2, "top_k_groups": 1, "scaling": 1.5}
    router = RouterSpec(weight=_router(maker, num_experts, hidden), num_experts=num_experts, top_k=2, **extra)
    gate, up, down = (
        _stack(maker, num_experts, *shape) for shape in ((inner, hidden), (inner, hidden), (hidden, inner))
    )
    shared = None
    if style == "deepseek":
        ones = [_stack(maker, 1, *shape) for shape in ((inner, hidden), (inner, hidden), (hidden, inner))]
        shared = ExpertsSpec(ones[0], ones[1], ones[2])
    experts = ExpertsSpec(gate, up, down, shared=shared)
    spec = AttentionSpec(heads=1, kv_heads=1, head_dim=32, scale=0.2)

    def forward(ops: Ops) -> Value:
        x = ops.embed(table)
        idle = ops.attention(ops.linear(x, q), ops.linear(x, k), ops.linear(x, v), spec, layer=0)
        x = ops.add(x, ops.scale(ops.linear(idle, out), 0.0))
        return ops.logits(ops.moe(x, router, experts, residual=x), head)

    return forward


def _router(maker: Maker, num_experts: int, hidden: int) -> CheckpointTensor:
    values = (maker.random.normal(size=(num_experts, hidden)) * 0.4).astype(np.float32)
    return CheckpointTensor("router", "f32", values.shape, memoryview(values.tobytes()))


def _stack(maker: Maker, num: int, rows: int, columns: int) -> CheckpointTensor:
    parts = [maker.matrix(rows, columns) for _ in range(num)]
    data = memoryview(b"".join(bytes(part.data) for part in parts))
    return CheckpointTensor("experts", parts[0].dtype, (num, rows, columns), data)


@pytest.mark.parametrize("style", ["mixtral", "qwen", "deepseek"])
@pytest.mark.parametrize("weight_type", ["bf16", "q4_0", "q4_1", "q8_0"])
def test_mixtures_agree_with_the_reference(style: str, weight_type: WeightType, triton_device: device) -> None:
    from llmserve.ops.cuda.launchers import of_library
    from llmserve.ops.cuda.library import open_library
    from tests.cuda.emulation import torch_launchers

    launchers = of_library(open_library()) if triton_device.type == "cuda" else torch_launchers()
    maker = Maker(fresh_seed(), weight_type)
    forward = mixture(maker, style)
    token_ids = maker.random.integers(0, VOCAB, NUM_TOKENS).tolist()
    measured, expected = cuda_logits(forward, token_ids, launchers), reference_logits(forward, token_ids)
    # A token whose second and third expert are as good as equal may go to another one: a few rows, not the rest.
    errors = np.abs(measured - expected).max(axis=1) / expected.std()
    assert np.sort(errors)[-3] <= op_bound("bf16", gemms=8, attends=False).max
    assert np.median(errors) <= op_bound("bf16", gemms=8, attends=False).max / 2


@pytest.mark.parametrize("head_dim", [20, 288])
def test_heads_that_the_kernels_do_not_take(head_dim: int, triton_device: device) -> None:
    from llmserve.ops.cuda.launchers import of_library
    from llmserve.ops.cuda.library import open_library
    from tests.cuda.emulation import torch_launchers

    launchers = of_library(open_library()) if triton_device.type == "cuda" else torch_launchers()
    seed = fresh_seed()
    network = Network(_attention(head_dim=head_dim, sinks=True, softcap=0.8), gemms=5, attends=True)
    forward, token_ids = draw(network, seed, "bf16")
    found = deviation(cuda_logits(forward, token_ids, launchers), reference_logits(forward, token_ids))
    bound = op_bound("bf16", gemms=ROUNDINGS * network.gemms, attends=True)
    assert bound.holds(found), f"seed={seed}: {found} exceeds {bound}"
    with pytest.raises(CheckpointError, match=f"heads of {head_dim} channels in a KV cache other than bf16"):
        cuda_logits(forward, token_ids, launchers, kv_cache_dtype="int8")


def test_queries_that_are_no_projections_of_their_own(launchers: Launchers) -> None:
    """A norm over all heads, one projection cut into three: what the kernel of the cache cannot do comes before it."""
    seed = fresh_seed()

    def build(maker: Maker) -> Forward:
        table, head = maker.table(VOCAB, maker.hidden), maker.matrix(VOCAB, maker.hidden)
        qkv, out = maker.matrix(128 + 64 + 64, maker.hidden), maker.matrix(maker.hidden, 128)
        weight, spec = maker.vector(128, around=1.0), AttentionSpec(heads=4, kv_heads=2, head_dim=32, scale=0.2)
        rope = RopeSpec("half", 32, 100.0 ** (-np.arange(0, 32, 2, dtype=np.float64) / 32))

        def forward(ops: Ops) -> Value:
            x = ops.embed(table)
            q, k, v = ops.split(ops.linear(x, qkv), [128, 64, 64])
            q = ops.rope(ops.norm(q, weight, kind="rms", eps=1e-5), rope, heads=4)
            a = ops.attention(q, ops.rope(k, rope, heads=2), v, spec, layer=0)
            return ops.logits(ops.linear(a, out, residual=x), head)

        return forward

    network = Network(build, gemms=5, attends=True)
    forward, token_ids = draw(network, seed, "bf16")
    found = deviation(cuda_logits(forward, token_ids, launchers), reference_logits(forward, token_ids))
    assert op_bound("bf16", gemms=ROUNDINGS * network.gemms, attends=True).holds(found), f"seed={seed}: {found}"
