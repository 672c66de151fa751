"""GGUF metadata → `ModelConfig`.

Invariant: what the metadata says and this file does not know to change results is refused, never ignored.
"""

from __future__ import annotations

import struct
from typing import Any, Final

from llmserve.checkpoints.fields import Fields
from llmserve.checkpoints.gguf import Header, SkippedArray
from llmserve.checkpoints.mapping import MappedFile
from llmserve.config import ModelConfig, RopeConfig, RopeStyle
from llmserve.errors import CheckpointError

ROPE_STYLES: Final[dict[str, RopeStyle]] = {"llama": "interleaved", "qwen2": "half", "qwen3": "half"}
"""The converter to GGUF permutes the rows of q and k for `llama` (and so Mistral): rotated pairs lie side by side."""


def model_config(file: MappedFile, header: Header) -> ModelConfig:
    """The network's shape. Raises `CheckpointError` naming the file and the entry."""
    fields = Fields(header.metadata, file.path)
    arch = fields.text("general.architecture")
    if arch not in ROPE_STYLES:
        raise fields.fail(f"architecture {arch!r} is not supported; supported in GGUF: {', '.join(ROPE_STYLES)}")
    _refuse_unsupported(fields, arch)
    hidden_size, num_heads = fields.size(f"{arch}.embedding_length"), fields.size(f"{arch}.attention.head_count")
    head_dim = _head_dim(fields, arch, hidden_size, num_heads)
    max_position = fields.size(f"{arch}.context_length")
    return ModelConfig(
        architecture=arch,
        vocab_size=_vocab_size(fields, header, arch),
        hidden_size=hidden_size,
        intermediate_size=fields.size(f"{arch}.feed_forward_length"),
        num_layers=fields.size(f"{arch}.block_count"),
        num_heads=num_heads,
        num_kv_heads=fields.size(f"{arch}.attention.head_count_kv", num_heads),
        head_dim=head_dim,
        norm_eps=fields.number(f"{arch}.attention.layer_norm_rms_epsilon"),
        rope=_rope(fields, file, header, head_dim),
        max_position=max_position,
        tie_word_embeddings="output.weight" not in header.tensors,
        sliding_window=_sliding_window(fields, arch),
    )


def _refuse_unsupported(fields: Fields, arch: str) -> None:
    if fields.values.get(f"{arch}.expert_count"):
        raise fields.fail("mixture-of-experts models are not supported yet")
    if fields.values.get("split.count", 0) not in (0, 1):
        raise fields.fail("models split over several GGUF files are not supported yet")
    for key in (f"{arch}.attention.scale", f"{arch}.logit_scale", f"{arch}.residual_scale", f"{arch}.embedding_scale"):
        if fields.has(key):
            raise fields.fail(f"{key} is not supported yet")


def _head_dim(fields: Fields, arch: str, hidden_size: int, num_heads: int) -> int:
    if not fields.has(f"{arch}.attention.key_length"):
        if hidden_size % num_heads:
            raise fields.fail(f"embedding_length {hidden_size} is not a multiple of head_count {num_heads}")
        return hidden_size // num_heads
    head_dim = fields.size(f"{arch}.attention.key_length")
    if fields.size(f"{arch}.attention.value_length", head_dim) != head_dim:
        raise fields.fail("keys and values of different length are not supported")
    return head_dim


def _vocab_size(fields: Fields, header: Header, arch: str) -> int:
    """Rows of the embedding; the declared sizes must agree with it."""
    embed = header.tensors.get("token_embd.weight")
    if embed is None or len(embed.shape) != 2:
        raise fields.fail("tensor token_embd.weight is missing or not a matrix")
    rows = embed.shape[0]
    if (declared := fields.size(f"{arch}.vocab_size", rows)) != rows:
        raise fields.fail(f"token_embd.weight has {rows} rows, {arch}.vocab_size is {declared}")
    num_tokens = _length(fields.values.get("tokenizer.ggml.tokens"))
    if num_tokens > rows:
        raise fields.fail(f"token_embd.weight has {rows} rows for a vocabulary of {num_tokens} tokens")
    return rows


def _length(array: Any) -> int:
    if isinstance(array, SkippedArray):
        return array.length
    return len(array) if isinstance(array, list) else 0


def _rope(fields: Fields, file: MappedFile, header: Header, head_dim: int) -> RopeConfig:
    arch = fields.text("general.architecture")
    prefix = f"{arch}.rope"
    rotary_dim = fields.size(f"{prefix}.dimension_count", head_dim)
    kind = fields.text(f"{prefix}.scaling.type", "none")
    # Files from before `scaling.type` state a linear stretch as `scale_linear`.
    legacy = fields.number(f"{prefix}.scale_linear", 1.0)
    factor = fields.number(f"{prefix}.scaling.factor", 1.0) if kind == "linear" else legacy
    factors = _rope_factors(file, header, rotary_dim)
    if kind not in ("none", "linear"):
        raise fields.fail(f"rope scaling of type {kind!r} is not supported; supported: none, linear, rope_freqs.weight")
    if factors and factor != 1.0:
        raise fields.fail("rope_freqs.weight together with linear rope scaling is not supported")
    theta, style = fields.number(f"{prefix}.freq_base", 10000.0), ROPE_STYLES[arch]
    if rotary_dim > head_dim or rotary_dim % 2:
        raise fields.fail(f"{prefix}.dimension_count {rotary_dim} does not fit into heads of {head_dim}")
    if factors:
        return RopeConfig(theta=theta, rotary_dim=rotary_dim, style=style, scaling="factors", factors=factors)
    if factor != 1.0:
        return RopeConfig(theta=theta, rotary_dim=rotary_dim, style=style, scaling="linear", factor=factor)
    return RopeConfig(theta=theta, rotary_dim=rotary_dim, style=style)


def _rope_factors(file: MappedFile, header: Header, rotary_dim: int) -> tuple[float, ...]:
    info = header.tensors.get("rope_freqs.weight")
    if info is None:
        return ()
    if info.dtype != "f32" or info.shape != (rotary_dim // 2,):
        raise CheckpointError(
            f"{file.path}: rope_freqs.weight is {info.dtype} {list(info.shape)}, expected f32 [{rotary_dim // 2}]"
        )
    factors = struct.unpack_from(f"<{rotary_dim // 2}f", file.map, info.start)
    if not all(0 < factor < float("inf") for factor in factors):
        raise CheckpointError(f"{file.path}: rope_freqs.weight holds values that are not positive numbers")
    return factors


def _sliding_window(fields: Fields, arch: str) -> int:
    window = fields.values.get(f"{arch}.attention.sliding_window")
    if not window:
        return 0
    if fields.has(f"{arch}.attention.sliding_window_pattern"):
        raise fields.fail("layers with different sliding windows are not supported yet")
    return fields.size(f"{arch}.attention.sliding_window")
