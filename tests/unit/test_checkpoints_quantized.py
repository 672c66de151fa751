"""Quantized safetensors: every option of each format against float64 arithmetic on its published layout."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest

from llmserve.checkpoints import awq, names, open_checkpoint, packing
from llmserve.checkpoints.dequantize import dequantize
from llmserve.checkpoints.module import ConvertedTensor
from llmserve.errors import CheckpointError
from llmserve.types import CheckpointTensor
from tests.tiny.quantized import BF16, F16, FORMATS, QUANTIZED_MODELS, Options, QuantizedFolder, quantize

LLAMA: Final = replace(QUANTIZED_MODELS["quantized_llama"], num_layers=1)
QWEN2: Final = replace(QUANTIZED_MODELS["quantized_qwen2"], num_layers=1)
SIZES: Final = (32, 64, 128, -1)


def cases() -> Iterator[tuple[str, Options, str]]:
    """(format, options, the form its layers of 128 inputs must take)"""
    for size, scales in product(SIZES, (F16, BF16)):
        group = 128 if size == -1 else size
        for symmetric, ordered, version in product((True, False), (True, False), (1, 2)):
            options = Options(group_size=size, symmetric=symmetric, scales=scales, ordered=ordered, version=version)
            form = f"{'i' if symmetric else 'u'}4_g{group}"
            yield "gptq", options, form
            yield "pack-quantized", options, form
        for ordered in (True, False):
            wide = Options(bits=8, group_size=size, scales=scales, ordered=ordered)
            yield "gptq", wide, "q8_0"
            yield "gptq", replace(wide, version=1), "q8_0"
            yield "pack-quantized", wide, "q8_0"
        yield "awq", Options(group_size=size, symmetric=False, scales=scales), f"u4_g{group}"
        yield "awq", Options(group_size=size, symmetric=True, scales=scales), f"u4_g{group}"
    for scales in (F16, BF16, np.dtype(np.float32)):
        yield "int-quantized", Options(scales=scales), "i8"


def read(folder: QuantizedFolder, path: Path) -> dict[str, CheckpointTensor]:
    """The tensors of quantized layers, by the names of these."""
    tensors = open_checkpoint(folder.write(path)).tensors
    return {module: tensors[names.from_hf(f"{module}.weight") or ""] for module in folder.layers}


def differing(folder: QuantizedFolder, path: Path) -> list[str]:
    """Layers whose weights are not those of their format."""
    found = read(folder, path)
    return [
        name for name, layer in folder.layers.items()
        if not np.array_equal(dequantize(found[name]), expected(layer, found[name].dtype))
    ]  # fmt: skip


def expected(layer: Any, dtype: str) -> Any:
    return (layer.rounded if dtype.startswith("u4") else layer.values).astype(np.float32)


@pytest.mark.parametrize(("name", "options", "form"), list(cases()))
def test_weights_are_those_the_format_defines(name: str, options: Options, form: str, tmp_path: Path) -> None:
    folder = quantize(LLAMA, FORMATS[name], options)
    found = read(folder, tmp_path)
    assert len(found) == 7
    for module, layer in folder.layers.items():
        tensor = found[module]
        assert (tensor.dtype, tensor.shape) == (form, layer.values.shape)
        assert (tensor.order is not None) == (options.ordered and 0 < options.group_size < tensor.shape[1])
        np.testing.assert_array_equal(dequantize(tensor), expected(layer, form))
        # What rounding the minimums costs, where they are: half a step of float16, or of its smallest numbers.
        assert (np.abs(layer.rounded - layer.values) <= 2.0**-11 * layer.minimums + 2.0**-25).all()


@pytest.mark.parametrize("name", FORMATS)
def test_plain_layers_and_biases_stay_as_they_are(name: str, tmp_path: Path) -> None:
    options = Options(symmetric=name != "awq")
    folder = quantize(QWEN2, FORMATS[name], options, plain=("lm_head", "k_proj", "down_proj"))
    tensors = open_checkpoint(folder.write(tmp_path)).tensors
    assert len(folder.layers) == 5
    for source, array in folder.arrays.items():
        if source.rpartition(".")[0] in folder.layers and not source.endswith(".bias"):
            continue
        tensor = tensors[names.from_hf(source) or ""]
        assert tensor.dtype == "f32"
        np.testing.assert_array_equal(dequantize(tensor), array)
    assert {"layers.0.q_bias", "layers.0.k_bias", "layers.0.v_bias"} <= tensors.keys()


def test_biases_of_zeros_that_the_network_has_not_are_dropped(tmp_path: Path) -> None:
    folder = quantize(LLAMA, FORMATS["gptq"], Options(), plain=("lm_head", "k_proj"))
    zeros = {f"{module}.bias": np.zeros(len(layer.values), np.float16) for module, layer in folder.layers.items()}
    folder.arrays |= zeros
    tensors = open_checkpoint(folder.write(tmp_path / "a")).tensors
    assert not any(name.endswith("_bias") for name in tensors)
    folder.arrays["model.layers.0.self_attn.o_proj.bias"][3] = 1
    with pytest.raises(CheckpointError, match="o_bias tensors, which its configuration rules out"):
        open_checkpoint(folder.write(tmp_path / "b"))
    del folder.arrays["model.layers.0.self_attn.o_proj.bias"]
    folder.arrays["model.layers.0.self_attn.k_proj.bias"] = np.zeros(64, np.float16)
    with pytest.raises(CheckpointError, match="k_bias tensors, which its configuration rules out"):
        open_checkpoint(folder.write(tmp_path / "c"))


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_head_may_be_quantized(symmetric: bool, tmp_path: Path) -> None:
    """Its 199 rows leave the last word of the zero points half empty."""
    options = Options(symmetric=symmetric)
    folder = quantize(LLAMA, FORMATS["pack-quantized"], options, plain=(), ignore=[])
    assert "lm_head" in folder.layers
    assert differing(folder, tmp_path) == []


def test_bytes_are_made_when_they_are_read_and_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = quantize(LLAMA, FORMATS["gptq"], Options(symmetric=False, ordered=True))
    checkpoint = open_checkpoint(folder.write(tmp_path))
    tensor = checkpoint.tensors["layers.0.down"]
    assert isinstance(tensor, ConvertedTensor)
    calls: list[str] = []

    def counting(dtype: str, *arguments: Any, **keywords: Any) -> memoryview:
        calls.append(dtype)
        return packing.pack(dtype, *arguments, **keywords)

    monkeypatch.setattr("llmserve.checkpoints.module.pack", counting)
    total = checkpoint.total_bytes
    assert calls == []
    first, second = tensor.data, tensor.data
    assert calls == ["u4_g32", "u4_g32"]
    assert first == second
    assert first.readonly
    assert total == sum(tensor.data.nbytes for tensor in checkpoint.tensors.values())
    checkpoint.release_pages()
    checkpoint.close()
    assert tensor.data == first


@pytest.mark.parametrize("name", FORMATS)
def test_large_layers_are_converted_in_pieces(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = quantize(LLAMA, FORMATS[name], Options(symmetric=False, ordered=name != "awq"))
    for piece in (1, 24 * 128, 100 * 128):  # 8, 24 and 96 rows of 128 inputs
        monkeypatch.setattr(packing, "PIECE", piece)
        assert differing(folder, tmp_path / str(piece)) == []


@pytest.mark.parametrize("name", FORMATS)
def test_some_rows_are_those_of_the_whole(name: str, tmp_path: Path) -> None:
    tensor = read(quantize(LLAMA, FORMATS[name], Options(symmetric=False)), tmp_path)["model.layers.0.mlp.up_proj"]
    assert isinstance(tensor, ConvertedTensor)
    data = tensor.data
    size = len(data) // 256
    for first, last in ((0, 1), (0, 256), (3, 21), (64, 128), (255, 256)):
        assert tensor.rows(first, last) == data[first * size : last * size]
        assert replace(tensor).rows(first, last) == data[first * size : last * size]


def test_layers_of_one_input_share_their_order(tmp_path: Path) -> None:
    tensors = open_checkpoint(quantize(LLAMA, FORMATS["gptq"], Options(ordered=True)).write(tmp_path)).tensors
    q, k, gate = (tensors[f"layers.0.{part}"].order for part in ("q", "k", "gate"))
    assert q is k is gate is not None


def test_group_index_that_is_missing_or_unused(tmp_path: Path) -> None:
    plain = quantize(LLAMA, FORMATS["gptq"], Options())
    for module in plain.layers:
        del plain.arrays[f"{module}.g_idx"]
    assert differing(plain, tmp_path / "a") == []
    unused = quantize(LLAMA, FORMATS["pack-quantized"], Options())
    for module, layer in unused.layers.items():
        unused.arrays[f"{module}.weight_g_idx"] = np.full(layer.values.shape[1], -1, np.int32)
    assert differing(unused, tmp_path / "b") == []


@pytest.mark.parametrize(
    ("name", "part"), [("pack-quantized", "weight_zero_point"), ("int-quantized", "weight_zero_point")]
)
def test_zero_points_of_symmetric_layers(name: str, part: str, tmp_path: Path) -> None:
    """Older writers store them, and they say nothing; if they do, the configuration is wrong."""
    folder = quantize(LLAMA, FORMATS[name], Options())
    for module, layer in folder.layers.items():
        shape = layer.parts["weight_scale"].shape
        folder.arrays[f"{module}.{part}"] = np.zeros(shape, np.int8)
    assert differing(folder, tmp_path / "a") == []
    folder.arrays["model.layers.0.self_attn.k_proj.weight_zero_point"][3, 0] = 1
    with pytest.raises(CheckpointError, match=r"k_proj\.weight_scale has zero points other than"):
        differing(folder, tmp_path / "b")


def test_schemes_by_name_pattern_and_class(tmp_path: Path) -> None:
    """Several groups: the most specific target decides. Layers that are ignored are plain."""
    narrow, wide = Options(group_size=64, symmetric=False), Options(bits=8)
    folder = quantize(LLAMA, FORMATS["pack-quantized"], narrow, plain=("lm_head", "o_proj"))
    other = quantize(LLAMA, FORMATS["pack-quantized"], wide)
    eight = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj", "model.layers.0.mlp.up_proj"]
    for module in eight:
        folder.layers[module] = other.layers[module]
        folder.arrays = {name: array for name, array in folder.arrays.items() if not name.startswith(module)}
        folder.arrays |= {f"{module}.{part}": array for part, array in other.layers[module].parts.items()}
    config = folder.config["quantization_config"]
    other_group = other.config["quantization_config"]["config_groups"]["group_0"]
    config["config_groups"]["group_0"]["targets"] = ["Linear", "re:.*v_proj"]
    config["config_groups"]["group_1"] = {**other_group, "targets": [eight[0], "re:.*mlp\\.(up|down)_proj$"]}
    config["ignore"] = ["lm_head", "re:.*o_proj$"]
    for group in config["config_groups"].values():
        group["format"] = config["format"]
    config["format"] = "mixed-precision"
    del config["config_groups"]["group_0"]["weights"]["strategy"]  # it has a group size
    assert differing(folder, tmp_path) == []


# Planted mistakes: each is one that a reader could make, and the comparison above must notice.


def plant(folder: QuantizedFolder, path: Path) -> bool:
    """Is the mistake noticed, by the comparison or by the reader itself?"""
    try:
        return len(differing(folder, path)) == len(folder.layers)
    except CheckpointError:
        return True


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("version", [1, 2])
def test_versions_of_gptq_mixed_up_are_noticed(symmetric: bool, version: int, tmp_path: Path) -> None:
    folder = quantize(LLAMA, FORMATS["gptq"], Options(symmetric=symmetric, version=version))
    folder.config["quantization_config"]["checkpoint_format"] = "gptq_v2" if version == 1 else "gptq"
    assert plant(folder, tmp_path)
    if symmetric:
        with pytest.raises(CheckpointError, match="zero points other than 8, though its configuration says"):
            differing(folder, tmp_path)


def test_order_of_awq_ignored_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = quantize(LLAMA, FORMATS["awq"], Options(symmetric=False))
    for order in (np.arange(8), np.array([0, 2, 4, 6, 1, 3, 5, 7])):
        monkeypatch.setattr(awq, "_PLACES", order)
        assert plant(folder, tmp_path / str(order[1]))


@pytest.mark.parametrize("name", ["gptq", "awq", "pack-quantized"])
def test_a_zero_point_off_by_one_is_noticed(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = quantize(LLAMA, FORMATS[name], Options(symmetric=False))
    header = packing._header

    def off_by_one(dtype: str, columns: int, weight: packing.IntegerWeight, *rest: Any) -> Any:
        assert weight.zeros is not None
        return header(dtype, columns, replace(weight, zeros=weight.zeros + np.uint8(1)), *rest)

    monkeypatch.setattr(packing, "_header", off_by_one)
    assert plant(folder, tmp_path)


@pytest.mark.parametrize("name", ["gptq", "pack-quantized"])
def test_an_order_ignored_is_noticed(name: str, tmp_path: Path) -> None:
    folder = quantize(LLAMA, FORMATS[name], Options(ordered=True))
    for module, tensor in read(folder, tmp_path).items():
        values = dequantize(replace(tensor, order=None))
        assert not np.array_equal(values, expected(folder.layers[module], tensor.dtype))
        backwards = tuple(np.argsort(tensor.order or ()).tolist())
        values = dequantize(replace(tensor, order=backwards))
        assert not np.array_equal(values, expected(folder.layers[module], tensor.dtype))


def test_a_borrowed_zero_point_is_read_as_it_was_written(tmp_path: Path) -> None:
    """Format `gptq` subtracts from whole words: zero points of 0 are there, and change their neighbours."""
    folder = quantize(LLAMA, FORMATS["gptq"], Options(symmetric=False, version=1))
    stored = packing.unpack(folder.arrays["model.layers.0.self_attn.q_proj.qzeros"], 4)
    assert (stored[:, 0] == 15).all()
    assert differing(folder, tmp_path) == []
