"""The CUDA executor: the forward pass on torch tensors, kernels of our own where they are written, torch elsewhere.

Weights are bfloat16 on the GPU. Invariants: one `StepOps` per step and no other state but weights and the KV cache; the
paged cache is read and written by the block pool's tables; sampling is that of the reference, on the host.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from llmserve import _C
from llmserve.checkpoints.dequantize import dequantize
from llmserve.config import ExecutorConfig, ModelConfig
from llmserve.errors import CheckpointError, InvalidRequest, OutOfMemory
from llmserve.ops import Forward, Progress
from llmserve.ops.cuda.launchers import Launchers, of_library
from llmserve.ops.cuda.library import open_library
from llmserve.ops.protocol import (
    ActKind,
    AttentionSpec,
    ExpertsSpec,
    NormKind,
    PoolKind,
    RopeSpec,
    RouterSpec,
    StepInput,
    StepOutput,
)
from llmserve.ops.reference import empty_step
from llmserve.ops.reference_sampler import sample_step
from llmserve.types import CheckpointTensor, WeightsOrigin

DTYPE = torch.bfloat16


@dataclass(slots=True)
class LayerCache:
    """Keys and values of one layer, a row per slot: block * block_size + offset."""

    k: Tensor  # [num_slots, kv_heads, head_dim]
    v: Tensor


@dataclass(slots=True)
class State:
    """What outlives a step."""

    launchers: Launchers
    block_size: int
    weights: dict[CheckpointTensor, Tensor] = field(default_factory=dict)
    vectors: dict[CheckpointTensor, Tensor] = field(default_factory=dict)
    shapes: dict[int, tuple[int, int]] = field(default_factory=dict)
    """layer → (kv_heads, head_dim)."""
    caches: dict[int, LayerCache] = field(default_factory=dict)
    tables: _C.BlockPool | None = None
    on_weight: Callable[[int], None] = lambda count: None

    def matrix(self, tensor: CheckpointTensor) -> Tensor:
        """The tensor in bfloat16, brought over when first used."""
        return self._bring(self.weights, tensor, DTYPE)

    def vector(self, tensor: CheckpointTensor) -> Tensor:
        """The tensor in float32."""
        return self._bring(self.vectors, tensor, torch.float32)

    def _bring(self, known: dict[CheckpointTensor, Tensor], tensor: CheckpointTensor, dtype: torch.dtype) -> Tensor:
        if tensor not in known:
            host = torch.from_numpy(np.ascontiguousarray(dequantize(tensor)))
            known[tensor] = host.to(dtype).to(self.launchers.device)
            self.on_weight(len(self.weights) + len(self.vectors))
        return known[tensor]


class StepOps:
    """`Ops` for one step. Values are bfloat16 tensors, [T, channels]; logits are float32."""

    def __init__(self, step: StepInput, state: State) -> None:
        self._step = step
        self._state = state
        self._device = state.launchers.device
        self._positions = self._indices(step.positions)

    def _indices(self, values: NDArray[Any]) -> Tensor:
        return torch.as_tensor(np.asarray(values, np.int64), device=self._device)

    def embed(
        self,
        table: CheckpointTensor,
        *,
        scale: float = 1.0,
        positions: CheckpointTensor | None = None,
        types: CheckpointTensor | None = None,
    ) -> Tensor:
        x = self._state.matrix(table)[self._indices(self._step.token_ids)] * scale
        if positions is not None:
            x = x + self._state.matrix(positions)[self._positions]
        return x if types is None else x + self._state.matrix(types)[0]

    def norm(
        self,
        x: Tensor,
        weight: CheckpointTensor,
        *,
        kind: NormKind,
        eps: float,
        bias: CheckpointTensor | None = None,
        heads: int | None = None,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1] // (heads or 1))
        scale = self._state.vector(weight)
        if kind == "rms" and bias is None:
            out = torch.empty_like(rows)
            self._state.launchers.rms_norm(rows, scale, out, eps=eps)
        else:
            centered = rows.float() - (rows.float().mean(-1, keepdim=True) if kind == "layer" else 0.0)
            y = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps) * scale
            out = (y if bias is None else y + self._state.vector(bias)).to(DTYPE)
        return out.reshape(x.shape)

    def linear(
        self,
        x: Tensor,
        weight: CheckpointTensor,
        *,
        bias: CheckpointTensor | None = None,
        residual: Tensor | None = None,
        site: str | None = None,
    ) -> Tensor:
        y = F.linear(x, self._state.matrix(weight), None if bias is None else self._state.matrix(bias))
        return y if residual is None else y + residual

    def split(self, x: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
        return tuple(torch.split(x, list(sizes), dim=-1))

    def rope(self, x: Tensor, rope: RopeSpec, *, heads: int) -> Tensor:
        angles = self._step.positions[:, None].astype(np.float64) * rope.inv_freq  # [T, rotary_dim / 2]
        cos, sin = (
            torch.from_numpy((part(angles) * rope.attention_factor).astype(np.float32))[:, None].to(self._device)
            for part in (np.cos, np.sin)
        )
        y = x.reshape(len(x), heads, x.shape[-1] // heads).float()
        half = rope.rotary_dim // 2
        first, second = (
            (y[..., :half], y[..., half : 2 * half])
            if rope.style == "half"
            else (y[..., 0 : 2 * half : 2], y[..., 1 : 2 * half : 2])
        )
        turned = first * cos - second * sin, second * cos + first * sin
        pair = torch.cat(turned, -1) if rope.style == "half" else torch.stack(turned, -1).flatten(-2)
        return torch.cat((pair, y[..., 2 * half :]), -1).to(DTYPE).reshape(x.shape)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, spec: AttentionSpec, *, layer: int) -> Tensor:
        q, k, v = (
            part.reshape(len(part), heads, part.shape[-1] // heads)
            for part, heads in ((q, spec.heads), (k, spec.kv_heads), (v, spec.kv_heads))
        )
        if spec.kv_group != "none":
            self._state.shapes.setdefault(layer, (spec.kv_heads, k.shape[-1]))
        y = torch.empty_like(q)
        for index in range(len(self._step.seq_lens)):
            rows = slice(int(self._step.query_start[index]), int(self._step.query_start[index + 1]))
            cached = (k[rows], v[rows]) if spec.kv_group == "none" else self._cached(k, v, layer, index, rows)
            y[rows] = self._attend(q[rows], *cached, self._positions[rows], spec)
        return y.flatten(1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, spec: AttentionSpec) -> Tensor:
        """One sequence: q [T, heads, D] against k and v [S, kv_heads, D]."""
        group = spec.heads // spec.kv_heads
        queries = q.float().reshape(len(q), spec.kv_heads, group, q.shape[-1])
        scores = torch.einsum("tkgd,skd->kgts", queries, k.float()) * spec.scale
        if spec.softcap:
            scores = spec.softcap * torch.tanh(scores / spec.softcap)
        distance = positions[:, None] - torch.arange(len(k), device=self._device)
        seen = torch.ones_like(distance, dtype=torch.bool) if spec.mask == "bidirectional" else distance >= 0
        if spec.window:
            seen &= distance.abs() < spec.window
        scores = scores.masked_fill(~seen, float("-inf"))
        if spec.sinks is not None:
            sinks = self._state.vector(spec.sinks).reshape(spec.kv_heads, group, 1, 1)
            scores = torch.cat((scores, sinks.expand(*scores.shape[:3], 1)), -1)
        weights = torch.softmax(scores, -1)[..., : len(k)]
        return torch.einsum("kgts,skd->tkgd", weights, v.float()).reshape(q.shape).to(DTYPE)

    def _cached(self, k: Tensor, v: Tensor, layer: int, index: int, rows: slice) -> tuple[Tensor, Tensor]:
        """Write the sequence's new keys and values, return all of them in the order of positions."""
        cache, tables, size = self._state.caches[layer], self._state.tables, self._state.block_size
        assert tables is not None
        blocks = np.asarray(tables.table(int(self._step.block_tables[index])), np.int64)
        slots = (blocks[:, None] * size + np.arange(size)).reshape(-1)[: self._step.seq_lens[index]]
        own = self._indices(slots[self._step.positions[rows]])
        cache.k[own], cache.v[own] = k[rows], v[rows]
        everything = self._indices(slots)
        return cache.k[everything], cache.v[everything]

    def act(self, x: Tensor, kind: ActKind, *, gate: Tensor | None = None) -> Tensor:
        y = (x if gate is None else gate).float()
        if kind == "relu2":
            y = F.relu(y).square()
        elif kind == "silu":
            y = F.silu(y)
        else:
            y = F.gelu(y, approximate="tanh" if kind == "gelu_tanh" else "none")
        return (y if gate is None else y * x.float()).to(DTYPE)

    def add(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y

    def scale(self, x: Tensor, by: float) -> Tensor:
        return x * by

    def moe(self, x: Tensor, router: RouterSpec, experts: ExpertsSpec, *, residual: Tensor | None = None) -> Tensor:
        raise CheckpointError("mixtures of experts do not run on CUDA yet")

    def logits(self, x: Tensor, head: CheckpointTensor, *, softcap: float | None = None, scale: float = 1.0) -> Tensor:
        rows = x[self._indices(self._step.logit_rows)]
        y = F.linear(rows, self._state.matrix(head)).float() * scale
        return softcap * torch.tanh(y / softcap) if softcap else y

    def pool(self, x: Tensor, kind: PoolKind) -> Tensor:
        raise CheckpointError("pooling does not run on CUDA yet")


class CudaExecutor:
    """A network on one GPU. `block_pool` appears with `allocate_kv`."""

    isa = "cuda"
    num_threads = 1
    weights_origin: WeightsOrigin = "memory"
    image_path = ""

    def __init__(self, forward: Forward, config: ExecutorConfig, launchers: Launchers, *, progress: Progress) -> None:
        self.block_pool: _C.BlockPool | None = None
        self._forward = forward
        self._config = config
        self._state = State(
            launchers, config.block_size, on_weight=lambda count: progress("loading weights to the GPU", count, 0)
        )
        self._output: StepOutput | None = None
        # A step without tokens meets every op once: it brings the weights over and learns the shape of the caches.
        with torch.inference_mode():
            forward(StepOps(empty_step(), self._state))
        brought = [*self._state.weights.values(), *self._state.vectors.values()]
        progress("loading weights to the GPU", len(brought), len(brought))
        self.weight_bytes = sum(tensor.nbytes for tensor in brought)

    def free_bytes(self) -> int:
        """Of the GPU's memory, which the weights are in already."""
        return int(torch.cuda.mem_get_info(self._state.launchers.device)[0])

    def kv_bytes_per_block(self) -> int:
        """Bytes of one block over all layers."""
        channels = sum(2 * heads * head_dim for heads, head_dim in self._state.shapes.values())
        return channels * self._config.block_size * int(DTYPE.itemsize)

    def allocate_kv(self, num_blocks: int) -> None:
        """Create the KV cache and the block pool. Raises `OutOfMemory`."""
        num_slots, device = num_blocks * self._config.block_size, self._state.launchers.device
        try:
            for layer, (heads, head_dim) in self._state.shapes.items():
                k, v = (torch.zeros((num_slots, heads, head_dim), dtype=DTYPE, device=device) for _ in range(2))
                self._state.caches[layer] = LayerCache(k, v)
        except torch.OutOfMemoryError as error:
            need = self.kv_bytes_per_block() * num_blocks
            raise OutOfMemory(f"a KV cache of {num_blocks} blocks ({need} bytes) does not fit on the GPU") from error
        self.block_pool = self._state.tables = _C.BlockPool(
            num_blocks, self._config.block_size, int.from_bytes(os.urandom(16))
        )

    def launch(self, step: StepInput) -> None:
        """Compute the step in line, after the block copies that the pool has pending."""
        with torch.inference_mode():
            self._copy_blocks()
            logits = self._forward(StepOps(step, self._state))
        self._output = sample_step(logits.cpu().numpy(), step)

    def collect(self) -> StepOutput:
        """The output of the step launched last."""
        assert self._output is not None, "collect without launch"
        return self._output

    def _copy_blocks(self) -> None:
        assert self.block_pool is not None, "allocate_kv comes first"
        size = self._config.block_size
        for source, target in self.block_pool.take_copies():
            for cache in self._state.caches.values():
                for rows in (cache.k, cache.v):
                    rows[target * size : (target + 1) * size] = rows[source * size : (source + 1) * size]


def build(
    config: ModelConfig,
    forward: Forward,
    executor_config: ExecutorConfig,
    *,
    progress: Progress,
    launchers: Launchers | None = None,
) -> CudaExecutor:
    """Bring the weights to the GPU. Raises `ExtensionNotBuilt`, `InvalidRequest` for an option that CUDA lacks."""
    del config  # the forward says it all
    if executor_config.kv_cache_dtype != "bf16":
        raise InvalidRequest("kv_cache_dtype: on CUDA the cache is bfloat16", param="kv_cache_dtype")
    if executor_config.exact:
        raise InvalidRequest("exact: on CUDA weights and activations are bfloat16", param="exact")
    return CudaExecutor(forward, executor_config, launchers or of_library(open_library()), progress=progress)
