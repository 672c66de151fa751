"""Packed linear layers by every kind of launchers against float64, and the bits of a row in batches of every size."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import numpy as np
import pytest

from llmserve.checkpoints.dequantize import dequantize
from tests.ops.seeds import fresh_seed

torch = pytest.importorskip("torch", reason="torch is not installed in this environment: make test-cuda")

from llmserve.ops.cuda.linear import make_workspace, num_slices  # noqa: E402
from tests.cuda import linear_cases as cases  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor

    from llmserve.ops.cuda.launchers import Launchers
    from llmserve.ops.cuda.quantized_linear import QuantizedWeight
    from llmserve.types import CheckpointTensor

FORMS: Final = ("q4_0", "q4_1", "i4_g64", "u4_g64", "i4_g128", "u4_g128", "q8_0", "q5_1", "i8")
SHAPES: Final = (  # rows, outputs, inputs
    (1, 48, 256), (2, 100, 384), (3, 35, 1536), (4, 16, 128), (5, 200, 128), (7, 48, 640), (8, 35, 128), (9, 130, 256),
    (16, 64, 256), (17, 48, 128), (33, 35, 384), (65, 48, 128),
)  # fmt: skip


def expected(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Sums in float64, and the sums of their terms' sizes."""
    values, matrix = x.double().cpu(), weight.double()
    want, magnitude = values @ matrix.T, values.abs() @ matrix.abs().T
    if bias is not None:
        want, magnitude = want + bias.double().cpu(), magnitude + bias.double().abs().cpu()
    if residual is not None:
        want, magnitude = want + residual.double().cpu(), magnitude + residual.double().abs().cpu()
    return want, magnitude


