"""Packed weights against the NumPy dequantization: every form, odd shapes, and where each code lies."""

from __future__ import annotations

from dataclasses import replace
from typing import Final

import numpy as np
import pytest

pytest.importorskip("torch", reason="torch is not installed in this environment: make test-cuda")

from llmserve.checkpoints.dequantize import dequantize
from llmserve.checkpoints.dtypes import BLOCKS
from llmserve.ops.cuda.packing import TILE, PackedWeight, concatenate, pack, unpack
from llmserve.types import CheckpointTensor
from tests.ops.seeds import fresh_seed
from tests.tiny.random_blocks import random_tensor

PACKED: Final = (
    "q4_0", "q4_1", "q4_k", "i4_g32", "i4_g64", "i4_g128", "u4_g32", "u4_g64", "u4_g128",
    "q8_0", "q5_0", "q5_1", "q5_k", "iq4_nl", "iq4_xs", "q3_k", "q6_k", "i8",
)  # fmt: skip


def packed(tensor: CheckpointTensor) -> PackedWeight:
    found = pack(tensor)
    assert found is not None
    return found


@pytest.mark.parametrize("rows", [1, 16, 35, 100])
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("dtype", PACKED)
def test_what_is_packed_is_what_was_stored(dtype: str, blocks: int, rows: int) -> None:
    seed = fresh_seed()
    columns = BLOCKS[dtype][0] * blocks * (40 if dtype == "i8" else 1)
    tensor = random_tensor(np.random.default_rng(seed), dtype, rows, columns)
    weight = packed(tensor)
    np.testing.assert_array_equal(unpack(weight), dequantize(tensor), err_msg=f"seed {seed}")
    assert weight.codes.shape[:2] == ((rows + 31) // 32 * 2, (columns + TILE - 1) // TILE)
    assert (weight.bits == 4) == (dtype.startswith(("q4", "i4", "u4")))


@pytest.mark.parametrize("dtype", ["q4_0", "u4_g64", "q6_k", "i8"])
def test_pieces_make_the_whole(dtype: str) -> None:
    columns = 512
    tensor = random_tensor(np.random.default_rng(fresh_seed()), dtype, 75, columns)
    row = len(tensor.data) // 75
    pieces = [
        packed(replace(tensor, shape=(last - first, columns), data=tensor.data[first * row : last * row]))
        for first, last in ((0, 32), (32, 64), (64, 75))
    ]
    whole, joined = packed(tensor), concatenate(pieces)
    assert (joined.outputs, joined.inputs, joined.group) == (75, columns, whole.group)
    np.testing.assert_array_equal(joined.codes, whole.codes)
    np.testing.assert_array_equal(joined.scales, whole.scales)
    if whole.biases is not None:
        np.testing.assert_array_equal(joined.biases, whole.biases)


def test_each_code_lies_where_the_drawing_says() -> None:
    seed = fresh_seed()
    random = np.random.default_rng(seed)
    four, eight = (packed(random_tensor(random, dtype, 64, 256)) for dtype in ("i4_g32", "i8"))
    for _ in range(200):
        channel, k = int(random.integers(64)), int(random.integers(256))
        strip, row, tile = channel // 16, channel % 16, k // 64
        half, quad, in_eight = k % 64 // 32, k % 32 // 8, k % 8
        lane = row % 8 * 4 + quad
        # Registers: the half of the channels, then the pair of inputs. The second of a pair is 16 bits above the first.
        word = four.codes[strip, tile, 0, lane].view("<u4")[half * 2 + in_eight // 4]
        register = row // 8 + in_eight % 4 // 2 * 2
        code = int(word) >> (4 * register + 16 * (in_eight % 2)) & 15
        assert code == _code_of_4(four, channel, k), f"seed {seed}"
        word = eight.codes[strip, tile, half, lane].view("<u4")[in_eight // 4 * 2 + row // 8]
        assert np.uint8(int(word) >> 8 * (in_eight % 4) & 255).astype(np.int8) == _code_of_8(eight, channel, k)


def _code_of_4(weight: PackedWeight, channel: int, k: int) -> int:
    """By unpacking with scales of one."""
    return int(unpack(_unscaled(weight))[channel, k]) + 8


def _code_of_8(weight: PackedWeight, channel: int, k: int) -> int:
    return int(unpack(_unscaled(weight))[channel, k])


def _unscaled(weight: PackedWeight) -> PackedWeight:
    return replace(weight, scales=np.ones_like(weight.scales))


@pytest.mark.parametrize("dtype", ["q2_k", "f32", "f16", "bf16"])
def test_types_without_an_exact_form_are_left_alone(dtype: str) -> None:
    if dtype in ("f32", "f16", "bf16"):
        tensor = CheckpointTensor("test", dtype, (2, 64), memoryview(bytes(128 * BLOCKS[dtype][1])))
    else:
        tensor = random_tensor(np.random.default_rng(fresh_seed()), dtype, 2, 256)
    assert pack(tensor) is None


def test_rows_that_are_not_read_by_eights_are_left_alone() -> None:
    assert pack(random_tensor(np.random.default_rng(fresh_seed()), "i8", 3, 36)) is None


def test_the_order_of_columns_is_kept_and_not_applied() -> None:
    tensor = random_tensor(np.random.default_rng(fresh_seed()), "i4_g32", 5, 64)
    order = tuple(int(i) for i in np.random.default_rng(fresh_seed()).permutation(64))
    weight = packed(replace(tensor, order=order))
    assert weight.order is not None
    np.testing.assert_array_equal(weight.order, order)
    ordered = np.empty_like(unpack(weight))
    ordered[:, weight.order] = unpack(weight)
    np.testing.assert_array_equal(ordered, dequantize(replace(tensor, order=order)))


def test_only_matrices_are_packed() -> None:
    tensor = random_tensor(np.random.default_rng(fresh_seed()), "q8_0", 4, 64)
    with pytest.raises(ValueError, match="test: shape"):
        pack(replace(tensor, shape=(2, 2, 64)))
