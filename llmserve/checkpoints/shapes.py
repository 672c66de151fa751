"""Do a checkpoint's tensors have the shapes that its configuration implies?

Invariant: after `check_shapes` every tensor that is present has its expected shape. Whether all tensors a network needs
are present is the model's question, except for biases, whose absence a model cannot notice.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from llmserve.checkpoints.names import split_layer
from llmserve.config import ModelConfig
from llmserve.errors import CheckpointError
from llmserve.types import CheckpointTensor

VECTOR_DTYPES = ("f32", "f16", "bf16")


def expected_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shape by canonical name, layers without their prefix."""
    hidden, inner, vocab = config.hidden_size, config.intermediate_size, config.vocab_size
    q_size, kv_size = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    rotary_dim = config.rope.rotary_dim or config.head_dim
    return {
        "embed": (vocab, hidden), "head": (vocab, hidden), "final_norm": (hidden,), "rope_factors": (rotary_dim // 2,),
        "attn_norm": (hidden,), "ffn_norm": (hidden,), "q_norm": (config.head_dim,), "k_norm": (config.head_dim,),
        "q": (q_size, hidden), "k": (kv_size, hidden), "v": (kv_size, hidden), "o": (hidden, q_size),
        "q_bias": (q_size,), "k_bias": (kv_size,), "v_bias": (kv_size,), "o_bias": (hidden,),
        "gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner),
        "gate_bias": (inner,), "up_bias": (inner,), "down_bias": (hidden,),
    }  # fmt: skip


def check_shapes(path: Path, config: ModelConfig, tensors: Mapping[str, CheckpointTensor]) -> None:
    """Raises `CheckpointError` naming the first tensor that does not fit."""
    if config.num_heads % config.num_kv_heads:
        raise CheckpointError(f"{path}: {config.num_heads} heads cannot share {config.num_kv_heads} key-value heads")
    expected = expected_shapes(config)
    for name, tensor in tensors.items():
        layer, part = split_layer(name)
        if layer is not None and layer >= config.num_layers:
            raise CheckpointError(f"{path}: tensor {name} is beyond the {config.num_layers} layers it declares")
        if tensor.shape != expected[part]:
            raise CheckpointError(
                f"{path}: tensor {name} has shape {list(tensor.shape)}, expected {list(expected[part])}"
            )
        if len(tensor.shape) == 1 and tensor.dtype not in VECTOR_DTYPES:
            raise CheckpointError(f"{path}: tensor {name} is a vector in {tensor.dtype}, which is not supported")


def check_biases(
    path: Path, config: ModelConfig, tensors: Mapping[str, CheckpointTensor], expected: frozenset[str] | None = None
) -> None:
    """Each kind of bias is on every layer or on none. `expected`: the kinds that must be there, None: whichever are."""
    present: dict[str, int] = {}
    for name in tensors:
        layer, part = split_layer(name)
        if layer is not None and part.endswith("_bias"):
            present[part] = present.get(part, 0) + 1
    kinds = present.keys() if expected is None else expected | present.keys()
    for part in sorted(kinds):
        if expected is not None and part not in expected:
            raise CheckpointError(f"{path}: it has {part} tensors, which its configuration rules out")
        if present.get(part, 0) != config.num_layers:
            raise CheckpointError(f"{path}: {present.get(part, 0)} of {config.num_layers} layers have a {part} tensor")
