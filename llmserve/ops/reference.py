"""The reference executor: NumPy float32, every op computed at once. The oracle of the tests, never a silent fallback.

Invariants: one `StepOps` per step and no other state but the executor's own KV cache; weights are dequantized once and
kept in float32; nothing is fused, so each value is what the model file says, in the order it says it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from llmserve.checkpoints.dequantize import dequantize
from llmserve.config import ExecutorConfig, ModelConfig
from llmserve.errors import ExtensionNotBuilt, InvalidRequest, OutOfMemory
from llmserve.ops import Forward, Progress
from llmserve.ops import reference_math as math_
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
from llmserve.ops.reference_math import Array
from llmserve.ops.reference_moe import experts as run_experts
from llmserve.ops.reference_moe import route
from llmserve.ops.reference_sampler import sample_step
from llmserve.types import CheckpointTensor, WeightsOrigin


class BlockTables(Protocol):
    """What this executor asks of a block pool."""

    def table(self, handle: int) -> Sequence[int]:
        """Blocks of a sequence in the order of positions."""

    def take_copies(self) -> Sequence[tuple[int, int]]:
        """(source, destination) blocks to be copied before the step writes anything."""


@dataclass(slots=True)
class LayerCache:
    """Keys and values of one layer, a row per slot: block * block_size + offset."""

    k: Array  # [num_slots, kv_heads, head_dim]
    v: Array


@dataclass(slots=True)
class PoolState:
    """A sequence's pooled vector while its chunks arrive."""

    total: Array
    num_tokens: int = 0


@dataclass(slots=True)
class State:
    """What outlives a step: dequantized weights, KV caches, pooling sums."""

    block_size: int
    weights: dict[CheckpointTensor, Array] = field(default_factory=dict)
    shapes: dict[int, tuple[int, int, int]] = field(default_factory=dict)
    """layer → (kv_heads, channels of a key, channels of a value), of layers that cache."""
    caches: dict[int, LayerCache] = field(default_factory=dict)
    tables: BlockTables | None = None
    pooled: dict[int, PoolState] = field(default_factory=dict)
    on_weight: Callable[[int], None] = lambda count: None

    def weight(self, tensor: CheckpointTensor) -> Array:
        """The tensor in float32, dequantized when first used."""
        if tensor not in self.weights:
            self.weights[tensor] = dequantize(tensor)
            self.on_weight(len(self.weights))
        return self.weights[tensor]


