"""Every block type against the `gguf` package bit by bit, and the quantizers that tests make weights with."""

from __future__ import annotations

from typing import Final

import gguf
import numpy as np
import pytest

from llmserve.checkpoints.dequantize import dequantize
from llmserve.checkpoints.dtypes import BLOCKS
from llmserve.types import CheckpointTensor
from tests.ops.seeds import fresh_seed
from tests.tiny import quantizers
from tests.tiny.quantizers import BLOCK_TYPES, GGUF_TYPES
from tests.tiny.random_blocks import HALVES, random_tensor

MAX_ERROR: Final = {
    # With minimums: a step is the group's range / the largest code, an error uniform in half of it.
    "q2_k": 1 / 3, "q4_1": 1 / 15, "q4_k": 1 / 15, "q5_1": 1 / 31, "q5_k": 1 / 31,
    # A step is the largest magnitude / the zero point; the largest values of the other sign lose one step.
    "q3_k": 1.2 / 8, "q4_0": 1.2 / 16, "q5_0": 1.2 / 32, "q6_k": 1.2 / 64, "q8_0": 1.2 / 256,
    # The steps of the codebook: 10 to 24 of 127.
    "iq4_nl": 0.08, "iq4_xs": 0.08,
}  # fmt: skip
"""RMS of what quantizing changes, relative to that of values uniform around 0."""


def test_the_tables_name_every_block_type() -> None:
    blocks = {dtype for dtype, (elements, _) in BLOCKS.items() if elements > 1}
    assert blocks == set(BLOCK_TYPES) == set(HALVES) == set(MAX_ERROR)


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


def test_a_dtype_that_no_reader_gives_out_is_a_key_error() -> None:
    with pytest.raises(KeyError):
        dequantize(CheckpointTensor("test", "q8_k", (1, 256), memoryview(bytes(292))))


@pytest.mark.parametrize("dtype", BLOCK_TYPES)
def test_quantizers_round_to_what_is_close(dtype: str) -> None:
    seed = fresh_seed()
    rng = np.random.default_rng(seed)
    values = rng.uniform(-1, 1, (24, 512)).astype(np.float32)
    values[:8] *= rng.uniform(0.2, 2, (8, 16)).repeat(32, axis=1)  # groups of a block differ in scale
    restored = quantizers.dequantize(quantizers.quantize(values, dtype), dtype)
    error = np.sqrt(((restored - values) ** 2).mean() / (values**2).mean())
    assert MAX_ERROR[dtype] / 3 < error < MAX_ERROR[dtype], f"{error} seed={seed}"


@pytest.mark.parametrize("dtype", BLOCK_TYPES)
def test_quantizers_keep_zeros_and_constants(dtype: str) -> None:
    values = np.zeros((3, 512), np.float32)
    values[1], values[2] = 0.75, -0.5
    restored = quantizers.dequantize(quantizers.quantize(values, dtype), dtype)
    assert not restored[0].any()
    np.testing.assert_allclose(restored, values, rtol=0.01)