def magnitude_of(tensor: CheckpointTensor, x: Tensor) -> Tensor:
    """As `expected`'s, of weights whose code and bias may cancel."""
    stored = dequantize(tensor)
    largest = np.abs(stored).max() * 4 + 1e-30
    return (x.double().cpu().abs().sum(1, keepdim=True) * float(largest)).expand(-1, tensor.shape[0])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_agrees_with_float64(launchers: Launchers, form: str, shape: tuple[int, int, int]) -> None:
    rows, outputs, inputs = shape
    seed = fresh_seed()
    random = np.random.default_rng(seed)
    tensor = cases.tame_tensor(random, form, outputs, inputs)
    weight = cases.quantized(tensor, launchers.device)
    x = cases.rows_of(random, rows, inputs, launchers.device)
    dtype = (torch.bfloat16, torch.float32)[seed % 2]
    bias = torch.from_numpy(random.standard_normal(outputs).astype(np.float32)).to(launchers.device)
    residual = cases.stream_of(random, rows, outputs, launchers.device)
    some_bias, some_residual = (bias, None, bias, None)[seed // 2 % 4], (residual, residual, None, None)[seed // 2 % 4]
    out, memory = cases.guarded(rows, outputs, dtype, launchers.device)
    workspace = cases.poisoned_workspace(launchers.device)
    launchers.quantized_linear(x, weight, out, workspace=workspace, bias=some_bias, residual=some_residual)
    want, magnitude = expected(x, torch.from_numpy(dequantize(tensor)), some_bias, some_residual)
    if weight.biases is not None:
        magnitude = torch.maximum(magnitude, magnitude_of(tensor, x))
    cases.agrees(out.cpu(), want, magnitude, inputs, f"seed {seed}")
    assert memory.isnan().sum() == memory.numel() - out.numel(), "it wrote between rows or around them"
    assert not workspace.counters.any()


def run(launchers: Launchers, x: Tensor, weight: QuantizedWeight, num_bytes: int = 1 << 22) -> Tensor:
    out = torch.full((len(x), weight.outputs), float("nan"), dtype=torch.float32, device=launchers.device)
    launchers.quantized_linear(x, weight, out, workspace=cases.poisoned_workspace(launchers.device, num_bytes))
    return out


@pytest.mark.parametrize("form", ["q4_0", "u4_g128", "q5_1", "q6_k", "i8"])
@pytest.mark.parametrize(("inputs", "sizes"), [(4096, (1, 2, 5)), (768, (1, 4, 5, 16, 17, 70))], ids=str)
def test_a_row_has_the_same_bits_in_every_batch(
    launchers: Launchers, form: str, inputs: int, sizes: tuple[int, ...]
) -> None:
    assert num_slices(35, inputs) == (16 if inputs == 4096 else 8)
    seed = fresh_seed()
    random = np.random.default_rng(seed)
    weight = cases.quantized(cases.tame_tensor(random, form, 35, inputs), launchers.device)
    x = cases.rows_of(random, sizes[-1], inputs, launchers.device)
    whole = run(launchers, x, weight)
    for size in sizes:
        first = int(random.integers(sizes[-1] - size + 1))
        part = run(launchers, x[first : first + size], weight)
        assert torch.equal(part, whole[first : first + size]), f"seed {seed}: {size} rows from {first}"
    few_blocks = run(launchers, x, weight, 16)
    assert torch.equal(few_blocks, whole), f"seed {seed}: without a workspace"
    assert torch.equal(run(launchers, x[:1], weight, 16), whole[:1]), f"seed {seed}: one row without a workspace"


@pytest.mark.parametrize(("form", "inputs"), [("q4_0", 96), ("q4_1", 32), ("q8_0", 160), ("i8", 8), ("i8", 72)])
@pytest.mark.parametrize("rows", [2, 9])
def test_inputs_that_do_not_fill_a_tile(launchers: Launchers, form: str, inputs: int, rows: int) -> None:
    seed = fresh_seed()
    random = np.random.default_rng(seed)
    tensor = cases.tame_tensor(random, form, 35, inputs)
    x = cases.rows_of(random, rows, inputs, launchers.device)  # NaN behind each row
    out = run(launchers, x, cases.quantized(tensor, launchers.device))
    want, magnitude = expected(x, torch.from_numpy(dequantize(tensor)))
    cases.agrees(out.cpu(), want, torch.maximum(magnitude, magnitude_of(tensor, x)), inputs, f"seed {seed}")


@pytest.mark.parametrize("form", ["q4_k", "q3_k", "q5_0", "q5_k", "q6_k", "iq4_nl", "iq4_xs", "i4_g32", "u4_g32"])
@pytest.mark.parametrize("rows", [1, 20])
def test_every_other_form(launchers: Launchers, form: str, rows: int) -> None:
    seed = fresh_seed()
    random = np.random.default_rng(seed)
    tensor = cases.tame_tensor(random, form, 35, 256)
    weight = cases.quantized(tensor, launchers.device)
    x = cases.rows_of(random, rows, 256, launchers.device)
    want, magnitude = expected(x, torch.from_numpy(dequantize(tensor)))
    bound = torch.maximum(magnitude, magnitude_of(tensor, x))
    cases.agrees(run(launchers, x, weight).cpu(), want, bound, 256, f"seed {seed}")


@pytest.mark.parametrize("rows", [2, 7, 20])
@pytest.mark.parametrize("code", [0, 15])
@pytest.mark.parametrize("scale", [60000.0, 2.0**-24, 0.0])
@pytest.mark.parametrize("form", ["i4_g32", "u4_g128"])
def test_extreme_codes_and_scales(launchers: Launchers, form: str, scale: float, code: int, rows: int) -> None:
    tensor = cases.tame_tensor(np.random.default_rng(fresh_seed()), form, 48, 256)
    weight = cases.quantized(tensor, launchers.device)
    weight = replace(
        weight,
        codes=torch.full_like(weight.codes, code * 17),
        scales=torch.full_like(weight.scales, scale),
        biases=None if weight.biases is None else torch.full_like(weight.biases, 3),
    )
    x = torch.ones((rows, 256), dtype=torch.bfloat16, device=launchers.device)
    x[-1] = 0
    stored = float(torch.tensor(scale, dtype=torch.float16))
    value = stored * (code - 8) if weight.biases is None else stored * code + 3
    out = run(launchers, x, weight)
    assert not out[-1].any()
    assert ((out[:-1] - value * 256).abs() <= abs(value) * 256 * 2.0**-18).all()


@pytest.mark.parametrize("rows", [4, 12])
def test_a_row_that_is_not_finite_stays_alone(launchers: Launchers, rows: int) -> None:
    random = np.random.default_rng(fresh_seed())
    weight = cases.quantized(cases.tame_tensor(random, "q4_1", 35, 128), launchers.device)
    x = cases.rows_of(random, rows, 128, launchers.device)
    before = run(launchers, x, weight)
    x[2] = float("nan")
    after = run(launchers, x, weight)
    assert after[2].isnan().all()
    others = [row for row in range(rows) if row != 2]
    assert torch.equal(after[others], before[others])


@pytest.mark.parametrize("rows", [1, 9])
def test_the_residual_may_be_the_output(launchers: Launchers, rows: int) -> None:
    random = np.random.default_rng(fresh_seed())
    weight = cases.quantized(cases.tame_tensor(random, "q4_0", 35, 128), launchers.device)
    x = cases.rows_of(random, rows, 128, launchers.device)
    residual = cases.stream_of(random, rows, 35, launchers.device)
    workspace = cases.poisoned_workspace(launchers.device)
    apart = torch.empty_like(residual)
    launchers.quantized_linear(x, weight, apart, workspace=workspace, residual=residual)
    launchers.quantized_linear(x, weight, residual, workspace=workspace, residual=residual)
    assert torch.equal(residual, apart)


@pytest.mark.parametrize("mistake", ["columns", "channels", "scales", "group"])
@pytest.mark.parametrize("rows", [1, 20])
def test_the_bound_finds_mistakes(launchers: Launchers, mistake: str, rows: int) -> None:
    random = np.random.default_rng(fresh_seed())
    tensor = cases.tame_tensor(random, "i4_g32", 48, 256)
    x = cases.rows_of(random, rows, 256, launchers.device)
    out = run(launchers, x, cases.quantized(tensor, launchers.device)).cpu()
    wrong = dequantize(tensor)
    match mistake:
        case "columns":
            wrong[:, [4, 6]] = wrong[:, [6, 4]]
        case "channels":
            wrong[[3, 11]] = wrong[[11, 3]]
        case "scales":
            wrong[:, 32:64] *= 1 + 2.0**-5
        case "group":
            wrong[:, 224:] = 0
    want, magnitude = expected(x, torch.from_numpy(wrong))
    with pytest.raises(AssertionError, match="of the bound"):
        cases.agrees(out, want, magnitude, 256, mistake)


def test_no_rows_are_no_work(launchers: Launchers) -> None:
    weight = cases.quantized(cases.tame_tensor(np.random.default_rng(0), "q4_0", 35, 128), launchers.device)
    x = torch.empty((0, 128), dtype=torch.bfloat16, device=launchers.device)
    assert run(launchers, x, weight).shape == (0, 35)


@pytest.mark.parametrize("wrong", ["x", "out", "bias", "residual", "weight", "workspace"])
def test_an_argument_that_does_not_fit_is_named(launchers: Launchers, wrong: str) -> None:
    on = launchers.device
    weight = cases.quantized(cases.tame_tensor(np.random.default_rng(0), "q4_0", 35, 128), on)
    workspace = make_workspace(16, on)
    memory = torch.zeros((3, 132), dtype=torch.bfloat16, device=on)
    tensors = {"x": memory[:, :128].contiguous(), "out": torch.zeros((3, 35), dtype=torch.bfloat16, device=on)}
    extra = {"bias": torch.zeros(35, device=on), "residual": tensors["out"].float()}
    match wrong:
        case "x":
            tensors["x"] = memory[:, :128]  # rows 264 bytes apart
        case "out":
            tensors["out"] = tensors["out"].half()
        case "bias":
            extra["bias"] = extra["bias"][:5]
        case "residual":
            extra["residual"] = extra["residual"].bfloat16()
        case "weight":
            weight = replace(weight, group=48)
        case "workspace":
            workspace = replace(workspace, counters=workspace.counters.long())
    with pytest.raises(ValueError, match=f"^{wrong}: "):
        launchers.quantized_linear(tensors["x"], weight, tensors["out"], workspace=workspace, **extra)
