"""Writes tiny networks with quantized layers in the formats of GPTQ, AWQ and compressed-tensors, by their layouts.

Slow and obvious: codes are placed into words one position at a time, and what a layer stands for is computed in float64
from codes, zero points and scales. Row 0 is of positive values and row 1 of negative ones, so that zero points take
both extremes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from tests.tiny.models import Array, TinyModel, config_json, make_tensors

Ints = NDArray[np.int64]

AWQ_ORDER: Final = (0, 2, 4, 6, 1, 3, 5, 7)
BF16: Final = np.dtype(ml_dtypes.bfloat16)
F16: Final = np.dtype(np.float16)
QUANTIZED_MODELS: Final = {
    model.name: model
    for model in (
        TinyModel(name="quantized_llama", model_type="llama", hidden_size=128, intermediate_size=256),
        TinyModel(name="quantized_qwen2", model_type="qwen2", hidden_size=128, intermediate_size=256, tied=True),
    )
}


@dataclass(frozen=True, slots=True)
class Layer:
    """A quantized matrix: the tensors that a file has of it, and what they stand for."""

    parts: Mapping[str, NDArray[Any]]
    values: NDArray[np.float64]
    """Exactly, [N, K]."""
    minimums: NDArray[np.float64]
    """What `scale * zero` is of each value, [N, K]: it is rounded to float16 where zero points differ."""

    @property
    def rounded(self) -> NDArray[np.float64]:
        """The values with their minimums in float16."""
        return self.values + self.minimums - self.minimums.astype(np.float16).astype(np.float64)


@dataclass(frozen=True, slots=True)
class Codes:
    """A matrix as integers: value = scale * (code - zero), by the group of the column."""

    codes: Ints  # [N, K], from 0
    scales: NDArray[Any]  # [N, groups]
    zeros: Ints  # [N, groups]
    groups: Ints  # [K]

    def layer(self, parts: Mapping[str, NDArray[Any]]) -> Layer:
        scales = self.scales.astype(np.float64)[:, self.groups]
        zeros = self.zeros[:, self.groups]
        return Layer(parts, scales * (self.codes - zeros), scales * zeros)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """How a matrix is quantized. Not every format has all."""

    bits: int = 4
    group_size: int = 32
    """-1: the row."""
    symmetric: bool = True
    ordered: bool = False
    scales: np.dtype[Any] = F16
    version: int = 2
    """Of GPTQ: 1 stores zero points minus one. Of compressed-tensors: 1 stores them as int8."""


def to_codes(values: Array, options: Options) -> Codes:
    """Plain rounding. With activation order, groups are of columns here and there."""
    columns = values.shape[1]
    size = columns if options.group_size == -1 else options.group_size
    groups = np.arange(columns) // size
    if options.ordered:
        np.random.default_rng(columns).shuffle(groups)
    top = (1 << options.bits) - 1
    middle = (top + 1) // 2
    members = [values[:, groups == group].astype(np.float64) for group in range(columns // size)]
    low = np.stack([np.minimum(member.min(axis=1), 0) for member in members], axis=1)
    high = np.stack([np.maximum(member.max(axis=1), 0) for member in members], axis=1)
    if options.symmetric:
        scales = np.maximum(high, -low) / (middle - 0.5)
        scales = scales.astype(options.scales)
        zeros = np.full(scales.shape, middle)
    else:
        scales = ((high - low) / top).astype(options.scales)
        zeros = np.rint(-low / scales.astype(np.float64)).clip(0, top).astype(np.int64)
    exact = np.rint(values / scales.astype(np.float64)[:, groups]).astype(np.int64)
    return Codes((exact + zeros[:, groups]).clip(0, top), scales, zeros, groups)


def into_words(fields: Ints, bits: int, order: tuple[int, ...] | None = None) -> NDArray[np.int32]:
    """[n, fields] → int32 [n, words], the lowest bits first. `order`: which of a word's fields is first, second, …"""
    in_word = 32 // bits
    padded = np.zeros((len(fields), -(-fields.shape[1] // in_word) * in_word), np.int64)
    padded[:, : fields.shape[1]] = fields
    words = np.zeros((len(fields), padded.shape[1] // in_word), np.int64)
    for position in range(in_word):
        field = position if order is None else order[position]
        words += padded[:, field::in_word] << bits * position
    return words.astype(np.uint32).view(np.int32)


def gptq(values: Array, options: Options) -> Layer:
    found = to_codes(values, options)
    zeros = into_words(found.zeros.T, options.bits)
    if options.version == 1:
        ones = sum(1 << options.bits * field for field in range(32 // options.bits))
        zeros = ((zeros.astype(np.int64) - ones) % (1 << 32)).astype(np.uint32).view(np.int32)
    return found.layer(
        {
            "qweight": into_words(found.codes, options.bits).T,
            "qzeros": zeros,
            "scales": found.scales.T,
            "g_idx": found.groups.astype(np.int32),
        }
    )


def awq(values: Array, options: Options) -> Layer:
    found = to_codes(values, options)
    return found.layer(
        {
            "qweight": into_words(found.codes.T, 4, AWQ_ORDER),
            "qzeros": into_words(found.zeros.T, 4, AWQ_ORDER),
            "scales": found.scales.T,
        }
    )


def pack_quantized(values: Array, options: Options) -> Layer:
    found = to_codes(values, options)
    parts = {
        "weight_packed": into_words(found.codes, options.bits),
        "weight_scale": found.scales,
        "weight_shape": np.array(values.shape, np.int64),
    }
    if not options.symmetric:
        old = (found.zeros - 8).astype(np.int8)
        parts["weight_zero_point"] = old if options.version == 1 else into_words(found.zeros.T, options.bits).T
    if options.ordered:
        parts["weight_g_idx"] = found.groups.astype(np.int32)
    return found.layer(parts)


def int_quantized(values: Array, options: Options) -> Layer:
    found = to_codes(values, Options(bits=8, group_size=-1, scales=options.scales))
    signed = (found.codes - 128).astype(np.int8)
    return found.layer({"weight": signed, "weight_scale": found.scales})


def gptq_config(options: Options, **changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "gptq", "bits": options.bits, "group_size": options.group_size, "sym": options.symmetric,
        "desc_act": options.ordered, "checkpoint_format": "gptq" if options.version == 1 else "gptq_v2",
        "damp_percent": 0.01, "true_sequential": True, "static_groups": False, "model_file_base_name": None, **changes,
    }  # fmt: skip


def awq_config(options: Options, **changes: Any) -> dict[str, Any]:
    return {
        "quant_method": "awq", "bits": 4, "group_size": options.group_size, "version": "gemm", "zero_point": True,
        "modules_to_not_convert": None, **changes,
    }  # fmt: skip


def compressed_config(scheme: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "input_activations": None, "output_activations": None, **scheme}
    return {
        "quant_method": "compressed-tensors", "quantization_status": "compressed", "ignore": ["lm_head"],
        "config_groups": {"group_0": group}, "kv_cache_scheme": None, "global_compression_ratio": 1.9,
        "format": "pack-quantized", "sparsity_config": {}, "transform_config": {}, "version": "0.12.2", **changes,
    }  # fmt: skip


def pack_quantized_config(options: Options, **changes: Any) -> dict[str, Any]:
    weights = {
        "num_bits": options.bits, "type": "int", "symmetric": options.symmetric, "dynamic": False, "observer": "minmax",
        "strategy": "channel" if options.group_size == -1 else "group",
        "group_size": None if options.group_size == -1 else options.group_size,
        "actorder": "group" if options.ordered else None, "block_structure": None,
    }  # fmt: skip
    return compressed_config({"weights": weights}, **changes)


def int_quantized_config(options: Options, **changes: Any) -> dict[str, Any]:
    del options
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "group_size": None}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True, "observer": None}
    return compressed_config({"weights": weights, "input_activations": inputs}, format="int-quantized", **changes)


@dataclass(frozen=True, slots=True)
class Format:
    """A format as one function that quantizes a matrix and one that says so in `config.json`."""

    quantize: Callable[[Array, Options], Layer]
    config: Callable[..., dict[str, Any]]


FORMATS: Final = {
    "gptq": Format(gptq, gptq_config),
    "awq": Format(awq, awq_config),
    "pack-quantized": Format(pack_quantized, pack_quantized_config),
    "int-quantized": Format(int_quantized, int_quantized_config),
}


@dataclass(slots=True)
class QuantizedFolder:
    """A network as it is about to be written; tests change it before."""

    config: dict[str, Any]
    arrays: dict[str, NDArray[Any]]
    layers: dict[str, Layer]
    """By the name of the layer. What is not in it is plain."""

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.config))
        save_file(
            {name: np.ascontiguousarray(array) for name, array in self.arrays.items()}, folder / "model.safetensors"
        )
        return folder

    def plain(self) -> dict[str, Array]:
        """All weights in float32 as their format defines them."""
        plain = {name: array for name, array in self.arrays.items() if name.rpartition(".")[0] not in self.layers}
        biases = {name: array for name, array in self.arrays.items() if name.endswith(".bias")}
        values = {f"{name}.weight": layer.values for name, layer in self.layers.items()}
        return {name: array.astype(np.float32) for name, array in {**plain, **biases, **values}.items()}


def quantize(
    model: TinyModel, format_: Format, options: Options, *, plain: tuple[str, ...] = ("lm_head",), **changes: Any
) -> QuantizedFolder:
    """The network with all its linear layers quantized, but those whose name has one of `plain` in it."""
    arrays: dict[str, NDArray[Any]] = {}
    layers: dict[str, Layer] = {}
    for name, values in make_tensors(model).items():
        module = name.removesuffix(".weight")
        is_linear = name.endswith("_proj.weight") or name == "lm_head.weight"
        if not is_linear or any(part in name for part in plain):
            arrays[name] = values
            continue
        values[0], values[1] = np.abs(values[0]), -np.abs(values[1])
        layers[module] = format_.quantize(values, options)
        arrays |= {f"{module}.{part}": array for part, array in layers[module].parts.items()}
    config = {**config_json(model), "quantization_config": format_.config(options, **changes)}
    return QuantizedFolder(config, arrays, layers)
