"""The GGUF reader against the `gguf` package: its writer makes the files, its reader and arithmetic are the oracle."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llmserve.checkpoints import names, open_checkpoint, open_text
from llmserve.checkpoints.dequantize import dequantize
from llmserve.checkpoints.gguf import MAX_INLINE, SkippedArray, read_header
from llmserve.checkpoints.mapping import MappedFile
from llmserve.errors import CheckpointError, ModelNotFound
from tests.tiny.quantizers import GGUF_TYPES
from tests.unit.checkpoint_files import HEAD_DIM, HIDDEN, LAYERS, VOCAB, gguf_shapes, write_gguf

Edit = Callable[[gguf.GGUFWriter], None]


@pytest.mark.parametrize("dtype", list(GGUF_TYPES))
def test_tensors_are_the_bytes_that_the_gguf_package_reads(tmp_path: Path, dtype: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", dtype=dtype)
    checkpoint = open_checkpoint(path)
    oracle = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    assert {names.to_gguf(name) for name in checkpoint.tensors} == oracle.keys()
    for name, tensor in checkpoint.tensors.items():
        expected = oracle[names.to_gguf(name)]
        assert tensor.name == name
        assert tensor.shape == tuple(int(size) for size in reversed(expected.shape))
        assert bytes(tensor.data) == expected.data.tobytes()
    assert checkpoint.total_bytes == sum(int(tensor.n_bytes) for tensor in oracle.values())


@pytest.mark.parametrize("dtype", list(GGUF_TYPES))
def test_dequantize_agrees_with_the_gguf_package_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", dtype=dtype, seed=3)
    checkpoint = open_checkpoint(path)
    for expected in gguf.GGUFReader(path).tensors:
        tensor = checkpoint.tensors[names.from_gguf(expected.name) or ""]
        values = dequantize(tensor)
        oracle = gguf.quants.dequantize(expected.data, expected.tensor_type)
        assert values.dtype == np.float32
        assert values.flags.writeable
        np.testing.assert_array_equal(values.view(np.uint32), oracle.reshape(tensor.shape).view(np.uint32))


def test_tensors_are_views_of_the_file_and_outlive_close(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(write_gguf(tmp_path / "m.gguf"))
    tensor = checkpoint.tensors["embed"]
    before = bytes(tensor.data)
    assert tensor.data.readonly
    checkpoint.close()
    assert not checkpoint.tensors
    assert bytes(tensor.data) == before
    checkpoint.close()  # twice is fine


def test_config_of_a_llama_file(tmp_path: Path) -> None:
    config = open_checkpoint(write_gguf(tmp_path / "m.gguf")).config
    assert (config.architecture, config.vocab_size, config.hidden_size) == ("llama", VOCAB, HIDDEN)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.head_dim) == (LAYERS, 4, 2, HEAD_DIM)
    assert (config.intermediate_size, config.max_position, config.sliding_window) == (96, 128, 0)
    assert config.norm_eps == pytest.approx(1e-5)
    assert (config.rope.theta, config.rope.style, config.rope.scaling) == (5000.0, "interleaved", "none")
    assert config.tie_word_embeddings


def test_head_tensor_unties(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", shapes={"output.weight": (VOCAB, HIDDEN)})
    checkpoint = open_checkpoint(path)
    assert not checkpoint.config.tie_word_embeddings
    assert checkpoint.tensors["head"].shape == (VOCAB, HIDDEN)


@pytest.mark.parametrize("arch", ["qwen2", "qwen3"])
def test_qwen_rotates_halves(tmp_path: Path, arch: str) -> None:
    assert open_checkpoint(write_gguf(tmp_path / "m.gguf", arch=arch)).config.rope.style == "half"


def test_rope_freqs_become_factors(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write_gguf(path, edit=lambda w: w.add_tensor("rope_freqs.weight", np.arange(1, 9, dtype=np.float32)))
    checkpoint = open_checkpoint(path)
    assert checkpoint.config.rope.scaling == "factors"
    assert checkpoint.config.rope.factors == tuple(float(i) for i in range(1, 9))
    assert checkpoint.tensors["rope_factors"].shape == (8,)


def test_linear_rope_scaling_and_window_and_key_length(tmp_path: Path) -> None:
    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(4.0)
        writer.add_sliding_window(32)
        writer.add_key_length(HEAD_DIM)
        writer.add_value_length(HEAD_DIM)
        writer.add_vocab_size(VOCAB)

    config = open_checkpoint(write_gguf(tmp_path / "m.gguf", edit=edit)).config
    assert (config.rope.scaling, config.rope.factor, config.sliding_window) == ("linear", 4.0, 32)


def test_custom_alignment(tmp_path: Path) -> None:
    plain = open_checkpoint(write_gguf(tmp_path / "a.gguf"))
    wide = open_checkpoint(write_gguf(tmp_path / "b.gguf", edit=lambda w: w.add_custom_alignment(256)))
    assert {n: bytes(t.data) for n, t in plain.tensors.items()} == {n: bytes(t.data) for n, t in wide.tensors.items()}


def test_version_2_is_read(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    data = path.read_bytes()
    path.write_bytes(data[:4] + struct.pack("<I", 2) + data[8:])
    assert len(open_checkpoint(path).tensors) == len(gguf_shapes())


def test_long_arrays_are_skipped_for_the_engine_and_decoded_for_text(tmp_path: Path) -> None:
    long = MAX_INLINE + 1

    def edit(writer: gguf.GGUFWriter) -> None:
        writer.add_array("test.words", [f"w{i}é" for i in range(long)])
        writer.add_array("test.numbers", list(range(long)))
        writer.add_array("test.flags", [True, False])
        writer.add_array("test.short", ["x", ""])

    file = MappedFile(write_gguf(tmp_path / "m.gguf", edit=edit))
    skipped = read_header(file, vocabulary=False).metadata
    assert skipped["test.words"] == SkippedArray(long)
    assert skipped["test.numbers"] == SkippedArray(long)
    assert (skipped["test.short"], skipped["test.flags"]) == (["x", ""], [True, False])
    full = read_header(file, vocabulary=True).metadata
    assert full["test.words"] == [f"w{i}é" for i in range(long)]
    assert full["test.numbers"] == list(range(long))
    file.close()


def _yarn(writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("unknown architecture", {"arch": "gemma2"}, r"architecture 'gemma2' is not supported.*llama, qwen2, qwen3"),
    ("rope kind", {"edit": _yarn}, r"'yarn' is not supported"),
    ("experts", {"edit": lambda w: w.add_expert_count(8)}, r"mixture-of-experts"),
    ("unequal lengths", {"edit": lambda w: (w.add_key_length(16), w.add_value_length(8))}, r"keys and values"),
    ("declared vocabulary", {"edit": lambda w: w.add_vocab_size(VOCAB + 1)}, r"40 rows, llama.vocab_size is 41"),
    ("too many tokens", {"vocabulary": VOCAB + 1}, r"40 rows for a vocabulary of 41 tokens"),
    ("tensor of no meaning", {"shapes": {"blk.0.attn_sinks.weight": (4,)}}, r"blk.0.attn_sinks.weight is not known"),
    ("wrong shape", {"shapes": {"blk.1.ffn_up.weight": (64, 64)}}, r"layers.1.up has shape \[64, 64\], expected \[96"),
    ("layer too many", {"shapes": {"blk.2.ffn_norm.weight": (HIDDEN,)}}, r"layers.2.ffn_norm is beyond the 2 layers"),
    ("bias on one layer", {"shapes": {"blk.0.attn_q.bias": (64,)}}, r"1 of 2 layers have a q_bias"),
    ("rope factors", {"shapes": {"rope_freqs.weight": (9,)}}, r"rope_freqs.weight is f32 \[9\], expected f32 \[8\]"),
]


@pytest.mark.parametrize(("options", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_is_not_supported_is_refused_by_name(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    path = write_gguf(tmp_path / "m.gguf", **options)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_checkpoint(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("number", "label"), [(9, "Q8_1"), (16, "IQ2_XXS"), (39, "MXFP4"), (28, "F64"), (999, "number 999")]
)
def test_unsupported_tensor_type_names_type_and_tensor(tmp_path: Path, number: int, label: str) -> None:
    path = _patched_info(tmp_path, kind=number)
    with pytest.raises(CheckpointError, match=rf"type {label} is not supported yet \(tensor token_embd.weight\)"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dims": (1 << 63, 1 << 63)}, "impossible shape"),
        ({"dims": (64, 0)}, "impossible shape"),
        ({"dims": (33, 40)}, "not whole blocks"),
        ({"offset": 1 << 40}, "truncated download"),
        ({"offset": (1 << 64) - 32}, "truncated download"),
        ({"offset": 7}, "not a multiple of 32"),
        ({"rank": 5}, "5 dimensions"),
        ({"rank": 0}, "0 dimensions"),
        ({"rank": 0xFFFFFFFF}, "dimensions"),
    ],
)
def test_corrupt_tensor_info(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(_patched_info(tmp_path, **change))


@pytest.mark.parametrize(
    ("start", "data", "message"),
    [
        (0, b"GGML", "not a GGUF file"),
        (4, struct.pack("<I", 1), "version 1 is not supported"),
        (4, struct.pack(">I", 3), "big-endian"),
        (8, struct.pack("<Q", 1 << 40), "claims 1099511627776 tensors"),
        (16, struct.pack("<Q", (1 << 64) - 1), "metadata entries"),
        (24, struct.pack("<Q", 1 << 62), "runs past the end"),
        (32, b"\xff\xfe", "not UTF-8"),
    ],
)
def test_corrupt_prefix(tmp_path: Path, start: int, data: bytes, message: str) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    content = bytearray(path.read_bytes())
    content[start : start + len(data)] = data
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(path)


def test_file_truncated_anywhere_is_one_clear_line(tmp_path: Path) -> None:
    """Every boundary of the header and then some: cutting after any byte of it, and inside the data."""
    content = write_gguf(tmp_path / "m.gguf").read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(1, 2600), len(content) // 2, len(content) - 40]:
        cut.write_bytes(content[:length])
        for open_side in (open_checkpoint, open_text):
            if open_side is open_text and length > 700:
                continue  # the text side does not read the tensor places
            with pytest.raises(CheckpointError) as caught:
                open_side(cut)
            assert "\n" not in str(caught.value)
            assert str(cut) in str(caught.value)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(flips=st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 255)), min_size=1, max_size=6))
def test_flipped_header_bytes_load_or_raise_our_error(tmp_path: Path, flips: list[tuple[int, int]]) -> None:
    pristine = tmp_path / "pristine.gguf"
    if not pristine.exists():
        write_gguf(pristine)
    content = bytearray(pristine.read_bytes())
    for position, value in flips:
        content[position] = value
    path = tmp_path / "flipped.gguf"
    path.write_bytes(content)
    for open_side in (open_checkpoint, open_text):
        message = ""
        try:
            open_side(path)
        except CheckpointError as error:
            message = str(error)
        assert "\n" not in message


def test_missing_and_empty_files(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFound, match="no such file"):
        open_checkpoint(tmp_path / "none.gguf")
    (tmp_path / "empty.gguf").touch()
    with pytest.raises(CheckpointError, match="empty"):
        open_checkpoint(tmp_path / "empty.gguf")


@pytest.mark.parametrize(
    "name", ["embed", "final_norm", "head", "layers.0.q", "layers.17.k_norm", "layers.3.down_bias"]
)
def test_names_round_trip(name: str) -> None:
    assert names.from_gguf(names.to_gguf(name)) == name
    assert names.from_hf(names.to_hf(name)) == name


def test_unknown_names_are_unknown() -> None:
    assert names.from_gguf("blk.0.attn_qkv.weight") is None
    assert names.from_gguf("blk.00.attn_q.weight") is None
    assert names.from_gguf("blk.0.attn_norm.bias") is None
    assert names.from_hf("model.layers.0.self_attn.qkv_proj.weight") is None
    assert names.is_ignored_hf("model.layers.0.self_attn.rotary_emb.inv_freq")


def _patched_info(
    folder: Path,
    *,
    rank: int | None = None,
    dims: tuple[int, int] | None = None,
    kind: int | None = None,
    offset: int | None = None,
) -> Path:
    """A file whose entry for the embedding is altered."""
    path = write_gguf(folder / "m.gguf")
    content = bytearray(path.read_bytes())
    start = content.index(b"token_embd.weight") + len(b"token_embd.weight")
    fields = list(struct.unpack_from("<IQQIQ", content, start))
    for i, value in enumerate([rank, *(dims or (None, None)), kind, offset]):
        fields[i] = fields[i] if value is None else value
    struct.pack_into("<IQQIQ", content, start, *fields)
    path.write_bytes(content)
    return path
