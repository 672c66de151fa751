"""Packed weights to bfloat16, bit for bit, and columns in another order."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from llmserve.checkpoints.dequantize import dequantize
from tests.ops.seeds import fresh_seed
from tests.tiny.random_blocks import random_tensor

torch = pytest.importorskip("torch", reason="torch is not installed in this environment: make test-cuda")

from tests.cuda import linear_cases as cases  # noqa: E402

if TYPE_CHECKING:
    from llmserve.ops.cuda.launchers import Launchers

FORMS = ("q4_0", "q4_1", "q4_k", "i4_g64", "u4_g128", "q8_0", "q5_k", "q6_k", "iq4_xs", "i8")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(35, 256), (100, 768), (1, 256)], ids=str)
def test_each_value_is_rounded_once(launchers: Launchers, form: str, shape: tuple[int, int]) -> None:
    seed = fresh_seed()
    tensor = random_tensor(np.random.default_rng(seed), form, *shape)
    memory = torch.full((shape[0] + 2, shape[1] + 8), float("nan"), dtype=torch.bfloat16, device=launchers.device)
    out = memory[1:-1, : shape[1]]
    launchers.dequantize(cases.quantized(tensor, launchers.device), out)
    assert torch.equal(out.cpu(), torch.from_numpy(dequantize(tensor)).to(torch.bfloat16)), f"seed {seed}"
    assert memory.isnan().sum() == memory.numel() - out.numel()


@pytest.mark.parametrize(("form", "inputs"), [("q4_0", 96), ("q8_0", 32), ("i8", 72)])
def test_rows_that_do_not_fill_a_tile(launchers: Launchers, form: str, inputs: int) -> None:
    tensor = random_tensor(np.random.default_rng(fresh_seed()), form, 19, inputs)
    memory = torch.full((19, inputs + 8), float("nan"), dtype=torch.bfloat16, device=launchers.device)
    launchers.dequantize(cases.quantized(tensor, launchers.device), memory[:, :inputs])
    assert torch.equal(memory[:, :inputs].cpu(), torch.from_numpy(dequantize(tensor)).to(torch.bfloat16))
    assert memory[:, inputs:].isnan().all()


def test_an_output_that_does_not_fit_is_named(launchers: Launchers) -> None:
    weight = cases.quantized(random_tensor(np.random.default_rng(0), "q4_0", 19, 64), launchers.device)
    with pytest.raises(ValueError, match=r"^out: "):
        launchers.dequantize(weight, torch.empty((19, 64), device=launchers.device))
    with pytest.raises(ValueError, match=r"^out: its rows"):
        launchers.dequantize(weight, torch.empty((19, 68), dtype=torch.bfloat16, device=launchers.device)[:, :64])


@pytest.mark.parametrize("shape", [(1, 64), (5, 301), (9, 1000)], ids=str)
def test_columns_are_gathered(launchers: Launchers, shape: tuple[int, int]) -> None:
    seed = fresh_seed()
    random = np.random.default_rng(seed)
    x = cases.rows_of(random, *shape, launchers.device, gap=3)
    order = torch.from_numpy(random.permutation(shape[1]).astype(np.int32)).to(launchers.device)
    out, memory = cases.guarded(*shape, torch.bfloat16, launchers.device)
    launchers.gather_columns(x, order, out)
    assert torch.equal(out, x[:, order.long()]), f"seed {seed}"
    assert memory.isnan().sum() == memory.numel() - out.numel()


@pytest.mark.parametrize("wrong", ["x", "order", "out"])
def test_a_tensor_that_cannot_be_gathered_is_named(launchers: Launchers, wrong: str) -> None:
    on = launchers.device
    tensors = {name: torch.zeros((3, 64), dtype=torch.bfloat16, device=on) for name in ("x", "out")}
    tensors["order"] = torch.zeros(64, dtype=torch.int32, device=on)
    tensors[wrong] = {
        "x": tensors["x"].float(),
        "order": tensors["order"].long(),
        "out": tensors["out"][:2],
    }[wrong]
    with pytest.raises(ValueError, match=f"^{wrong}: "):
        launchers.gather_columns(**tensors)
