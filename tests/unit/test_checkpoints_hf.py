"""Hugging Face folders: the reader against the `safetensors` package, and `config.json` of each architecture."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from llmserve.checkpoints import hf_config as hf
from llmserve.checkpoints import names, open_checkpoint
from llmserve.checkpoints.dequantize import dequantize
from llmserve.errors import CheckpointError
from tests.unit.checkpoint_files import HEAD_DIM, HIDDEN, LAYERS, VOCAB, hf_config, hf_tensors, write_hf

CONFIG = Path("config.json")
LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize("num_shards", [1, 3])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_tensors_are_what_the_safetensors_package_wrote(tmp_path: Path, dtype: str, num_shards: int) -> None:
    arrays = hf_tensors(np.dtype(getattr(ml_dtypes, dtype, dtype)))
    checkpoint = open_checkpoint(write_hf(tmp_path / "m", tensors=arrays, num_shards=num_shards))
    assert {names.to_hf(name) for name in checkpoint.tensors} == arrays.keys()
    for name, tensor in checkpoint.tensors.items():
        expected = arrays[names.to_hf(name)]
        assert tensor.dtype == {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}[dtype]
        assert tensor.shape == expected.shape
        assert bytes(tensor.data) == expected.tobytes()
        np.testing.assert_array_equal(dequantize(tensor), expected.astype(np.float32))
    assert checkpoint.total_bytes == sum(array.nbytes for array in arrays.values())
    checkpoint.close()


def test_head_is_dropped_when_tied_and_kept_when_not(tmp_path: Path) -> None:
    arrays = hf_tensors(np.float32)
    arrays["lm_head.weight"] = arrays["model.embed_tokens.weight"].copy()
    arrays["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(8, np.float32)
    tied = open_checkpoint(write_hf(tmp_path / "a", tensors=arrays))
    untied = open_checkpoint(write_hf(tmp_path / "b", tensors=arrays, config=hf_config(tie_word_embeddings=False)))
    assert "head" not in tied.tensors
    assert untied.tensors["head"].shape == (VOCAB, HIDDEN)


def test_config_of_a_folder(tmp_path: Path) -> None:
    config = open_checkpoint(write_hf(tmp_path / "m")).config
    assert (config.architecture, config.vocab_size, config.hidden_size) == ("llama", VOCAB, HIDDEN)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (LAYERS, 4, 2, HEAD_DIM)
    assert (config.rope.theta, config.rope.style, config.rope.scaling) == (5000.0, "half", "none")
    assert (config.max_position, config.sliding_window, config.tie_word_embeddings) == (128, 0, True)


def test_defaults_of_silent_configurations() -> None:
    sparse = hf_config()
    for key in ("head_dim", "num_key_value_heads", "rope_theta", "max_position_embeddings", "tie_word_embeddings"):
        del sparse[key]
    llama = hf.model_config(sparse, CONFIG)
    assert (llama.head_dim, llama.num_kv_heads, llama.rope.theta, llama.max_position) == (16, 4, 10000.0, 2048)
    assert not llama.tie_word_embeddings
    mistral = hf.model_config({**sparse, "model_type": "mistral"}, CONFIG)
    assert (mistral.num_kv_heads, mistral.sliding_window, mistral.max_position) == (8, 4096, 131072)
    assert hf.model_config({**sparse, "model_type": "qwen3"}, CONFIG).head_dim == 128


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_scaling": None}, ("none", 1.0, 5000.0)),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, ("linear", 2.0, 5000.0)),
        ({"rope_scaling": LLAMA3}, ("llama3", 32.0, 5000.0)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7e5}}, ("none", 1.0, 7e5)),
        ({"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}, ("llama3", 32.0, 5e5)),
    ],
)
def test_rope_in_both_spellings(rope: dict[str, Any], expected: tuple[str, float, float]) -> None:
    found = hf.model_config(hf_config(**rope), CONFIG).rope
    assert (found.scaling, found.factor, found.theta) == expected
    if found.scaling == "llama3":
        assert (found.low_freq_factor, found.high_freq_factor, found.original_max_len) == (1.0, 4.0, 8192)


@pytest.mark.parametrize(
    ("model_type", "changes", "window"),
    [
        ("llama", {"sliding_window": 16}, 0),
        ("mistral", {"sliding_window": 16}, 16),
        ("mistral", {"sliding_window": None}, 0),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": False}, 0),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0}, 16),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True, "max_window_layers": 2}, 0),
        ("qwen2", {"sliding_window": 16, "use_sliding_window": True}, 0),
        ("qwen3", {"sliding_window": 16, "use_sliding_window": True, "layer_types": ["sliding_attention"] * 2}, 16),
        ("qwen3", {"sliding_window": 16, "use_sliding_window": True, "layer_types": ["full_attention"] * 2}, 0),
    ],
)
def test_sliding_window(model_type: str, changes: dict[str, Any], window: int) -> None:
    assert hf.model_config(hf_config(model_type, **changes), CONFIG).sliding_window == window


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "gemma3"}, "'gemma3' is not supported; supported: llama, mistral, qwen2, qwen3"),
        ({"model_type": None}, "model_type is missing"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4}}, "'yarn' is not supported; supported: none, default"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4}}, "low_freq_factor is missing"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "differs between layers"),
        ({"rope_scaling": "big"}, "not an object"),
        ({"hidden_size": -1}, "hidden_size is -1"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers is 'two'"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
        ({"head_dim": None, "hidden_size": 66}, "not a multiple of num_attention_heads"),
        ({"tie_word_embeddings": "yes"}, "not true or false"),
        ({"model_type": "qwen2", "use_sliding_window": True, "max_window_layers": 1}, "some layers only"),
    ],
)
def test_configurations_that_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        hf.model_config(hf_config(**changes), CONFIG)


@pytest.mark.parametrize(
    ("model_type", "changes", "parts"),
    [
        ("llama", {}, set()),
        ("llama", {"attention_bias": True}, {"q_bias", "k_bias", "v_bias", "o_bias"}),
        ("llama", {"mlp_bias": True}, {"gate_bias", "up_bias", "down_bias"}),
        ("mistral", {"attention_bias": True}, set()),
        ("qwen2", {}, {"q_bias", "k_bias", "v_bias"}),
        ("qwen3", {"attention_bias": True}, {"q_bias", "k_bias", "v_bias", "o_bias"}),
    ],
)
def test_biases_that_a_configuration_implies(model_type: str, changes: dict[str, Any], parts: set[str]) -> None:
    assert hf.bias_parts(hf_config(model_type, **changes), CONFIG) == parts


def test_biases_must_agree_with_the_configuration(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="0 of 2 layers have a k_bias tensor"):
        open_checkpoint(write_hf(tmp_path / "a", config=hf_config("qwen2")))
    arrays = hf_tensors(np.float32)
    arrays |= {f"model.layers.{i}.self_attn.q_proj.bias": np.ones(64, np.float32) for i in range(LAYERS)}
    with pytest.raises(CheckpointError, match="q_bias tensors, which its configuration rules out"):
        open_checkpoint(write_hf(tmp_path / "b", tensors=arrays))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 41}, r"tensor embed has shape \[40, 64\], expected \[41, 64\]"),
        ({"num_key_value_heads": 3}, "4 heads cannot share 3"),
        ({"num_hidden_layers": 1}, "beyond the 1 layers"),
    ],
)
def test_shapes_must_agree_with_the_configuration(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(write_hf(tmp_path / "m", config=hf_config(**changes)))


def _bare(folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config()))
    return folder


def test_folders_without_usable_weights(tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(tmp_path / "nothing")
    pickled = _bare(tmp_path / "pickled")
    (pickled / "pytorch_model.bin").touch()
    with pytest.raises(CheckpointError, match=r"pickled weights .* never loaded"):
        open_checkpoint(pickled)
    several = _bare(tmp_path / "several")
    for name in ("a", "b"):
        save_file(hf_tensors(np.float32), several / f"{name}.safetensors")
    with pytest.raises(CheckpointError, match=r"several \*\.safetensors"):
        open_checkpoint(several)


@pytest.mark.parametrize("file", ["../m/model.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin"])
def test_index_may_not_point_elsewhere(tmp_path: Path, file: str) -> None:
    folder = write_hf(tmp_path / "m")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": file}}))
    with pytest.raises(CheckpointError, match="not the name of a safetensors file"):
        open_checkpoint(folder)


def test_index_must_match_the_shards(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "m", num_shards=2)
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["lm_head.weight"] = "model-00001-of-00002.safetensors"
    path.write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight is not in model-00001"):
        open_checkpoint(folder)


def _write_raw(folder: Path, header: object, data: bytes = b"", *, length: int | None = None) -> Path:
    _bare(folder)
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    prefix = struct.pack("<Q", len(text) if length is None else length)
    (folder / "model.safetensors").write_bytes(prefix + text + data)
    return folder


def _entry(dtype: str = "F32", shape: tuple[int, ...] = (64,), begin: int = 0, end: int = 256) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"{", "not usable JSON"),
        (b"[" * 100_000, "not usable JSON"),
        (b"\xff\xfe", "not usable JSON"),
        ({"model.norm.weight": {"dtype": "F32"}}, "not usable JSON"),
        (
            {"model.norm.weight": _entry("I64", shape=(32,))},
            r"type I64 is not supported yet \(tensor model\.norm\.weight\)",
        ),
        ({"model.norm.weight": _entry("F8_E4M3")}, "type F8_E4M3"),
        ({"model.norm.weight": _entry(shape=(1 << 62, 1 << 62))}, "needs"),
        ({"model.norm.weight": _entry(shape=(-64, -1))}, "impossible shape"),
        ({"model.norm.weight": _entry(begin=-256, end=0)}, "needs 256 bytes"),
        ({"model.norm.weight": _entry(begin=256, end=512)}, "truncated download"),
        ({"model.norm.weight": _entry(), "b": _entry(shape=(2,), begin=4, end=12)}, "overlap"),
        ({"unknown.weight": _entry()}, r"unknown\.weight is not known to architecture llama"),
    ],
)
def test_corrupt_safetensors_headers(tmp_path: Path, header: object, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(_write_raw(tmp_path / "m", header, bytes(256)))
    assert "\n" not in str(caught.value)


def test_header_longer_than_the_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="its header claims 18446744073709551615 bytes"):
        open_checkpoint(_write_raw(tmp_path / "m", {}, length=(1 << 64) - 1))


def test_safetensors_truncated_anywhere(tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "m")
    path = folder / "model.safetensors"
    content = path.read_bytes()
    for length in [*range(1, 300), *range(300, len(content), 997), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError) as caught:
            open_checkpoint(folder)
        assert "\n" not in str(caught.value)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 1800), st.integers(0, 255)), min_size=1, max_size=6))
def test_flipped_header_bytes_load_or_raise_our_error(tmp_path: Path, flips: list[tuple[int, int]]) -> None:
    folder, pristine = tmp_path / "m", tmp_path / "pristine"
    if not pristine.exists():
        pristine.write_bytes((write_hf(folder) / "model.safetensors").read_bytes())
    content = bytearray(pristine.read_bytes())
    for position, value in flips:
        content[position] = value
    (folder / "model.safetensors").write_bytes(content)
    message = ""
    try:
        open_checkpoint(folder).close()
    except CheckpointError as error:
        message = str(error)
    assert "\n" not in message


def test_tensors_stay_readable_after_their_pages_were_released(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_hf(tmp_path))
    before = {name: bytes(tensor.data) for name, tensor in checkpoint.tensors.items()}
    checkpoint.release_pages()
    assert {name: bytes(tensor.data) for name, tensor in checkpoint.tensors.items()} == before
