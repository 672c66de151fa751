"""The op seam: what a model file may say, and what an executor must know to do it.

A model file is written once against `Ops` and nothing else. It holds no arithmetic on tensors, no device branch, no
fused operation and no global context. Executors decide how: the CPU executor records a tape and compiles it, the
reference executor computes at once in NumPy float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from llmserve.types import CheckpointTensor, WeightsOrigin

Value = Any
"""An executor's own handle of an activation, `[num_tokens, …]`; num_tokens is known only at run time."""

NormKind = Literal["rms", "layer"]
ActKind = Literal["silu", "gelu", "gelu_tanh", "relu2"]
PoolKind = Literal["mean", "cls", "last"]


@dataclass(frozen=True, slots=True, eq=False)
class RopeSpec:
    """Rotary embedding. `inv_freq` already holds the scaling; angles are `position * inv_freq`, computed in float64."""

    style: Literal["half", "interleaved"]
    rotary_dim: int
    inv_freq: NDArray[np.float64]  # [rotary_dim / 2]
    attention_factor: float = 1.0
    """Multiplies cosine and sine (YaRN)."""


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """One attention layer. `kv_group` names the block-pool group whose tables it reads."""

    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    mask: Literal["causal", "bidirectional"] = "causal"
    window: int = 0
    """A query at i sees j with i - j < window; 0: all."""
    softcap: float = 0.0
    sinks: CheckpointTensor | None = None
    kv_group: Literal["full", "window", "mla", "none"] = "full"


@dataclass(frozen=True, slots=True)
class RouterSpec:
    """How tokens choose experts (traps: order of softmax and top-k, bias for the choice only, groups)."""

    weight: CheckpointTensor
    num_experts: int
    top_k: int
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    normalize: Literal["before_top_k", "after_top_k"] = "after_top_k"
    choice_bias: CheckpointTensor | None = None
    num_groups: int = 1
    top_k_groups: int = 1
    scaling: float = 1.0


@dataclass(frozen=True, slots=True)
class ExpertsSpec:
    """Stacked expert weights, `[num_experts, …]`, and the optional shared expert."""

    gate: CheckpointTensor
    up: CheckpointTensor
    down: CheckpointTensor
    act: ActKind = "silu"
    shared: ExpertsSpec | None = None
    shared_gate: CheckpointTensor | None = None


class SamplingState(Protocol):
    """What the sampling of one sequence remembers: its parameters (as in `SamplingParams`) and the tokens so far.

    It belongs to the sequence and survives a preemption. An executor calls `rewind` before it samples at a position
    and `record` after the whole step, so a step that failed or was aborted leaves no trace, and a position that is
    sampled again counts once. The extension has the real one; `reference_sampler` says what it does to logits.
    """

    @property
    def vocab_size(self) -> int: ...

    @property
    def num_prompt_tokens(self) -> int: ...

    @property
    def token_ids(self) -> Sequence[int]:
        """The prompt's tokens, then the generated ones."""

    @property
    def repetition_penalty(self) -> float: ...

    @property
    def frequency_penalty(self) -> float: ...

    @property
    def presence_penalty(self) -> float: ...

    @property
    def logit_bias(self) -> Sequence[tuple[int, float]]: ...

    @property
    def min_tokens(self) -> int: ...

    @property
    def stop_token_ids(self) -> Sequence[int]: ...

    @property
    def bad_words(self) -> Sequence[Sequence[int]]: ...

    @property
    def allowed_token_ids(self) -> Sequence[int] | None: ...

    @property
    def typical_p(self) -> float: ...

    def rewind(self, position: int) -> None:
        """Forget the tokens from `position` on. Raises `ValueError` when tokens before it were never recorded."""

    def record(self, token_id: int) -> None:
        """Add the token sampled behind all others."""


NO_TOKEN = -1
"""`StepOutput.token_ids` of a row whose masks leave no token to sample."""
NOT_FINITE = -2
"""`StepOutput.token_ids` of a row, sampled or scored, whose logits hold a NaN or have no finite maximum."""
_NO_ROWS = np.empty(0, np.int32)
_NO_MASKS = np.empty((0, 0), np.uint32)


