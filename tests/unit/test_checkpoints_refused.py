"""Quantized safetensors that are broken or not supported: one line that names the file and the tensor or the entry."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmserve.checkpoints import open_checkpoint
from llmserve.checkpoints.quantized import open_quantization
from llmserve.errors import CheckpointError
from tests.tiny.quantized import (
    BF16,
    FORMATS,
    QUANTIZED_MODELS,
    Options,
    QuantizedFolder,
    awq_config,
    gptq_config,
    int_quantized_config,
    pack_quantized_config,
    quantize,
)

LLAMA: Final = replace(QUANTIZED_MODELS["quantized_llama"], num_layers=1)
Q: Final = "model.layers.0.self_attn.q_proj"
OPTIONS: Final = Options()
Change = Callable[[QuantizedFolder], None]


def refused(quantization: Any) -> str:
    """The error of a `quantization_config`."""
    with pytest.raises(CheckpointError) as caught:
        open_quantization(quantization, Path("config.json"))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("config.json: ")
    return str(caught.value)


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ("gptq", "quantization_config is 'gptq', not an object"),
        ({}, "quantization method None is not supported; supported: gptq, awq, compressed-tensors"),
        ({"quant_method": "bitsandbytes"}, "quantization method 'bitsandbytes' is not supported"),
        ({"quant_method": ["awq"]}, "quantization method ['awq'] is not supported"),
        (gptq_config(OPTIONS, bits=3), "GPTQ of 3 bits is not supported; supported: 4 bits, and 8 bits with sym true"),
        (gptq_config(OPTIONS, bits=2), "GPTQ of 2 bits is not supported"),
        (gptq_config(OPTIONS, bits=8, sym=False), "GPTQ of 8 bits with sym false is not supported"),
        (gptq_config(OPTIONS, bits="4"), "bits is '4', not a positive integer"),
        (gptq_config(OPTIONS, group_size=16), "group_size 16 is not supported; supported: multiples of 32, and -1"),
        (gptq_config(OPTIONS, group_size=0), "group_size 0 is not supported"),
        (gptq_config(OPTIONS, group_size=None), "group_size None is not supported"),
        (gptq_config(OPTIONS, group_size=True), "group_size True is not supported"),
        (gptq_config(OPTIONS, sym="yes"), "sym is 'yes', not true or false"),
        (gptq_config(OPTIONS, checkpoint_format="marlin"), "checkpoint_format 'marlin' is not supported; supp"),
        (gptq_config(OPTIONS, is_marlin_format=True), "checkpoint_format 'marlin' is not supported"),
        (gptq_config(OPTIONS, pack_dtype="int64"), "pack_dtype 'int64' is not supported; supported: int32"),
        (gptq_config(OPTIONS, dynamic={"+:.*down": {"bits": 8}}), "dynamic gives modules settings of their own"),
        (gptq_config(OPTIONS, rotation="hadamard"), "rotation is not supported"),
        (awq_config(OPTIONS, bits=8), "AWQ of 8 bits is not supported; supported: 4 bits"),
        (awq_config(OPTIONS, version="gemv"), "AWQ version 'gemv' is not supported; supported: gemm"),
        (awq_config(OPTIONS, version="marlin"), "AWQ version 'marlin' is not supported"),
        (awq_config(OPTIONS, zero_point=False), "AWQ with zero_point false is not supported"),
        (pack_quantized_config(OPTIONS, format="float-quantized"), "format 'float-quantized' is not supported"),
        (pack_quantized_config(OPTIONS, format="marlin-24"), "format 'marlin-24' is not supported"),
        (pack_quantized_config(OPTIONS, kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme is not supported"),
        (pack_quantized_config(OPTIONS, transform_config={"a": 1}), "transform_config is not supported"),
        (pack_quantized_config(OPTIONS, sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config is not"),
        (pack_quantized_config(OPTIONS, quantization_status="frozen"), "quantization_status 'frozen' is not supported"),
        (pack_quantized_config(OPTIONS, config_groups={}), "config_groups is not an object with entries"),
        (pack_quantized_config(OPTIONS, config_groups={"a": ["Linear"]}), "a is ['Linear'], not an object"),
        (pack_quantized_config(OPTIONS, ignore=["re:("]), "ignore has the pattern 're:('"),
        (pack_quantized_config(OPTIONS, ignore=["a", 3]), "ignore is not a list of str"),
    ],
)  # fmt: skip
def test_configurations(quantization: Any, message: str) -> None:
    assert message in refused(quantization)


@pytest.mark.parametrize(
    ("make", "place", "change", "message"),
    [
        (pack_quantized_config, "weights", {"num_bits": 3}, "int weights of 3 bits, symmetric, a scale per group: not"),
        (pack_quantized_config, "weights", {"num_bits": 8, "symmetric": False}, "of 8 bits, asymmetric, a scale"),
        (pack_quantized_config, "weights", {"type": "float"}, "float weights of 4 bits"),
        (pack_quantized_config, "weights", {"strategy": "tensor"}, "a scale per tensor: not supported"),
        (pack_quantized_config, "weights", {"strategy": None, "group_size": None}, "a scale per tensor: not supported"),
        (pack_quantized_config, "weights", {"strategy": "block"}, "a scale per block: not supported"),
        (pack_quantized_config, "weights", {"group_size": 48}, "group_size 48 is not supported"),
        (pack_quantized_config, "weights", {"dynamic": True}, "dynamic weights are not supported"),
        (pack_quantized_config, "", {"weights": None}, "weights is None, not an object"),
        (pack_quantized_config, "", {"output_activations": {"num_bits": 8}}, "output_activations are not supported"),
        (pack_quantized_config, "", {"input_activations": {"num_bits": 8}}, "input_activations are not supported"),
        (pack_quantized_config, "", {"targets": ["LlamaAttention"]}, "target 'LlamaAttention' is not supported"),
        (int_quantized_config, "weights", {"symmetric": False}, "int weights of 8 bits, asymmetric, a scale per"),
        (int_quantized_config, "weights", {"num_bits": 4}, "int weights of 4 bits"),
        (int_quantized_config, "weights", {"strategy": "group", "group_size": 128}, "a scale per group: not supported"),
        (int_quantized_config, "", {"input_activations": None}, "input_activations is None, not an object"),
        (int_quantized_config, "input_activations", {"dynamic": False}, "dynamic False is not supported"),
        (int_quantized_config, "input_activations", {"symmetric": False}, "symmetric False is not supported"),
        (int_quantized_config, "input_activations", {"strategy": "tensor"}, "strategy 'tensor' is not supported"),
        (int_quantized_config, "input_activations", {"type": "float"}, "type 'float' is not supported"),
        (int_quantized_config, "input_activations", {"num_bits": 4}, "num_bits 4 is not supported"),
    ],
)  # fmt: skip
def test_schemes(make: Callable[[Options], dict[str, Any]], place: str, change: dict[str, Any], message: str) -> None:
    config = make(OPTIONS)
    group = config["config_groups"]["group_0"]
    (group[place] if place else group).update(change)
    found = refused(config)
    assert message in found
    assert "config_groups" in found or "group_0" in found


def without(part: str) -> Change:
    return lambda folder: folder.arrays.__delitem__(f"{Q}.{part}")


def instead(part: str, change: Callable[[Any], Any]) -> Change:
    def edit(folder: QuantizedFolder) -> None:
        folder.arrays[f"{Q}.{part}"] = change(folder.arrays[f"{Q}.{part}"])

    return edit


def entry(**changes: Any) -> Change:
    return lambda folder: folder.config["quantization_config"].update(changes)


def beside(folder: QuantizedFolder) -> None:
    folder.arrays[f"{Q}.weight"] = np.ones((128, 128), np.float32)


def foreign(name: str) -> Change:
    def edit(folder: QuantizedFolder) -> None:
        folder.arrays[name] = folder.arrays[f"{Q}.qweight"].copy()

    return edit


def with_value(part: str, at: Any, value: Any) -> Change:
    def edit(folder: QuantizedFolder) -> None:
        array = folder.arrays[f"{Q}.{part}"].copy()
        array[at] = value
        folder.arrays[f"{Q}.{part}"] = array

    return edit


def uneven(index: Any) -> Any:
    index = index.copy()
    index[0], index[1] = 1, 1
    return index


OPENING: Final[list[tuple[str, Change, str]]] = [
    ("gptq", without("scales"), "q_proj.scales is missing"),
    ("gptq", without("qweight"), "q_proj.qweight is missing"),
    ("gptq", without("qzeros"), "q_proj.qzeros is missing"),
    ("gptq", without("g_idx"), "q_proj.g_idx is missing"),
    ("gptq", instead("qweight", lambda a: a.astype(np.int64)), "q_proj.qweight is of type I64, expected I32"),
    ("gptq", instead("qweight", lambda a: a.reshape(-1)), "q_proj.qweight has shape [2048], expected a matrix"),
    ("gptq", instead("qweight", lambda a: a[:, :-4]), "q_proj.qweight is of 124 outputs, which are not"),
    ("gptq", instead("qweight", lambda a: a[:-1]), "q_proj.qweight is of 120 inputs, which are not a multiple"),
    ("gptq", instead("qweight", lambda a: a[:, :-8]), "q_proj.qzeros has shape [4, 16], expected [4, 15]"),
    ("gptq", instead("qzeros", lambda a: a[:2]), "q_proj.qzeros has shape [2, 16], expected [4, 16]"),
    ("gptq", instead("scales", lambda a: a.T), "q_proj.scales has shape [128, 4], expected [4, 128]"),
    ("gptq", instead("scales", lambda a: a.astype(np.int32)), "q_proj.scales is of type I32, expected f32 or f16"),
    ("gptq", instead("g_idx", lambda a: a[:-1]), "q_proj.g_idx has shape [127], expected [128]"),
    ("gptq", instead("g_idx", lambda a: a.astype(np.int64)), "q_proj.g_idx is of type I64, expected I32"),
    ("gptq", instead("g_idx", lambda a: a + 1), "q_proj.g_idx has groups from 1 to 4, not 0 to 3"),
    ("gptq", instead("g_idx", lambda a: a - 1), "q_proj.g_idx has groups from -1 to 2, not 0 to 3"),
    ("gptq", instead("g_idx", uneven), "q_proj.g_idx has groups of other lengths than 32"),
    ("gptq", entry(group_size=64), "down_proj.qzeros has shape [8, 16], expected [4, 16]"),
    ("gptq", entry(group_size=96), "down_proj.qweight is of 256 inputs, which are not a multiple of the group size"),
    ("gptq", entry(group_size=-1), "down_proj.qzeros has shape [8, 16], expected [1, 16]"),
    ("gptq", entry(bits=8), "GPTQ of 8 bits with sym false is not supported"),
    ("gptq", beside, "is there beside model.layers.0.self_attn.q_proj.weight"),
    ("gptq", foreign("model.embed_tokens.qweight"), "model.embed_tokens.qweight is of a quantized layer"),
    ("gptq", foreign("model.layers.0.mlp.experts.0.up_proj.qweight"), "0.up_proj.qweight is of a quantized layer"),
    ("gptq", foreign("model.layers.0.self_attn.spin"), "tensor model.layers.0.self_attn.spin is not known to"),
    ("awq", without("qzeros"), "q_proj.qzeros is missing"),
    ("awq", instead("qweight", lambda a: a[:-1]), "q_proj.qweight is of 127 inputs, which are not a multiple"),
    ("awq", instead("qweight", lambda a: a[:, :-1]), "q_proj.qzeros has shape [4, 16], expected [4, 15]"),
    ("awq", instead("scales", lambda a: a[:, 1:]), "q_proj.scales has shape [4, 127], expected [4, 128]"),
    ("pack-quantized", without("weight_packed"), "q_proj.weight_packed is missing"),
    ("pack-quantized", without("weight_shape"), "q_proj.weight_shape is missing"),
    ("pack-quantized", without("weight_zero_point"), "q_proj.weight_zero_point is missing"),
    ("pack-quantized", with_value("weight_shape", 1, 120), "q_proj.weight_shape is [128, 120], but weight_packed"),
    ("pack-quantized", instead("weight_zero_point", lambda a: a[:-1]), "has shape [15, 4], expected [16, 4]"),
    ("pack-quantized", entry(ignore=["lm_head", Q]), "q_proj.weight_packed is of a layer that quant"),
    ("int-quantized", without("weight_scale"), "q_proj.weight_scale is missing"),
    ("int-quantized", without("weight"), "q_proj.weight is missing"),
    ("int-quantized", instead("weight", lambda a: a.astype(np.float32)), "q_proj.weight_scale is there beside"),
    ("int-quantized", instead("weight_scale", lambda a: a[:, 0]), "q_proj.weight_scale has shape [128], expected [128"),
    ("int-quantized", instead("weight", lambda a: a[:-1]), "q_proj.weight_scale has shape [128, 1], expected [127, 1]"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "message"), OPENING)
def test_tensors_that_do_not_fit(name: str, change: Change, message: str, tmp_path: Path) -> None:
    folder = quantize(LLAMA, FORMATS[name], Options(symmetric=False, ordered=name == "gptq"))
    change(folder)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(folder.write(tmp_path))
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", FORMATS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_header_bytes_load_or_raise_our_error(name: str, tmp_path: Path, flips: list[tuple[int, int]]) -> None:
    pristine = tmp_path / "pristine"
    if not pristine.exists():
        folder = quantize(LLAMA, FORMATS[name], Options(symmetric=False, ordered=name == "gptq"))
        pristine.write_bytes((folder.write(tmp_path) / "model.safetensors").read_bytes())
    content = bytearray(pristine.read_bytes())
    for position, value in flips:
        content[position] = value
    (tmp_path / "model.safetensors").write_bytes(content)
    message = ""
    try:
        for tensor in open_checkpoint(tmp_path).tensors.values():
            assert tensor.data.nbytes
    except CheckpointError as error:
        message = str(error)
    assert "\n" not in message


def test_quantized_layers_without_a_configuration(tmp_path: Path) -> None:
    folder = quantize(LLAMA, FORMATS["int-quantized"], OPTIONS)
    del folder.config["quantization_config"]
    folder.arrays = {name: array for name, array in folder.arrays.items() if not name.endswith("_scale")}
    with pytest.raises(CheckpointError, match=r"type I8 is not supported yet \(tensor model\.layers\.0\.\S+\.weight\)"):
        open_checkpoint(folder.write(tmp_path))


def test_integers_in_place_of_a_norm(tmp_path: Path) -> None:
    folder = quantize(LLAMA, FORMATS["gptq"], OPTIONS)
    folder.arrays["model.norm.weight"] = np.ones(128, np.int32)
    with pytest.raises(CheckpointError, match=r"type I32 is not supported yet \(tensor model\.norm\.weight\)"):
        open_checkpoint(folder.write(tmp_path / "a"))
    folder.arrays["model.norm.weight"] = np.ones(128, np.float32)
    folder.arrays["model.layers.0.input_layernorm.weight"] = np.ones(128, np.int8)
    with pytest.raises(CheckpointError, match=r"type I8 is not supported yet"):
        open_checkpoint(folder.write(tmp_path / "b"))


SCALES: Final = [
    ("gptq", np.float16, np.inf, "has a scale that is not a number"),
    ("gptq", np.float16, np.nan, "has a scale that is not a number"),
    ("gptq", BF16, 1e30, "has the scale 1.00026e+30, which is beyond float16"),
    ("gptq", np.float32, 7e4, "has the scale 70000, which is beyond float16"),
    ("awq", np.float16, 6e4, "has a scale whose zero point is beyond float16"),
    ("pack-quantized", BF16, -1e9, "which is beyond float16"),
    ("int-quantized", np.float32, np.nan, "has a scale that is not a number"),
]


@pytest.mark.parametrize(("name", "dtype", "value", "message"), SCALES)
def test_scales_beyond_the_form(name: str, dtype: Any, value: float, message: str, tmp_path: Path) -> None:
    folder = quantize(LLAMA, FORMATS[name], Options(symmetric=False))
    part = "scales" if name in ("gptq", "awq") else "weight_scale"
    scales = folder.arrays[f"{Q}.{part}"].astype(dtype)
    scales[(1, 0) if part == "weight_scale" else (0, 1)] = value  # of output 1, whose zero point is 15
    folder.arrays[f"{Q}.{part}"] = scales
    tensor = open_checkpoint(folder.write(tmp_path)).tensors["layers.0.q"]
    with pytest.raises(CheckpointError) as caught:
        _ = tensor.data
    assert message in str(caught.value)
    assert f"{tmp_path / 'model.safetensors'}: tensor {Q}.{part} " in str(caught.value)


@pytest.mark.parametrize(("largest", "accepted"), [(2.0**-14, True), (2.0**-15, False)])
def test_scales_too_small_for_float16(largest: float, accepted: bool, tmp_path: Path) -> None:
    """BF16 reaches further down. What is lost must not exceed what float16 loses of the largest scale."""
    folder = quantize(LLAMA, FORMATS["gptq"], Options(scales=BF16))
    small = 2.0**-20 * 1.0234375
    scales = np.full((4, 128), largest).astype(BF16)
    scales[2, 7] = small
    folder.arrays[f"{Q}.scales"] = scales
    tensor = open_checkpoint(folder.write(tmp_path)).tensors["layers.0.q"]
    if accepted:
        assert tensor.data.nbytes == 128 * 4 * 18
        return
    with pytest.raises(
        CheckpointError, match=r"q_proj\.scales has the scale 9\.76\S*e-07, which float16 is too coarse for"
    ):
        _ = tensor.data
