"""Linear layers of bfloat16 against float64, and the bits of a row in batches of every size."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import pytest

from tests.ops.seeds import fresh_seed

torch = pytest.importorskip("torch", reason="torch is not installed in this environment: make test-cuda")

from llmserve.ops.cuda.linear import make_workspace, num_slices  # noqa: E402
from tests.cuda import linear_cases as cases  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

    from llmserve.ops.cuda.launchers import Launchers

SHAPES: Final = (  # rows, outputs, inputs
    (1, 48, 576), (2, 100, 200), (7, 35, 1536), (8, 16, 8), (9, 200, 64), (16, 64, 128), (17, 48, 192), (33, 35, 384),
    (64, 128, 72), (65, 48, 128), (130, 35, 64),
)  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(launchers: Launchers, shape: tuple[int, int, int]) -> None:
    rows, outputs, inputs = shape
    seed = fresh_seed()
    random = np.random.default_rng(seed)
    x = cases.rows_of(random, rows, inputs, launchers.device)
    weight = cases.rows_of(random, outputs, inputs, launchers.device, gap=16)
    bias = torch.from_numpy(random.standard_normal(outputs).astype(np.float32)).to(launchers.device)
    residual = cases.stream_of(random, rows, outputs, launchers.device)
    some_bias, some_residual = (bias, None, bias, None)[seed // 2 % 4], (residual, residual, None, None)[seed // 2 % 4]
    out, memory = cases.guarded(rows, outputs, (torch.bfloat16, torch.float32)[seed % 2], launchers.device)
    workspace = cases.poisoned_workspace(launchers.device)
    launchers.fixed_linear(x, weight, out, workspace=workspace, bias=some_bias, residual=some_residual)
    values, matrix = x.double().cpu(), weight.double().cpu()
    want, magnitude = values @ matrix.T, values.abs() @ matrix.abs().T
    for extra in (some_bias, some_residual):
        want = want if extra is None else want + extra.double().cpu()
        magnitude = magnitude if extra is None else magnitude + extra.double().abs().cpu()
    cases.agrees(out.cpu(), want, magnitude, inputs, f"seed {seed}")
    assert memory.isnan().sum() == memory.numel() - out.numel(), "it wrote between rows or around them"
    assert not workspace.counters.any()
    wrong = matrix.clone()
    wrong[:, [1, 6]] = wrong[:, [6, 1]]
    with pytest.raises(AssertionError, match="of the bound"):
        cases.agrees(out.cpu(), want + values @ (wrong - matrix).T, magnitude, inputs, "columns exchanged")


def run(launchers: Launchers, x: Tensor, weight: Tensor, num_bytes: int = 1 << 22) -> Tensor:
    out = torch.full((len(x), len(weight)), float("nan"), dtype=torch.float32, device=launchers.device)
    launchers.fixed_linear(x, weight, out, workspace=cases.poisoned_workspace(launchers.device, num_bytes))
    return out


@pytest.mark.parametrize(("inputs", "sizes"), [(4096, (1, 5)), (640, (1, 16, 17, 64, 140))], ids=str)
def test_a_row_has_the_same_bits_in_every_batch(launchers: Launchers, inputs: int, sizes: tuple[int, ...]) -> None:
    assert num_slices(35, inputs) == (16 if inputs == 4096 else 8)
    seed = fresh_seed()
    random = np.random.default_rng(seed)
    weight = cases.rows_of(random, 35, inputs, launchers.device)
    x = cases.rows_of(random, sizes[-1], inputs, launchers.device)
    whole = run(launchers, x, weight)
    for size in sizes:
        first = int(random.integers(sizes[-1] - size + 1))
        part = run(launchers, x[first : first + size], weight)
        assert torch.equal(part, whole[first : first + size]), f"seed {seed}: {size} rows from {first}"
    assert torch.equal(run(launchers, x, weight, 16), whole), f"seed {seed}: without a workspace"


@pytest.mark.parametrize("rows", [4, 20])
def test_a_row_that_is_not_finite_stays_alone(launchers: Launchers, rows: int) -> None:
    random = np.random.default_rng(fresh_seed())
    weight = cases.rows_of(random, 35, 128, launchers.device)
    x = cases.rows_of(random, rows, 128, launchers.device)
    before = run(launchers, x, weight)
    x[2] = float("nan")
    after = run(launchers, x, weight)
    assert after[2].isnan().all()
    others = [row for row in range(rows) if row != 2]
    assert torch.equal(after[others], before[others])


def test_no_rows_are_no_work(launchers: Launchers) -> None:
    weight = torch.zeros((35, 64), dtype=torch.bfloat16, device=launchers.device)
    assert run(launchers, weight[:0], weight).shape == (0, 35)


@pytest.mark.parametrize("wrong", ["x", "weight", "out", "bias", "residual"])
def test_an_argument_that_does_not_fit_is_named(launchers: Launchers, wrong: str) -> None:
    on = launchers.device
    tensors = {
        "x": torch.zeros((3, 64), dtype=torch.bfloat16, device=on),
        "weight": torch.zeros((35, 64), dtype=torch.bfloat16, device=on),
        "out": torch.zeros((3, 35), device=on),
        "bias": torch.zeros(35, device=on),
        "residual": torch.zeros((3, 35), device=on),
    }
    tensors[wrong] = {
        "x": tensors["x"][:, :56],
        "weight": torch.zeros((35, 68), dtype=torch.bfloat16, device=on)[:, :64],
        "out": tensors["out"].double(),
        "bias": tensors["bias"].bfloat16(),
        "residual": tensors["residual"][:2],
    }[wrong]
    with pytest.raises(ValueError, match=f"^{wrong}: "):
        launchers.fixed_linear(**tensors, workspace=make_workspace(16, on))
