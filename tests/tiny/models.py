"""Tiny networks with the shapes and features of real ones, made from a seed.

Invariants: needs NumPy alone; the same bits come out on every machine (uniform draws of NumPy's frozen generator, no
libm); no norm weight is one, no bias is zero: a network that ignores one of them gives other logits; weights
are scaled so that logits have a standard deviation of at least two and attention is neither flat nor one-hot.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

VOCAB_SIZE: Final = 199
NUM_PROMPT_TOKENS: Final = 41
NUM_SCORED_IDS: Final = 32


Storage = Literal[
    "hf_f32", "hf_bf16", "f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0",
    "q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_nl", "iq4_xs",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyModel:
    """One network and the file it is stored in."""

    name: str
    model_type: Literal["llama", "mistral", "qwen2", "qwen3"]
    storage: Storage = "hf_f32"
    """`hf_*`: a folder with safetensors; otherwise a GGUF file whose matrices have this type."""
    hidden_size: int = 96
    intermediate_size: int = 160
    num_layers: int = 2
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 32
    norm_eps: float = 1e-5
    theta: float = 10000.0
    tied: bool = False
    window: int = 0
    rope_scaling: Mapping[str, Any] = field(default_factory=dict)
    """As in `config.json`: rope_type, factor, …"""

    @property
    def is_gguf(self) -> bool:
        return not self.storage.startswith("hf_")

    @property
    def qkv_bias(self) -> bool:
        return self.model_type == "qwen2"

    @property
    def qk_norm(self) -> bool:
        return self.model_type == "qwen3"


LLAMA3_SCALING: Final = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
"""With heads of 32 and 41 positions, frequencies fall into all three ranges of the formula."""

_GGUF_TYPES: Final = ("f32", "f16", "bf16", "q4_0", "q4_1", "q8_0")

MODELS: Final = {
    model.name: model
    for model in (
        TinyModel(name="llama", model_type="llama", hidden_size=64, head_dim=16, num_layers=3, theta=500.0),
        TinyModel(name="llama_bf16", model_type="llama", storage="hf_bf16", num_heads=6, num_kv_heads=3, head_dim=16),
        TinyModel(name="llama_tied", model_type="llama", hidden_size=80, num_heads=5, num_kv_heads=1, head_dim=16,
                  tied=True),
        TinyModel(name="llama_eps", model_type="llama", norm_eps=0.3),
        TinyModel(name="llama_linear", model_type="llama", rope_scaling={"rope_type": "linear", "factor": 4.0}),
        TinyModel(name="llama_llama3", model_type="llama", rope_scaling=LLAMA3_SCALING),
        TinyModel(name="mistral", model_type="mistral", hidden_size=72, intermediate_size=136, head_dim=80, window=7),
        TinyModel(name="qwen2", model_type="qwen2", hidden_size=192, num_heads=6, theta=1e6),
        TinyModel(name="qwen2_d64", model_type="qwen2", hidden_size=128, num_heads=2, num_kv_heads=1, head_dim=64,
                  tied=True),
        TinyModel(name="qwen3", model_type="qwen3", hidden_size=88, head_dim=128, norm_eps=1e-3, theta=1000.0),
        TinyModel(name="qwen3_q8_0", model_type="qwen3", storage="q8_0", head_dim=64, tied=True),
        TinyModel(name="qwen2_q4_0", model_type="qwen2", storage="q4_0", head_dim=16),
        TinyModel(name="llama_factors", model_type="llama", storage="q4_1", rope_scaling=LLAMA3_SCALING),
        *(
            TinyModel(
                name=f"llama_gguf_{storage}", model_type="llama", storage=storage, num_heads=6, num_kv_heads=2,
                head_dim=16, tied=storage in ("q4_1", "f16"),
            )
            for storage in _GGUF_TYPES
        ),
    )
}  # fmt: skip

_WIDE: Final[tuple[Storage, ...]] = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k", "iq4_xs")
_NARROW: Final[tuple[Storage, ...]] = ("q5_0", "q5_1", "iq4_nl")

BLOCK_MODELS: Final = {
    model.name: model
    for model in (
        *(TinyModel(name=f"llama_{kind}", model_type="llama", storage=kind) for kind in _NARROW),
        *(TinyModel(name=f"llama_{kind}", model_type="llama", storage=kind, hidden_size=256, intermediate_size=512,
                    num_heads=8, tied=kind in ("q4_k", "q6_k")) for kind in _WIDE),
    )
}  # fmt: skip
"""One network for each further block type; those with blocks of 256 have rows of whole blocks. No golden values are
kept for them: their truth is the reference executor, which the golden values of `MODELS` hold."""


def config_json(model: TinyModel) -> dict[str, Any]:
    """The network's Hugging Face configuration."""
    rope = {"rope_theta": model.theta, "rope_type": "default", **model.rope_scaling}
    config: dict[str, Any] = {
        "model_type": model.model_type,
        "architectures": [f"{model.model_type.capitalize()}ForCausalLM"],
        "vocab_size": VOCAB_SIZE,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": rope,
        "max_position_embeddings": 128,
        "tie_word_embeddings": model.tied,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    if model.model_type == "mistral":
        config["sliding_window"] = model.window
    return config


def make_tensors(model: TinyModel) -> dict[str, Array]:
    """All tensors by Hugging Face name, before any quantization."""
    shapes = _shapes(model)
    seed = int.from_bytes(hashlib.sha256(model.name.encode()).digest()[:4], "little")
    draws = np.random.RandomState(seed)  # the one generator whose stream is promised never to change
    return {name: _draw(draws, name, shape) for name, shape in shapes.items()}


def prompt_ids(model: TinyModel) -> list[int]:
    """The prompt that golden values are for."""
    start = len(model.name)
    return [(start + 37 * index + index * index // 3) % VOCAB_SIZE for index in range(NUM_PROMPT_TOKENS)]


def scored_ids(model: TinyModel) -> list[int]:
    """The tokens whose log-probabilities are golden, at every position."""
    start = len(model.name)
    return sorted({(start + 6 * index) % VOCAB_SIZE for index in range(NUM_SCORED_IDS)})


def digest(tensors: Mapping[str, Array]) -> str:
    """sha256 over names, shapes and float32 bytes."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        total.update(f"{name} {list(tensors[name].shape)}\n".encode())
        total.update(np.ascontiguousarray(tensors[name], "<f4").tobytes())
    return total.hexdigest()


def _shapes(model: TinyModel) -> dict[str, tuple[int, ...]]:
    hidden, inner = model.hidden_size, model.intermediate_size
    q_size, kv_size = model.num_heads * model.head_dim, model.num_kv_heads * model.head_dim
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB_SIZE, hidden)}
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}"
        shapes[f"{prefix}.input_layernorm.weight"] = (hidden,)
        for name, size in (("q", q_size), ("k", kv_size), ("v", kv_size)):
            shapes[f"{prefix}.self_attn.{name}_proj.weight"] = (size, hidden)
            if model.qkv_bias:
                shapes[f"{prefix}.self_attn.{name}_proj.bias"] = (size,)
        if model.qk_norm:
            shapes[f"{prefix}.self_attn.q_norm.weight"] = (model.head_dim,)
            shapes[f"{prefix}.self_attn.k_norm.weight"] = (model.head_dim,)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, q_size)
        shapes[f"{prefix}.post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}.mlp.gate_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}.mlp.up_proj.weight"] = (inner, hidden)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, inner)
    shapes["model.norm.weight"] = (hidden,)
    if not model.tied:
        shapes["lm_head.weight"] = (VOCAB_SIZE, hidden)
    return shapes


def _draw(draws: np.random.RandomState, name: str, shape: tuple[int, ...]) -> Array:
    values = draws.random_sample(shape) * 2.0 - 1.0  # uniform in [-1, 1): standard deviation 1 / sqrt(3)
    if "norm" in name:
        scaled = 1.0 + 0.7 * values
    elif name.endswith("bias"):
        scaled = 1.2 * values
    elif "embed" in name:
        scaled = 0.8 * values
    else:
        gain = 3.0 if "lm_head" in name else 1.5 if "q_proj" in name or "k_proj" in name else 1.0
        scaled = values * (gain * math.sqrt(3.0 / shape[-1]))
    return scaled.astype(np.float32)
