"""A Hugging Face `config.json` → `ModelConfig`.

Entries that a configuration leaves out take the default of their architecture. Invariant: an entry that changes results
and is not understood here is refused by name, never ignored.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from llmserve.checkpoints.fields import Fields
from llmserve.config import ModelConfig, RopeConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What an architecture assumes where its configuration is silent."""

    num_kv_heads: int | None = None
    """None: as many as heads."""
    head_dim: int | None = None
    """None: hidden_size / heads."""
    norm_eps: float = 1e-6
    max_position: int = 32768
    window: Literal["never", "all", "upper"] = "never"
    """`all`: every layer when `sliding_window` is set. `upper`: layers from `max_window_layers` on, when enabled."""
    sliding_window: int = 4096


ARCHITECTURES: Final = {
    "llama": Defaults(max_position=2048),
    "mistral": Defaults(num_kv_heads=8, max_position=4096 * 32, window="all"),
    "qwen2": Defaults(num_kv_heads=32, window="upper"),
    "qwen3": Defaults(num_kv_heads=32, head_dim=128, window="upper"),
}
ROPE_TYPES: Final = ("none", "default", "linear", "llama3")


def model_config(values: Mapping[str, Any], path: Path) -> ModelConfig:
    """The network's shape. `path` names the file in errors. Raises `CheckpointError`."""
    fields = Fields(values, path)
    arch = fields.text("model_type")
    defaults = ARCHITECTURES.get(arch)
    if defaults is None:
        raise fields.fail(f"model_type {arch!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    _refuse_unsupported(fields)
    hidden_size, num_heads = fields.size("hidden_size"), fields.size("num_attention_heads")
    head_dim = _head_dim(fields, defaults, hidden_size, num_heads)
    max_position = fields.size("max_position_embeddings", defaults.max_position)
    num_layers = fields.size("num_hidden_layers")
    return ModelConfig(
        architecture=arch,
        vocab_size=fields.size("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.size("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.size("num_key_value_heads", defaults.num_kv_heads or num_heads),
        head_dim=head_dim,
        norm_eps=fields.number("rms_norm_eps", defaults.norm_eps),
        rope=_rope(fields, head_dim=head_dim, max_position=max_position),
        max_position=max_position,
        tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
        sliding_window=_sliding_window(fields, defaults, num_layers),
    )


def bias_parts(values: Mapping[str, Any], path: Path) -> frozenset[str]:
    """Canonical parts of a layer that have a bias, e.g. `q_bias`, as the configuration says."""
    fields = Fields(values, path)
    arch = fields.text("model_type")
    parts: set[str] = set()
    if arch == "qwen2":
        parts |= {"q_bias", "k_bias", "v_bias"}
    elif arch != "mistral" and fields.flag("attention_bias", default=False):
        parts |= {"q_bias", "k_bias", "v_bias", "o_bias"}
    if arch == "llama" and fields.flag("mlp_bias", default=False):
        parts |= {"gate_bias", "up_bias", "down_bias"}
    return frozenset(parts)


def _refuse_unsupported(fields: Fields) -> None:
    if (act := fields.text("hidden_act", "silu")) != "silu":
        raise fields.fail(f"hidden_act {act!r} is not supported; supported: silu")


def _head_dim(fields: Fields, defaults: Defaults, hidden_size: int, num_heads: int) -> int:
    if fields.has("head_dim"):
        return fields.size("head_dim")
    if defaults.head_dim is not None:
        return defaults.head_dim
    if hidden_size % num_heads:
        raise fields.fail(f"hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}")
    return hidden_size // num_heads


def _rope(fields: Fields, *, head_dim: int, max_position: int) -> RopeConfig:
    """Both spellings: `rope_parameters`, or `rope_theta` beside `rope_scaling`."""
    rope = _rope_fields(fields)
    theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0))
    partial = rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0))
    rotary_dim = int(head_dim * partial)
    if partial > 1 or rotary_dim < 2 or rotary_dim % 2:
        raise fields.fail(f"partial_rotary_factor {partial} does not fit heads of {head_dim}")
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind in ("default", "none"):
        return RopeConfig(theta=theta, rotary_dim=rotary_dim)
    if kind == "linear":
        return RopeConfig(theta=theta, rotary_dim=rotary_dim, scaling="linear", factor=rope.number("factor"))
    if kind != "llama3":
        raise fields.fail(f"rope scaling of type {kind!r} is not supported; supported: {', '.join(ROPE_TYPES)}")
    return RopeConfig(
        theta=theta,
        rotary_dim=rotary_dim,
        scaling="llama3",
        factor=rope.number("factor"),
        low_freq_factor=rope.number("low_freq_factor"),
        high_freq_factor=rope.number("high_freq_factor"),
        original_max_len=rope.size("original_max_position_embeddings", max_position),
    )


def _rope_fields(fields: Fields) -> Fields:
    key = "rope_parameters" if fields.has("rope_parameters") else "rope_scaling"
    rope = fields.values.get(key)
    if rope is None:
        return Fields({}, fields.where)
    if not isinstance(rope, Mapping):
        raise fields.fail(f"{key} is {rope!r}, not an object")
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise fields.fail(f"{key} differs between layers, which is not supported yet")
    return Fields(rope, f"{fields.where}: {key}")


def _sliding_window(fields: Fields, defaults: Defaults, num_layers: int) -> int:
    """Tokens a query sees (itself included), 0 for all. One window for every layer is supported."""
    if defaults.window == "never" or ("sliding_window" in fields.values and not fields.has("sliding_window")):
        return 0
    if defaults.window == "upper" and not fields.flag("use_sliding_window", default=False):
        return 0
    num_windowed = _num_windowed_layers(fields, defaults, num_layers)
    if num_windowed == 0:
        return 0
    if num_windowed != num_layers:
        raise fields.fail("sliding_window on some layers only is not supported yet")
    return fields.size("sliding_window", defaults.sliding_window)


def _num_windowed_layers(fields: Fields, defaults: Defaults, num_layers: int) -> int:
    kinds = fields.values.get("layer_types")
    if isinstance(kinds, list):
        return sum(kind == "sliding_attention" for kind in kinds[:num_layers])
    if defaults.window == "all":
        return num_layers
    first = fields.values.get("max_window_layers")
    first = 28 if first is None else first
    if not isinstance(first, int) or first < 0:
        raise fields.fail(f"max_window_layers is {first!r}, not a number of layers")
    return max(0, num_layers - first)
