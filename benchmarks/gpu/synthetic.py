"""Networks of real shapes with random weights: what their speed is, nothing of what they say.

Layers share their bytes on the host, and each has its own copy on the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

from llmserve.config import ModelConfig, RopeConfig
from llmserve.models import llama
from llmserve.ops.protocol import Ops, Value
from llmserve.types import CheckpointTensor

Storage = Literal["bf16", "i4_g128"]
_DRAWN: Final = (1 << 22) + 77
"""Values that are drawn; larger matrices repeat them, no row like another."""
LLAMA3_8B: Final = ModelConfig(
    architecture="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    norm_eps=1e-5,
    rope=RopeConfig(theta=500000.0),
    max_position=8192,
)


@dataclass(slots=True)
class _Weights:
    """Random tensors; those of one type and shape share their bytes."""

    random: np.random.Generator
    bytes_by_kind: dict[tuple[str, tuple[int, ...]], memoryview]

    def matrix(self, name: str, shape: tuple[int, int], storage: Storage) -> CheckpointTensor:
        key = storage, shape
        if key not in self.bytes_by_kind:
            self.bytes_by_kind[key] = _bf16(self.random, shape) if storage == "bf16" else _int4(self.random, shape)
        return CheckpointTensor(name, storage, shape, self.bytes_by_kind[key])

    def ones(self, name: str, size: int) -> CheckpointTensor:
        return CheckpointTensor(name, "f32", (size,), memoryview(np.ones(size, np.float32).tobytes()))


def _bf16(random: np.random.Generator, shape: tuple[int, int]) -> memoryview:
    """Values around zero of a magnitude that keeps activations finite."""
    drawn = random.standard_normal(_DRAWN, dtype=np.float32) * np.float32(shape[1] ** -0.5)
    return memoryview(np.resize((drawn.view(np.uint32) >> 16).astype(np.uint16), shape).tobytes())


def _int4(random: np.random.Generator, shape: tuple[int, int]) -> memoryview:
    """Groups of 128: a float16 scale, then 64 bytes of codes."""
    groups = shape[0] * shape[1] // 128
    blocks = np.resize(random.integers(0, 256, (_DRAWN // 66, 66), np.uint8), (groups, 66))
    blocks[:, :2] = np.frombuffer(np.float16(0.2 * shape[1] ** -0.5).tobytes(), np.uint8)
    return memoryview(blocks.tobytes())


def network(config: ModelConfig, storage: Storage) -> Callable[[Ops], Value]:
    """A Llama of this shape; embedding and head are bfloat16, as quantizers leave them."""
    weights = _Weights(np.random.default_rng(1), {})
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes = {
        "q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries),
        "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner),
    }  # fmt: skip
    tensors = {
        "embed": weights.matrix("embed", (config.vocab_size, hidden), "bf16"),
        "head": weights.matrix("head", (config.vocab_size, hidden), "bf16"),
        "final_norm": weights.ones("final_norm", hidden),
    }
    for layer in range(config.num_layers):
        prefix = f"layers.{layer}"
        tensors |= {f"{prefix}.{name}": weights.ones(f"{prefix}.{name}", hidden) for name in ("attn_norm", "ffn_norm")}
        for name, shape in shapes.items():
            tensors[f"{prefix}.{name}"] = weights.matrix(f"{prefix}.{name}", shape, storage)
    return llama.build(config, tensors)


def matrix_bytes(config: ModelConfig, storage: Storage) -> int:
    """Bytes of weights that a decode step reads at least: all matrices but the embedding."""
    hidden, inner = config.hidden_size, config.intermediate_size
    heads = (2 * config.num_heads + 2 * config.num_kv_heads) * config.head_dim
    values = config.num_layers * hidden * (heads + 3 * inner)
    per_value = 2.0 if storage == "bf16" else 66 / 128
    return int(values * per_value) + config.vocab_size * hidden * 2
