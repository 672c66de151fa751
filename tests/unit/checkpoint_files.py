"""Small checkpoints for the tests of the readers, written by the formats' own libraries (`gguf`, `safetensors`)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import gguf
import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from llmserve.checkpoints.dtypes import BLOCKS
from tests.tiny.quantizers import GGUF_TYPES, quantize

HIDDEN: Final = 64
INNER: Final = 96
VOCAB: Final = 40
HEADS: Final = 4
KV_HEADS: Final = 2
HEAD_DIM: Final = 16
LAYERS: Final = 2

HF_SHAPES: Final = {
    "input_layernorm": (HIDDEN,), "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN), "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM), "post_attention_layernorm": (HIDDEN,),
    "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN), "mlp.down_proj": (HIDDEN, INNER),
}  # fmt: skip


def random_array(rng: np.random.Generator, shape: tuple[int, ...]) -> NDArray[np.float32]:
    return rng.standard_normal(shape).astype(np.float32)


def write_gguf(
    path: Path,
    *,
    arch: str = "llama",
    dtype: str = "q4_1",
    seed: int = 0,
    shapes: Mapping[str, tuple[int, ...]] | None = None,
    edit: Callable[[gguf.GGUFWriter], None] | None = None,
    vocabulary: int = VOCAB,
) -> Path:
    """A two-layer model whose matrices are in `dtype`. `shapes` adds or replaces tensors, `edit` adds metadata.

    Types with blocks of 256 have rows eight times as wide.
    """
    widen = 8 if BLOCKS[dtype][0] == 256 else 1
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(LAYERS)
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN * widen)
    writer.add_feed_forward_length(INNER * widen)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(5000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([f"tök{i}" for i in range(vocabulary)])
    writer.add_token_types([1] * vocabulary)
    writer.add_token_merges(["a b", "ab c"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    if edit is not None:
        edit(writer)
    rng = np.random.default_rng(seed)
    for name, shape in gguf_shapes(shapes, widen=widen).items():
        stored = dtype if len(shape) == 2 else "f32"
        writer.add_tensor(name, quantize(random_array(rng, shape), stored), raw_dtype=GGUF_TYPES[stored])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_shapes(extra: Mapping[str, tuple[int, ...]] | None = None, *, widen: int = 1) -> dict[str, tuple[int, ...]]:
    hidden, inner, kv = HIDDEN * widen, INNER * widen, KV_HEADS * HEAD_DIM * widen
    layer = {
        "attn_norm": (hidden,), "attn_q": (hidden, hidden), "attn_k": (kv, hidden), "attn_v": (kv, hidden),
        "attn_output": (hidden, hidden), "ffn_norm": (hidden,), "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden), "ffn_down": (hidden, inner),
    }  # fmt: skip
    layers = {f"blk.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in layer.items()}
    top = {"token_embd.weight": (VOCAB, hidden), "output_norm.weight": (hidden,)}
    return {**top, **layers, **(extra or {})}


def hf_tensors(dtype: Any, seed: int = 0) -> dict[str, NDArray[Any]]:
    """Tensors of a two-layer model under their Hugging Face names."""
    rng = np.random.default_rng(seed)
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    shapes |= {f"model.layers.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in HF_SHAPES.items()}
    return {name: random_array(rng, shape).astype(dtype) for name, shape in shapes.items()}


def hf_config(model_type: str = "llama", **changes: Any) -> dict[str, Any]:
    values = {
        "model_type": model_type, "hidden_size": HIDDEN, "intermediate_size": INNER, "vocab_size": VOCAB,
        "num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM, "rms_norm_eps": 1e-5, "rope_theta": 5000.0, "max_position_embeddings": 128,
        "hidden_act": "silu", "tie_word_embeddings": True,
    }  # fmt: skip
    return {**values, **changes}


def write_hf(
    folder: Path,
    *,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, NDArray[Any]] | None = None,
    num_shards: int = 1,
) -> Path:
    """A Hugging Face folder in bf16, in one file or in shards with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config or hf_config()))
    arrays = dict(tensors or hf_tensors(ml_dtypes.bfloat16))
    if num_shards == 1:
        save_file(arrays, folder / "model.safetensors")
        return folder
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05}-of-{num_shards:05}.safetensors"
        part = {name: array for i, (name, array) in enumerate(arrays.items()) if i % num_shards == shard}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder
