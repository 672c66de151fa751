"""Rows to int8, and products of int8, whose sums are exact: bit for bit in batches of every size."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np
import pytest

from llmserve.checkpoints.dequantize import dequantize
from tests.ops.seeds import fresh_seed
from tests.tiny.random_blocks import random_tensor

torch = pytest.importorskip("torch", reason="torch is not installed in this environment: make test-cuda")

from llmserve.ops.cuda.linear import make_workspace  # noqa: E402
from tests.cuda import linear_cases as cases  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor, device

    from llmserve.ops.cuda.launchers import Launchers

SHAPES: Final = (  # rows, outputs, inputs
    (1, 48, 256), (2, 100, 80), (7, 35, 1536), (8, 16, 64), (9, 130, 256), (16, 64, 16), (17, 48, 144), (33, 35, 384),
    (64, 16, 64), (65, 48, 128), (130, 200, 64),
)  # fmt: skip


def codes_of(random: np.random.Generator, rows: int, inputs: int, on: device) -> Tensor:
    """int8 with other values behind each row."""
    memory = torch.from_numpy(random.integers(-128, 128, (rows, inputs + 16)).astype(np.int8)).to(on)
    return memory[:, :inputs]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums_are_exact(launchers: Launchers, shape: tuple[int, int, int]) -> None:
    rows, outputs, inputs = shape
    seed = fresh_seed()
    random = np.random.default_rng(seed)
    tensor = random_tensor(random, "i8", outputs, inputs)
    x = codes_of(random, rows, inputs, launchers.device)
    x_scales = torch.from_numpy(random.uniform(0, 1, rows).astype(np.float32)).to(launchers.device)
    bias = torch.from_numpy(random.standard_normal(outputs).astype(np.float32)).to(launchers.device)
    residual = cases.stream_of(random, rows, outputs, launchers.device)
    dtype = (torch.bfloat16, torch.float32)[seed % 2]
    out, memory = cases.guarded(rows, outputs, dtype, launchers.device)
    workspace = cases.poisoned_workspace(launchers.device)
    some_bias, some_residual = (bias, None, bias, None)[seed // 2 % 4], (residual, residual, None, None)[seed // 2 % 4]
    weight = cases.quantized(tensor, launchers.device)
    launchers.int8_linear(x, x_scales, weight, out, workspace=workspace, bias=some_bias, residual=some_residual)
    # The sum is rounded to float32, scaled twice, and added to twice.
    want = (x.double().cpu() * x_scales.double().cpu()[:, None]) @ torch.from_numpy(dequantize(tensor)).double().T
    magnitude = want.abs()
    for extra in (some_bias, some_residual):
        want = want if extra is None else want + extra.double().cpu()
        magnitude = magnitude if extra is None else magnitude + extra.double().abs().cpu()
    # The weight was rounded to float32 by `dequantize`, which integers were not: terms may cancel.
    slack = (x.double().abs().cpu() * x_scales.double().cpu()[:, None]).sum(1, keepdim=True) * 2.0**-24
    slack = slack * torch.from_numpy(np.abs(dequantize(tensor)).max(1)).double()
    bound = cases.ROUNDING[dtype] * want.abs() + 5 * 2.0**-24 * magnitude + slack
    assert ((out.double().cpu() - want).abs() <= bound).all(), f"seed {seed}"
    assert memory.isnan().sum() == memory.numel() - out.numel(), "it wrote between rows or around them"
    assert not workspace.counters.any()


@pytest.mark.parametrize("inputs", [1024, 4096])
def test_a_row_has_the_same_bits_in_every_batch(launchers: Launchers, inputs: int) -> None:
    seed = fresh_seed()
    random = np.random.default_rng(seed)
    weight = cases.quantized(random_tensor(random, "i8", 35, inputs), launchers.device)
    sizes = (1, 5, 16, 20, 70) if inputs == 1024 else (1, 5)
    x = codes_of(random, sizes[-1], inputs, launchers.device)
    x_scales = torch.rand(sizes[-1], device=launchers.device)

    def run(first: int, size: int, num_bytes: int = 1 << 22) -> Tensor:
        out = torch.full((size, 35), float("nan"), device=launchers.device)
        rows = slice(first, first + size)
        workspace = cases.poisoned_workspace(launchers.device, num_bytes)
        launchers.int8_linear(x[rows], x_scales[rows], weight, out, workspace=workspace)
        return out

    whole = run(0, sizes[-1])
    for size in sizes:
        first = int(random.integers(sizes[-1] - size + 1))
        assert torch.equal(run(first, size), whole[first : first + size]), f"seed {seed}: {size} rows from {first}"
    assert torch.equal(run(0, sizes[-1], 16), whole), f"seed {seed}: without a workspace"


def test_the_largest_sums_do_not_overflow(launchers: Launchers) -> None:
    weight = cases.quantized(random_tensor(np.random.default_rng(0), "i8", 16, 16384), launchers.device)
    weight = replace(weight, codes=torch.full_like(weight.codes, 128), scales=torch.ones_like(weight.scales))
    x = torch.full((2, 16384), -128, dtype=torch.int8, device=launchers.device)
    out = torch.empty((2, 16), device=launchers.device)
    workspace = cases.poisoned_workspace(launchers.device)
    launchers.int8_linear(x, torch.ones(2, device=launchers.device), weight, out, workspace=workspace)
    assert (out == 128 * 128 * 16384).all()


@pytest.mark.parametrize("wrong", ["x", "x_scales", "out", "weight"])
def test_an_argument_that_does_not_fit_is_named(launchers: Launchers, wrong: str) -> None:
    on = launchers.device
    random = np.random.default_rng(0)
    weight = cases.quantized(random_tensor(random, "q8_0" if wrong == "weight" else "i8", 35, 128), on)
    tensors = {
        "x": torch.zeros((3, 128), dtype=torch.int8, device=on),
        "x_scales": torch.zeros(3, device=on),
        "out": torch.zeros((3, 35), device=on),
    }
    if wrong != "weight":
        tensors[wrong] = tensors[wrong].double()
    with pytest.raises(ValueError, match=f"^{wrong}: "):
        launchers.int8_linear(**tensors, weight=weight, workspace=make_workspace(16, on))


@pytest.mark.parametrize("shape", [(1, 64), (3, 77), (5, 576), (2, 4104)], ids=str)
@pytest.mark.parametrize("gap", [0, 8, 3])
def test_rows_are_quantized(launchers: Launchers, shape: tuple[int, int], gap: int) -> None:
    seed = fresh_seed()
    rows, columns = shape
    x = cases.rows_of(np.random.default_rng(seed), rows, columns, launchers.device, gap=gap)
    x[0, 3] = x[0, 5] = x.abs().max() * 2
    memory = torch.full((rows, columns + gap), -128, dtype=torch.int8, device=launchers.device)
    scales = torch.full((rows + 2,), float("nan"), device=launchers.device)
    launchers.quantize_rows(x, memory[:, :columns], scales[1:-1])
    values = x.float().cpu().numpy()
    want = np.abs(values).max(1) / np.float32(127)
    np.testing.assert_array_equal(scales[1:-1].cpu().numpy(), want, err_msg=f"seed {seed}")
    codes = memory[:, :columns].cpu().numpy()
    np.testing.assert_array_equal(codes, np.rint(values / want[:, None]).astype(np.int8), err_msg=f"seed {seed}")
    assert np.abs(codes.astype(int)).max(1).tolist() == [127] * rows
    assert (memory[:, columns:] == -128).all()
    assert scales[[0, -1]].isnan().all()


def test_halves_are_rounded_to_even_and_zeros_have_no_scale(launchers: Launchers) -> None:
    on = launchers.device
    x = torch.tensor([[127, 0.5, 1.5, -2.5, -3.5, 126.5, 0, 1]] * 2, dtype=torch.bfloat16, device=on)
    x[1] = 0
    codes, scales = torch.full((2, 8), 99, dtype=torch.int8, device=on), torch.full((2,), 7.0, device=on)
    launchers.quantize_rows(x, codes, scales)
    assert codes.tolist() == [[127, 0, 2, -2, -4, 126, 0, 1], [0] * 8]
    assert scales.tolist() == [1, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows_in_the_scale(launchers: Launchers, bad: float) -> None:
    x = torch.ones((3, 72), dtype=torch.bfloat16, device=launchers.device)
    x[1, 70] = bad
    codes = torch.zeros((3, 72), dtype=torch.int8, device=launchers.device)
    scales = torch.zeros(3, device=launchers.device)
    launchers.quantize_rows(x, codes, scales)
    assert scales.isfinite().tolist() == [True, False, True]
    assert (codes[[0, 2]] == 127).all()