@dataclass(slots=True)
class StepInput:
    """One step's work, explicit and complete. Rows of all sequences are concatenated.

    Shapes: T tokens, S sequences, R rows that need logits. `block_tables` holds the block pool's handles.
    Sampling arrays have one entry per logit row. `targets[r] >= 0` scores that token instead of sampling.

    Block copies are no part of it: the executor takes them from its block pool at `launch`, and executes them before
    it writes anything of the step. A step that did not finish leaves them, or has done them.
    """

    token_ids: NDArray[np.int32]  # [T]
    positions: NDArray[np.int32]  # [T]
    query_start: NDArray[np.int32]  # [S + 1]
    seq_lens: NDArray[np.int32]  # [S], tokens in the KV cache after this step
    block_tables: NDArray[np.int64]  # [S] handles of `BlockPool`
    logit_rows: NDArray[np.int32]  # [R] indices into T, ascending
    targets: NDArray[np.int32]  # [R], -1: sample
    temperature: NDArray[np.float32]  # [R]
    top_k: NDArray[np.int32]  # [R]
    top_p: NDArray[np.float32]  # [R]
    min_p: NDArray[np.float32]  # [R]
    seed: NDArray[np.uint64]  # [R]
    sample_position: NDArray[np.int64]  # [R] position of the sampled token: the Philox counter
    num_logprobs: NDArray[np.int32]  # [R], -1: none
    states: Sequence[SamplingState | None] = ()
    """[R], or empty when no row has one. Rows that score a target do not use theirs."""
    mask_rows: NDArray[np.int32] = field(default_factory=lambda: _NO_ROWS)  # [R] row of masks, -1: none; or empty
    masks: NDArray[np.uint32] = field(default_factory=lambda: _NO_MASKS)  # [num_masks, ceil(vocab / 32)]
    """Bit i % 32 of word i / 32 says whether token i may be sampled."""
    previous_rows: NDArray[np.int32] = field(default_factory=lambda: _NO_ROWS)
    """[T], or empty: the row of the step launched before, not collected yet, whose sampled token comes in place of
    `token_ids[t]`. Only executors that run ahead get it."""


@dataclass(slots=True)
class StepOutput:
    """What a step computed for its logit rows. `top_ids`/`top_logprobs` are padded to the largest `num_logprobs`."""

    token_ids: NDArray[np.int32]  # [R] sampled token, or the target, or NO_TOKEN, or NOT_FINITE
    logprobs: NDArray[np.float32]  # [R]; NaN where none was asked for
    ranks: NDArray[np.int32]  # [R]
    top_ids: NDArray[np.int32]  # [R, K]
    top_logprobs: NDArray[np.float32]  # [R, K]


class Ops(Protocol):
    """The operations a network is made of. T is the number of tokens of a step."""

    def embed(
        self,
        table: CheckpointTensor,
        *,
        scale: float = 1.0,
        positions: CheckpointTensor | None = None,
        types: CheckpointTensor | None = None,
    ) -> Value:
        """Rows of `table` for the step's token ids, times `scale`, plus position and type rows. `[T, hidden]`."""

    def norm(
        self,
        x: Value,
        weight: CheckpointTensor,
        *,
        kind: NormKind,
        eps: float,
        bias: CheckpointTensor | None = None,
        heads: int | None = None,
    ) -> Value:
        """RMS or layer norm over the last axis, or over each of `heads` heads."""

    def linear(
        self,
        x: Value,
        weight: CheckpointTensor,
        *,
        bias: CheckpointTensor | None = None,
        residual: Value | None = None,
        site: str | None = None,
    ) -> Value:
        """`x @ weight.T + bias + residual`, `[T, N]`. `site` names the LoRA site, resolved per step."""

    def split(self, x: Value, sizes: Sequence[int]) -> tuple[Value, ...]:
        """Views of the last axis."""

    def rope(self, x: Value, rope: RopeSpec, *, heads: int) -> Value:
        """Rotate each head of `x` by the step's positions."""

    def attention(self, q: Value, k: Value, v: Value, spec: AttentionSpec, *, layer: int) -> Value:
        """Append k and v to the paged cache of `layer`, then attend. `[T, heads * head_dim]`."""

    def act(self, x: Value, kind: ActKind, *, gate: Value | None = None) -> Value:
        """`kind(x)`, or `kind(gate) * x` when gated."""

    def add(self, x: Value, y: Value) -> Value:
        """Sum of two activations."""

    def scale(self, x: Value, by: float) -> Value:
        """`x * by`."""

    def moe(self, x: Value, router: RouterSpec, experts: ExpertsSpec, *, residual: Value | None = None) -> Value:
        """Mixture of experts over each token."""

    def logits(self, x: Value, head: CheckpointTensor, *, softcap: float | None = None, scale: float = 1.0) -> Value:
        """Logits of the rows in `step.logit_rows` only, `[R, vocab]`."""

    def pool(self, x: Value, kind: PoolKind) -> Value:
        """One vector per sequence of `step.pool_rows`, accumulated over chunks."""


class Executor(Protocol):
    """A loaded network. `launch` starts one step, `collect` waits for it; on CPU `launch` runs in line."""

    weight_bytes: int
    isa: str
    num_threads: int
    weights_origin: WeightsOrigin
    image_path: str
    """Of the packed weights; empty: they are in memory alone."""

    def allocate_kv(self, num_blocks: int) -> None:
        """Create the KV cache and the block pool. Raises `OutOfMemory`."""

    def kv_bytes_per_block(self) -> int:
        """Bytes of one block over all layers."""

    def launch(self, step: StepInput) -> None:
        """Start the step."""

    def collect(self) -> StepOutput:
        """Wait for the step launched last."""


class DeviceExecutor(Executor, Protocol):
    """An executor whose KV cache lies in memory of its own."""

    runs_ahead: bool
    """Whether one more step may be launched before the last is collected; steps are collected in order."""

    def free_bytes(self) -> int:
        """What the cache could take of it."""