class StepOps:
    """`Ops` for one step. Values are float32 arrays, [T, channels]."""

    def __init__(self, step: StepInput, state: State) -> None:
        self.step = step
        self._state = state
        self._weight = state.weight

    def embed(
        self,
        table: CheckpointTensor,
        *,
        scale: float = 1.0,
        positions: CheckpointTensor | None = None,
        types: CheckpointTensor | None = None,
    ) -> Array:
        x = self._weight(table)[self.step.token_ids] * np.float32(scale)
        if positions is not None:
            x = x + self._weight(positions)[self.step.positions]
        if types is not None:
            x = x + self._weight(types)[0]  # requests carry no segment ids: all tokens are of the first type
        return x

    def norm(
        self,
        x: Array,
        weight: CheckpointTensor,
        *,
        kind: NormKind,
        eps: float,
        bias: CheckpointTensor | None = None,
        heads: int | None = None,
    ) -> Array:
        shape = x.shape if heads is None else (len(x), heads, x.shape[-1] // heads)
        scale, shift = self._weight(weight), None if bias is None else self._weight(bias)
        return math_.norm(x.reshape(shape), scale, kind=kind, eps=eps, bias=shift).reshape(x.shape)

    def linear(
        self,
        x: Array,
        weight: CheckpointTensor,
        *,
        bias: CheckpointTensor | None = None,
        residual: Array | None = None,
        site: str | None = None,
    ) -> Array:
        y: Array = x @ self._weight(weight).T
        if bias is not None:
            y = y + self._weight(bias)
        return y if residual is None else y + residual

    def split(self, x: Array, sizes: Sequence[int]) -> tuple[Array, ...]:
        return tuple(np.split(x, np.cumsum(sizes)[:-1], axis=-1))

    def rope(self, x: Array, rope: RopeSpec, *, heads: int) -> Array:
        per_head = x.reshape(len(x), heads, x.shape[-1] // heads)
        return math_.rope(per_head, self.step.positions, rope).reshape(x.shape)

    def attention(self, q: Array, k: Array, v: Array, spec: AttentionSpec, *, layer: int) -> Array:
        q = q.reshape(len(q), spec.heads, q.shape[-1] // spec.heads)
        k = k.reshape(len(k), spec.kv_heads, k.shape[-1] // spec.kv_heads)
        v = v.reshape(len(v), spec.kv_heads, v.shape[-1] // spec.kv_heads)
        if spec.kv_group != "none":
            self._state.shapes.setdefault(layer, (spec.kv_heads, k.shape[-1], v.shape[-1]))
        sinks = None if spec.sinks is None else self._weight(spec.sinks)
        y = np.empty((len(q), spec.heads * v.shape[-1]), np.float32)
        for index in range(len(self.step.seq_lens)):
            rows = self._rows(index)
            keys, values = (
                (k[rows], v[rows]) if spec.kv_group == "none" else self._cached(k, v, layer=layer, index=index)
            )
            seen = math_.visible(self.step.positions[rows], len(keys), spec)
            y[rows] = math_.attention(q[rows], keys, values, seen, spec, sinks)
        return y

    def act(self, x: Array, kind: ActKind, *, gate: Array | None = None) -> Array:
        return math_.act(x, kind) if gate is None else math_.act(gate, kind) * x

    def add(self, x: Array, y: Array) -> Array:
        return x + y

    def scale(self, x: Array, by: float) -> Array:
        return x * np.float32(by)

    def moe(self, x: Array, router: RouterSpec, experts: ExpertsSpec, *, residual: Array | None = None) -> Array:
        chosen, mixing = route(x, router, self._weight)
        y = run_experts(x, chosen, mixing, experts, self._weight)
        return y if residual is None else y + residual

    def logits(self, x: Array, head: CheckpointTensor, *, softcap: float | None = None, scale: float = 1.0) -> Array:
        rows = x[self.step.logit_rows]
        return math_.softcap(rows @ self._weight(head).T * np.float32(scale), softcap)

    def pool(self, x: Array, kind: PoolKind) -> Array:
        """One row per sequence of the step: what its tokens so far pool to. A chunk at position 0 starts anew."""
        rows = [self._pooled(x[self._rows(index)], index, kind) for index in range(len(self.step.seq_lens))]
        return np.stack(rows) if rows else np.empty((0, x.shape[-1]), np.float32)

    def _rows(self, index: int) -> slice:
        return slice(int(self.step.query_start[index]), int(self.step.query_start[index + 1]))

    def _cached(self, k: Array, v: Array, *, layer: int, index: int) -> tuple[Array, Array]:
        """Write the sequence's new keys and values, return all of them in the order of positions."""
        cache, tables, rows = self._state.caches[layer], self._state.tables, self._rows(index)
        assert tables is not None
        size = self._state.block_size
        blocks = np.asarray(tables.table(int(self.step.block_tables[index])), np.int64)
        slots = (blocks[:, None] * size + np.arange(size)).reshape(-1)[: self.step.seq_lens[index]]
        cache.k[slots[self.step.positions[rows]]] = k[rows]
        cache.v[slots[self.step.positions[rows]]] = v[rows]
        return cache.k[slots], cache.v[slots]

    def _pooled(self, x: Array, index: int, kind: PoolKind) -> Array:
        first = int(self.step.positions[self._rows(index)][0])
        handle = int(self.step.block_tables[index])
        if first == 0:
            self._state.pooled[handle] = PoolState(np.zeros(x.shape[-1], np.float32))
        state = self._state.pooled[handle]
        state.num_tokens += len(x)
        if kind == "mean":
            state.total += x.sum(axis=0)
            return np.asarray(state.total / np.float32(state.num_tokens))
        if kind == "last" or first == 0:
            state.total = x[-1] if kind == "last" else x[0]
        return state.total


class ReferenceExecutor:
    """A network in NumPy. `block_pool` appears with `allocate_kv`; a test may set its own object before that."""

    isa = "numpy"
    weights_origin: WeightsOrigin = "memory"
    image_path = ""
    num_threads = 1

    def __init__(self, forward: Forward, config: ExecutorConfig, *, progress: Progress) -> None:
        self.block_pool: BlockTables | None = None
        self._forward = forward
        self._config = config
        self._state = State(config.block_size, on_weight=lambda count: progress("dequantizing weights", count, 0))
        self._output: StepOutput | None = None
        # A step without tokens meets every op once: it dequantizes the weights and learns the shape of the caches.
        forward(StepOps(empty_step(), self._state))
        num_weights = len(self._state.weights)
        progress("dequantizing weights", num_weights, num_weights)
        self.weight_bytes = sum(weight.nbytes for weight in self._state.weights.values())

    def kv_bytes_per_block(self) -> int:
        """Bytes of one block over all layers."""
        channels = sum(heads * (key + value) for heads, key, value in self._state.shapes.values())
        return channels * self._config.block_size * np.dtype(np.float32).itemsize

    def allocate_kv(self, num_blocks: int) -> None:
        """Create the KV cache and, unless one was set, the block pool. Raises `OutOfMemory`, `ExtensionNotBuilt`."""
        if self.block_pool is None:
            self.block_pool = _block_pool(num_blocks, self._config.block_size)
        self._state.tables = self.block_pool
        num_slots = num_blocks * self._config.block_size
        try:
            for layer, (heads, key, value) in self._state.shapes.items():
                k, v = (np.zeros((num_slots, heads, channels), np.float32) for channels in (key, value))
                self._state.caches[layer] = LayerCache(k, v)
        except MemoryError as error:
            need = self.kv_bytes_per_block() * num_blocks
            raise OutOfMemory(f"a KV cache of {num_blocks} blocks ({need} bytes) does not fit into memory") from error

    def run(self, step: StepInput) -> Array:
        """What the forward returns: logits [R, vocab], or pooled vectors [S, hidden]."""
        return np.asarray(self._forward(StepOps(step, self._state)), np.float32)

    def launch(self, step: StepInput) -> None:
        """Compute the step in line, after the block copies that the pool has pending."""
        self._copy_blocks()
        self._output = sample_step(self.run(step), step)

    def _copy_blocks(self) -> None:
        assert self.block_pool is not None, "allocate_kv comes first"
        size = self._config.block_size
        for source, target in self.block_pool.take_copies():
            for cache in self._state.caches.values():
                for rows in (cache.k, cache.v):
                    rows[target * size : (target + 1) * size] = rows[source * size : (source + 1) * size]

    def collect(self) -> StepOutput:
        """The output of the step launched last."""
        assert self._output is not None, "collect without launch"
        return self._output


def build(
    config: ModelConfig, forward: Forward, executor_config: ExecutorConfig, *, progress: Progress
) -> ReferenceExecutor:
    """Dequantize the weights and return the executor. `config` is not needed: the forward says it all."""
    del config
    if executor_config.kv_cache_dtype != "bf16":
        raise InvalidRequest("kv_cache_dtype: the reference executor's cache is float32", param="kv_cache_dtype")
    return ReferenceExecutor(forward, executor_config, progress=progress)


def empty_step() -> StepInput:
    """A step without tokens."""
    ints, floats = np.empty(0, np.int32), np.empty(0, np.float32)
    return StepInput(
        token_ids=ints, positions=ints, query_start=np.zeros(1, np.int32), seq_lens=ints,
        block_tables=np.empty(0, np.int64), logit_rows=ints, targets=ints, temperature=floats, top_k=ints, top_p=floats,
        min_p=floats, seed=np.empty(0, np.uint64), sample_position=np.empty(0, np.int64), num_logprobs=ints,
    )  # fmt: skip


def _block_pool(num_blocks: int, block_size: int) -> BlockTables:
    try:
        from llmserve._C import BlockPool
    except ModuleNotFoundError as error:
        raise ExtensionNotBuilt("the compiled extension llmserve._C is missing; build it with: make build") from error
    pool: BlockTables = BlockPool(num_blocks, block_size, int.from_bytes(os.urandom(16)))
    return pool
