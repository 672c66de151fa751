"""Narrow frozen configurations, one per component. Each component takes only its own."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

RopeStyle = Literal["half", "interleaved"]
Device = Literal["cpu", "cuda", "reference"]
KVCacheDtype = Literal["bf16", "fp16", "fp8", "int8"]
Speculation = Literal["auto", "off"]
DEFAULT_ITL_TARGET_MS = 50.0
DEFAULT_MAX_DRAFT_TOKENS, MAX_DRAFT_TOKENS = 15, 63


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding of a checkpoint."""

    theta: float = 10000.0
    """Base of the frequencies."""
    rotary_dim: int = 0
    """Rotated channels of a head; 0 means all of them."""
    style: RopeStyle = "half"
    """`half` pairs channel i with i + rotary_dim/2, `interleaved` pairs 2i with 2i + 1."""
    scaling: Literal["none", "linear", "llama3", "factors"] = "none"
    factor: float = 1.0
    """linear and llama3: the stretch."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_len: int = 8192
    factors: tuple[float, ...] = ()
    """`factors`: divisor of each frequency (GGUF `rope_freqs.weight`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """The shape of a network, read from a checkpoint, independent of its file format."""

    architecture: str
    """Key of `models.catalog`, e.g. `llama`, `qwen2`, `qwen3`."""
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeConfig
    max_position: int
    """Longest context the checkpoint was trained for."""
    tie_word_embeddings: bool = False
    sliding_window: int = 0
    """Tokens a query sees, itself included; 0 means all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConfig:
    """Where an executor keeps packed weights for the next start."""

    folder: Path
    checkpoint_id: str
    """Changes with the content of the checkpoint."""
    max_bytes: int
    """Of all images in the folder; those used longest ago make room."""
    min_bytes: int = 0
    """Smaller weights are packed into memory at each start."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutorConfig:
    """What an executor needs to build its program."""

    max_num_tokens: int = 512
    """Tokens of one step: the size of the activation arena."""
    max_num_seqs: int = 128
    """Sequences of one step."""
    max_logit_rows: int = 128
    """Rows of one step that need logits; at least max_num_seqs."""
    max_model_len: int = 2048
    """Positions a sequence can have."""
    block_size: int = 16
    num_threads: int = 0
    """0: one per core available to the process."""
    exact: bool = False
    """Activations and float weights in float32: slower, closer to the checkpoint."""
    kv_cache_dtype: KVCacheDtype = "bf16"
    """int8 halves the KV cache, with one scale for each token and head; so does fp8 (E4M3). fp16 and fp8: CUDA."""
    deterministic: bool = False
    """CUDA: a sequence's results do not depend on what else is in the step. On the CPU they never do."""
    host_kv_cache_bytes: int = 0
    """CUDA: host memory for cached blocks that leave the GPU."""
    isa: str = ""
    """Highest instruction set to use: scalar, avx2, avx512 or amx; empty: the best. It only lowers the choice."""
    images: ImageConfig | None = None
    """None: packed weights live in memory alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """All that an engine process is told at its start."""

    model_path: Path
    device: Device = "cpu"
    max_model_len: int = 0
    """0: the checkpoint's own, shortened to what the KV cache can hold."""
    max_num_seqs: int = 128
    max_num_batched_tokens: int = 512
    max_num_waiting: int = 0
    """Sequences that may wait for a place; more are refused as overload. 0: any number."""
    itl_target_ms: float = DEFAULT_ITL_TARGET_MS
    """Time between the tokens of running streams while prompts are computed beside them; it sizes the chunks of
    prompts. 0: no target, whole steps go to prompts."""
    priority_ageing_s: float = 10.0
    """Waiting time that counts as much as one priority; 0: priorities are strict."""
    enable_prefix_cache: bool = True
    """Keep the blocks of ended sequences for prompts that begin alike."""
    speculation: Speculation = "auto"
    """auto: guess tokens ahead from what was said before and verify several in a step, where that pays. Results are the
    same."""
    max_draft_tokens: int = DEFAULT_MAX_DRAFT_TOKENS
    """Tokens guessed ahead at most, for each sequence in a step."""
    block_size: int = 16
    kv_cache_bytes: int = 0
    """0: sized from the free memory."""
    host_kv_cache_bytes: int = 0
    """CUDA: host memory for cached blocks that leave the GPU; prompts that begin like them get them back. 0: none."""
    num_threads: int = 0
    exact: bool = False
    kv_cache_dtype: KVCacheDtype = "bf16"
    deterministic: bool = False
    """CUDA: results do not depend on the batch, at some cost. On the CPU they never do."""
    packed_cache_bytes: int | None = None
    """Most bytes of packed weights kept on disk for later starts; 0: none. None: $LLMSERVE_PACKED_CACHE_GIB, else 64
    GiB."""
    packed_cache_min_bytes: int = 256 << 20
    """Packed weights smaller than this are not kept: packing them takes no longer than looking for them."""
    step_lease: bool = True
    """Take turns, step by step, with other engines of this user on the same cores."""
    trace_path: Path | None = None
    """Where the engine writes what it does, for a trace viewer; a file that is there is continued."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """The HTTP frontend."""

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_name: str = ""
    """Empty: taken from MODEL."""
    drain_timeout_s: float = 30.0
    progress_timeout_s: float = 5.0
    """Readiness turns off when a busy engine made no progress for this long."""
    max_body_bytes: int = 16 * 1024 * 1024
    keep_alive_comment_s: float = 5.0
    generation_defaults: bool = True
    """Take sampling defaults from the checkpoint's generation config."""
    chat_template: str = field(default="")
    """Empty: the checkpoint's own."""
