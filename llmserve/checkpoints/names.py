"""Tensor names: each file format's spelling ↔ the canonical one.

Canonical: `embed`, `layers.{i}.<part>`, `final_norm`, `head`, `rope_factors`; a bias is its weight's name with `_bias`.
Invariant: the two tables are one-to-one. A name that is not in them is unknown, never guessed.
"""

from __future__ import annotations

import re
from typing import Final

_GGUF_TOP: Final = {
    "token_embd.weight": "embed",
    "output_norm.weight": "final_norm",
    "output.weight": "head",
    "rope_freqs.weight": "rope_factors",
}
_GGUF_PARTS: Final = {
    "attn_norm": "attn_norm",
    "attn_q": "q",
    "attn_k": "k",
    "attn_v": "v",
    "attn_output": "o",
    "attn_q_norm": "q_norm",
    "attn_k_norm": "k_norm",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "gate",
    "ffn_up": "up",
    "ffn_down": "down",
}
_HF_TOP: Final = {
    "model.embed_tokens.weight": "embed",
    "model.norm.weight": "final_norm",
    "lm_head.weight": "head",
}
_HF_PARTS: Final = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "self_attn.q_norm": "q_norm",
    "self_attn.k_norm": "k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}
_LINEAR: Final = frozenset({"q", "k", "v", "o", "gate", "up", "down"})
_GGUF_LAYER: Final = re.compile(r"blk\.(0|[1-9]\d{0,4})\.(\w+)\.(weight|bias)", re.ASCII)
_HF_LAYER: Final = re.compile(r"model\.layers\.(0|[1-9]\d{0,4})\.([\w.]+)\.(weight|bias)", re.ASCII)
_CANONICAL_LAYER: Final = re.compile(r"layers\.(\d+)\.(\w+)", re.ASCII)


def from_gguf(name: str) -> str | None:
    """Canonical name of a GGUF tensor; None if it has none."""
    return _GGUF_TOP.get(name) or _from_layer(_GGUF_LAYER.fullmatch(name), _GGUF_PARTS)


def from_hf(name: str) -> str | None:
    """Canonical name of a Hugging Face tensor; None if it has none."""
    return _HF_TOP.get(name) or _from_layer(_HF_LAYER.fullmatch(name), _HF_PARTS)


def to_gguf(name: str) -> str:
    """GGUF spelling of a canonical name. Raises `KeyError`."""
    return _to_format(name, top=_GGUF_TOP, parts=_GGUF_PARTS, layer="blk")


def to_hf(name: str) -> str:
    """Hugging Face spelling of a canonical name. Raises `KeyError`."""
    return _to_format(name, top=_HF_TOP, parts=_HF_PARTS, layer="model.layers")


def is_ignored_hf(name: str) -> bool:
    """Buffers that old exporters wrote and that follow from the configuration."""
    return name.endswith(".rotary_emb.inv_freq")


def is_linear(name: str) -> bool:
    """Is this the weight of a linear layer, by its canonical name?"""
    return name == "head" or split_layer(name)[1] in _LINEAR


def split_layer(name: str) -> tuple[int | None, str]:
    """`layers.3.q` → (3, "q"); other canonical names → (None, name)."""
    match = _CANONICAL_LAYER.fullmatch(name)
    return (int(match[1]), match[2]) if match else (None, name)


def _from_layer(match: re.Match[str] | None, parts: dict[str, str]) -> str | None:
    if match is None or (part := parts.get(match[2])) is None:
        return None
    if match[3] == "bias":
        return f"layers.{match[1]}.{part}_bias" if part in _LINEAR else None
    return f"layers.{match[1]}.{part}"


def _to_format(name: str, *, top: dict[str, str], parts: dict[str, str], layer: str) -> str:
    index, part = split_layer(name)
    if index is None:
        return {canonical: spelling for spelling, canonical in top.items()}[part]
    kind = "bias" if part.endswith("_bias") else "weight"
    spellings = {canonical: spelling for spelling, canonical in parts.items()}
    return f"{layer}.{index}.{spellings[part.removesuffix('_bias')]}.{kind}"
