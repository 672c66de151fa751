"""Writes tiny networks as real checkpoints: Hugging Face folders in safetensors and GGUF files.

GGUF files are written by the format's own Python package, so a reader of ours is never tested against a writer of ours.
`stored_tensors` says what a file holds after its types rounded the weights; golden values are computed from that.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
from safetensors import TensorSpec, serialize_file

from tests.tiny import quantizers
from tests.tiny.models import VOCAB_SIZE, Array, TinyModel, config_json, make_tensors

_GGUF_NAMES: Final = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write(model: TinyModel, folder: Path) -> Path:
    """Write the model as its `storage` says and return what to open."""
    if not model.is_gguf:
        return write_folder(model, folder / model.name, make_tensors(model), bf16=model.storage == "hf_bf16")
    path = folder / f"{model.name}.gguf"
    write_gguf(model, path)
    return path


def write_folder(model: TinyModel, folder: Path, tensors: dict[str, Array], *, bf16: bool = False) -> Path:
    """A Hugging Face folder of `config.json` and one safetensors file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config_json(model), indent=1))
    stored = {name: np.ascontiguousarray(_to_bf16(values) if bf16 else values) for name, values in tensors.items()}
    specs = {
        name: TensorSpec(
            dtype="bfloat16" if bf16 else "float32",
            shape=values.shape,
            data_ptr=values.ctypes.data,
            data_len=values.nbytes,
        )
        for name, values in stored.items()
    }
    serialize_file(specs, str(folder / "model.safetensors"), {"format": "pt"})
    return folder


def write_gguf(model: TinyModel, path: Path) -> None:
    """A GGUF file. Vectors are float32; matrices have the model's type."""
    writer = gguf.GGUFWriter(path, model.model_type)
    _write_metadata(writer, model)
    if model.rope_scaling:
        writer.add_tensor("rope_freqs.weight", _rope_factors(model))
    for name, values in make_tensors(model).items():
        stored = _permuted(model, name, values)
        kind = model.storage if values.ndim == 2 else "f32"
        raw_dtype = quantizers.GGUF_TYPES[kind]
        writer.add_tensor(_gguf_name(name), quantizers.quantize(stored, kind), raw_dtype=raw_dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def stored_tensors(model: TinyModel) -> dict[str, Array]:
    """Tensors by Hugging Face name, in float32, as they are after rounding to the stored type."""
    tensors = make_tensors(model)
    if model.storage == "hf_f32":
        return tensors
    if model.storage == "hf_bf16":
        return {name: (_to_bf16(values).astype(np.uint32) << 16).view(np.float32) for name, values in tensors.items()}
    kind = model.storage
    return {
        name: quantizers.dequantize(quantizers.quantize(values, kind), kind) if values.ndim == 2 else values
        for name, values in tensors.items()
    }


def _write_metadata(writer: Any, model: TinyModel) -> None:
    writer.add_name(model.name)
    writer.add_vocab_size(VOCAB_SIZE)
    writer.add_context_length(128)
    writer.add_embedding_length(model.hidden_size)
    writer.add_feed_forward_length(model.intermediate_size)
    writer.add_block_count(model.num_layers)
    writer.add_head_count(model.num_heads)
    writer.add_head_count_kv(model.num_kv_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    writer.add_rope_freq_base(model.theta)
    writer.add_rope_dimension_count(model.head_dim)


def _gguf_name(name: str) -> str:
    top = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    stem, kind = name.rsplit(".", 1)
    if stem in top:
        return f"{top[stem]}.{kind}"
    layer, part = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{_GGUF_NAMES[part]}.{kind}"


def _permuted(model: TinyModel, name: str, values: Array) -> Array:
    """Rows of q and k in the order of the `llama` architecture: the two halves of a head interleaved."""
    if model.model_type != "llama" or not ("q_proj" in name or "k_proj" in name):
        return values
    heads = model.num_heads if "q_proj" in name else model.num_kv_heads
    split = values.reshape(heads, 2, model.head_dim // 2, *values.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(values.shape)


def _rope_factors(model: TinyModel) -> Array:
    """The llama3 stretch as one divisor per frequency, as converters store it."""
    scaling = model.rope_scaling
    low, high, length = (
        scaling["low_freq_factor"],
        scaling["high_freq_factor"],
        scaling["original_max_position_embeddings"],
    )
    factors = []
    for index in range(0, model.head_dim, 2):
        wavelength = 2 * math.pi * model.theta ** (index / model.head_dim)
        smooth = (length / wavelength - low) / (high - low)
        if wavelength < length / high:
            factors.append(1.0)
        elif wavelength > length / low:
            factors.append(scaling["factor"])
        else:
            factors.append(1 / ((1 - smooth) / scaling["factor"] + smooth))
    return np.asarray(factors, np.float32)


def _to_bf16(values: Array) -> np.ndarray[Any, np.dtype[np.uint16]]:
    """Round to nearest even."""
    bits = values.astype("<f4").view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
