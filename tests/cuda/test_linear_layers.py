"""The choice of kernels by rows: every way gives the same layer, and deterministic ones the same bits."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from llmserve.checkpoints.dequantize import dequantize
from tests.ops.seeds import fresh_seed

torch = pytest.importorskip("torch", reason="torch is not installed in this environment: make test-cuda")

from llmserve.ops.cuda.linear_layers import MOST_PACKED_ROWS, LinearLayers  # noqa: E402
from tests.cuda import linear_cases as cases  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

    from llmserve.ops.cuda.launchers import Launchers

SIZES = (1, 20, MOST_PACKED_ROWS + 9)


def layers_of(launchers: Launchers, *, is_deterministic: bool) -> LinearLayers:
    return LinearLayers(launchers, cases.poisoned_workspace(launchers.device), is_deterministic)


def near(out: Tensor, want: Tensor, share: float) -> None:
    """Within a share of the largest output of the row."""
    worst = ((out.double().cpu() - want).abs().amax(1) / want.abs().amax(1)).max().item()
    assert worst <= share, f"{worst} of a row's largest output"


@pytest.mark.parametrize("is_deterministic", [True, False])
@pytest.mark.parametrize("rows", SIZES)
def test_quantized_layers_in_activation_order(launchers: Launchers, rows: int, is_deterministic: bool) -> None:
    random = np.random.default_rng(fresh_seed())
    order = tuple(int(i) for i in random.permutation(64))
    tensor = replace(cases.tame_tensor(random, "i4_g32", 35, 64), order=order)
    x = cases.rows_of(random, rows, 64, launchers.device)
    bias = torch.from_numpy(random.standard_normal(35).astype(np.float32)).to(launchers.device)
    residual = cases.rows_of(random, rows, 35, launchers.device)
    want = x.double().cpu() @ torch.from_numpy(dequantize(tensor)).double().T + bias.cpu() + residual.double().cpu()
    layers = layers_of(launchers, is_deterministic=is_deterministic)
    layers.quantized(x, cases.quantized(tensor, launchers.device), residual, bias=bias, residual=residual)
    near(residual, want, 2.0**-6)


@pytest.mark.parametrize("rows", SIZES)
def test_int8_layers(launchers: Launchers, rows: int) -> None:
    random = np.random.default_rng(fresh_seed())
    tensor = cases.tame_tensor(random, "i8", 35, 64)
    x = cases.rows_of(random, rows, 64, launchers.device)
    out = torch.empty((rows, 35), device=launchers.device)
    layers_of(launchers, is_deterministic=False).int8(x, cases.quantized(tensor, launchers.device), out)
    near(out, x.double().cpu() @ torch.from_numpy(dequantize(tensor)).double().T, 0.05)


@pytest.mark.parametrize("is_deterministic", [True, False])
@pytest.mark.parametrize("rows", [1, 20])
def test_dense_layers(launchers: Launchers, rows: int, is_deterministic: bool) -> None:
    random = np.random.default_rng(fresh_seed())
    x, weight = (cases.rows_of(random, count, 64, launchers.device) for count in (rows, 35))
    residual = cases.rows_of(random, rows, 35, launchers.device)
    out = torch.empty((rows, 35), dtype=torch.bfloat16, device=launchers.device)
    layers_of(launchers, is_deterministic=is_deterministic).dense(x, weight, out, residual=residual)
    near(out, x.double().cpu() @ weight.double().cpu().T + residual.double().cpu(), 2.0**-6)


def test_deterministic_layers_do_not_change_with_the_batch(launchers: Launchers) -> None:
    random = np.random.default_rng(fresh_seed())
    weight = cases.quantized(cases.tame_tensor(random, "u4_g64", 35, 64), launchers.device)
    x = cases.rows_of(random, SIZES[-1], 64, launchers.device)
    layers = layers_of(launchers, is_deterministic=True)
    outs = [torch.empty((rows, 35), dtype=torch.bfloat16, device=launchers.device) for rows in SIZES]
    for rows, out in zip(SIZES, outs, strict=True):
        layers.quantized(x[:rows], weight, out)
        assert torch.equal(out[:1], outs[0])
    assert torch.equal(outs[2][:20], outs[1])


def test_only_int8_weights_are_multiplied_as_integers(launchers: Launchers) -> None:
    random = np.random.default_rng(fresh_seed())
    weight = cases.quantized(cases.tame_tensor(random, "q8_0", 35, 64), launchers.device)
    x = cases.rows_of(random, 2, 64, launchers.device)
    with pytest.raises(ValueError, match=r"^weight: "):
        layers_of(launchers, is_deterministic=False).int8(x, weight, torch.empty((2, 35), device=launchers.device))
