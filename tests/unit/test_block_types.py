"""Every block type against the `gguf` package or its definition bit by bit, and the quantizers of the tests."""

from __future__ import annotations

import struct
from typing import Final

import gguf
import numpy as np
import pytest

from llmserve.checkpoints.dequantize import dequantize
from llmserve.checkpoints.dtypes import BLOCKS, num_bytes
from llmserve.types import CheckpointTensor
from tests.ops.seeds import fresh_seed
from tests.tiny import quantizers
from tests.tiny.quantizers import BLOCK_TYPES, GGUF_TYPES, INTEGER_TYPES, Floats
from tests.tiny.random_blocks import HALVES, random_tensor

MAX_ERROR: Final = {
    # With minimums: a step is the group's range / the largest code, an error uniform in half of it.
    "q2_k": 1 / 3, "q4_1": 1 / 15, "q4_k": 1 / 15, "q5_1": 1 / 31, "q5_k": 1 / 31,
    # A step is the largest magnitude / the zero point; the largest values of the other sign lose one step.
    "q3_k": 1.2 / 8, "q4_0": 1.2 / 16, "q5_0": 1.2 / 32, "q6_k": 1.2 / 64, "q8_0": 1.2 / 256,
    # The steps of the codebook: 10 to 24 of 127.
    "iq4_nl": 0.08, "iq4_xs": 0.08,
    "i4_g32": 1.2 / 16, "i4_g64": 1.2 / 16, "i4_g128": 1.2 / 16, "i8": 1.2 / 256,
    "u4_g32": 1 / 15, "u4_g64": 1 / 15, "u4_g128": 1 / 15,
}  # fmt: skip
"""RMS of what quantizing changes, relative to that of values uniform around 0."""


def test_the_tables_name_every_block_type() -> None:
    blocks = {dtype for dtype, (elements, _) in BLOCKS.items() if elements > 1}
    assert blocks == set(HALVES) == {*BLOCK_TYPES, *INTEGER_TYPES} - {"i8"}
    assert set(MAX_ERROR) == {*BLOCK_TYPES, *INTEGER_TYPES}


@pytest.mark.parametrize("dtype", list(GGUF_TYPES))
def test_block_sizes_are_those_of_the_gguf_package(dtype: str) -> None:
    assert BLOCKS[dtype] == gguf.GGML_QUANT_SIZES[GGUF_TYPES[dtype]]


@pytest.mark.parametrize("dtype", BLOCK_TYPES)
def test_dequantize_agrees_with_the_gguf_package_bit_for_bit(dtype: str) -> None:
    seed = fresh_seed()
    tensor = random_tensor(np.random.default_rng(seed), dtype, 40, 1024)
    values = dequantize(tensor)
    stored = np.frombuffer(tensor.data, np.uint8).reshape(40, -1)
    expected = gguf.quants.dequantize(stored, GGUF_TYPES[dtype])
    assert values.dtype == np.float32
    assert np.isfinite(values).all()
    np.testing.assert_array_equal(values.view(np.uint32), expected.view(np.uint32), err_msg=f"seed={seed}")


def stored_value(row: bytes, dtype: str, k: int) -> np.float32:
    """Value `k` of a row by the definition of the integer forms, one number at a time."""
    if dtype == "i8":
        (code,), (scale,) = struct.unpack_from("<b", row, k), struct.unpack("<f", row[-4:])
        return np.float32(scale) * np.float32(code)
    group, header = int(dtype.split("_g")[1]), 2 if dtype[0] == "i" else 4
    block = row[k // group * (header + group // 2) :]
    run, at = divmod(k % group, 32)
    byte = block[header + 16 * run + at % 16]
    code = byte % 16 if at < 16 else byte // 16
    d, m = struct.unpack_from("<e", block)[0], struct.unpack_from("<e", block, header - 2)[0]
    if dtype[0] == "i":
        return np.float32(d) * np.float32(code - 8)
    return np.float32(d) * np.float32(code) + np.float32(m)


@pytest.mark.parametrize("dtype", INTEGER_TYPES)
def test_integer_forms_follow_their_definition_bit_for_bit(dtype: str) -> None:
    seed = fresh_seed()
    tensor = random_tensor(np.random.default_rng(seed), dtype, 5, 384)
    stored = tensor.data.tobytes()
    assert len(stored) == num_bytes(dtype, (5, 384))
    size = len(stored) // 5
    expected = np.array(
        [[stored_value(stored[size * row :][:size], dtype, k) for k in range(384)] for row in range(5)], np.float32
    )
    values = dequantize(tensor)
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values.view(np.uint32), expected.view(np.uint32), err_msg=f"seed={seed}")


def test_a_dtype_that_no_reader_gives_out_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        dequantize(CheckpointTensor("test", "q8_k", (1, 256), memoryview(bytes(292))))


def rounded(values: Floats, dtype: str) -> Floats:
    """Quantized and dequantized again."""
    if dtype in BLOCK_TYPES:
        return quantizers.dequantize(quantizers.quantize(values, dtype), dtype)
    stored = quantizers.quantize_integers(values, dtype)
    return dequantize(CheckpointTensor("test", dtype, values.shape, memoryview(stored.tobytes())))


@pytest.mark.parametrize("dtype", MAX_ERROR)
def test_quantizers_round_to_what_is_close(dtype: str) -> None:
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    values = rng.uniform(-1, 1, (24, 512)).astype(np.float32)
    if dtype in BLOCK_TYPES:
        values[:8] *= rng.uniform(0.2, 2, (8, 16)).repeat(32, axis=1)  # groups of a block differ in scale
    restored = rounded(values, dtype)
    error = np.sqrt(((restored - values) ** 2).mean() / (values**2).mean())
    assert MAX_ERROR[dtype] / 3 < error < MAX_ERROR[dtype], f"{error} seed={seed}"


@pytest.mark.parametrize("dtype", MAX_ERROR)
def test_quantizers_keep_zeros_and_constants(dtype: str) -> None:
    values = np.zeros((3, 512), np.float32)
    values[1], values[2] = 0.75, -0.5
    restored = rounded(values, dtype)
    assert not restored[0].any()
    np.testing.assert_allclose(restored, values, rtol=0.01)
