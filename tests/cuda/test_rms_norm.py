"""RMS norm by every kind of launchers against float64: odd shapes, strides, guard zones, a residual stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import pytest

from tests.ops.seeds import fresh_seed

torch = pytest.importorskip("torch", reason="torch is not installed in this environment: make test-cuda")

if TYPE_CHECKING:
    from torch import Tensor, device, dtype

    from llmserve.ops.cuda.launchers import Launchers

from tests.cuda.rows import guarded, int8_agrees, is_untouched_around  # noqa: E402

EPS: Final = 1e-5
KINDS: Final = (torch.bfloat16, torch.float32)
"""Of x; results are bfloat16."""
SHAPES: Final = (
    (1, 64),
    (7, 64),
    (513, 64),
    (5, 80),
    (3, 128),
    (2, 576),
    (9, 1000),
    (4, 4096),
    (2, 8192),
    (3, 7),
    (1, 1),
)
GUARD: Final = 64


def draw(shape: tuple[int, int], kind: dtype, on: device, stride: int) -> tuple[Tensor, Tensor]:
    """Rows `stride` values apart, and the whole memory they are a part of, poisoned around them."""
    rows, columns = shape
    memory = torch.full((GUARD + rows * stride + GUARD,), float("nan"), dtype=kind, device=on)
    view = memory[GUARD : GUARD + rows * stride].view(rows, stride)[:, :columns]
    random = np.random.default_rng(fresh_seed())
    scale = 10.0 ** random.uniform(-3, 3, (rows, 1))
    view.copy_(torch.from_numpy(random.standard_normal(shape) * scale).to(kind))
    return view, memory


def expected(x: Tensor, weight: Tensor) -> Tensor:
    values = x.double()
    return values * torch.rsqrt(values.square().mean(-1, keepdim=True) + EPS) * weight.double()


def is_rounded(out: Tensor, want: Tensor) -> bool:
    """Half a unit in the last place of bfloat16, and what the order of the sum does to it."""
    return bool(((out.double() - want).abs() <= 1.002 * (2.0**-8 * want.abs() + 1e-30)).all())


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("gap", [0, 8, 3])
def test_agrees_with_float64(launchers: Launchers, shape: tuple[int, int], gap: int, kind: dtype) -> None:
    x, _ = draw(shape, kind, launchers.device, shape[1] + gap)
    out, memory = draw(shape, torch.bfloat16, launchers.device, shape[1] + gap)
    weight = torch.randn(shape[1], device=launchers.device)
    launchers.rms_norm(x, weight, out, eps=EPS)
    assert is_rounded(out, expected(x, weight))
    assert memory.isnan().sum() == memory.numel() - out.numel(), "it wrote between rows or around them"


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_residual_stream_is_what_is_normalized(launchers: Launchers, shape: tuple[int, int], kind: dtype) -> None:
    x, _ = draw(shape, kind, launchers.device, shape[1])
    residual, memory = draw(shape, torch.float32, launchers.device, shape[1])
    summed = x.float() + residual
    weight = torch.randn(shape[1], device=launchers.device)
    out = torch.empty(shape, dtype=torch.bfloat16, device=launchers.device)
    launchers.rms_norm(x, weight, out, eps=EPS, residual=residual)
    assert torch.equal(residual, summed)
    assert is_rounded(out, expected(summed, weight))
    assert memory.isnan().sum() == memory.numel() - residual.numel()


def test_a_row_does_not_depend_on_the_others(launchers: Launchers) -> None:
    x, _ = draw((37, 576), torch.bfloat16, launchers.device, 576)
    weight = torch.randn(576, device=launchers.device)
    together, alone = torch.empty_like(x), torch.empty_like(x)
    launchers.rms_norm(x, weight, together, eps=EPS)
    for row in range(len(x)):
        launchers.rms_norm(x[row : row + 1], weight, alone[row : row + 1], eps=EPS)
    assert torch.equal(together, alone)


def test_no_rows_are_no_work(launchers: Launchers) -> None:
    x = torch.empty((0, 64), dtype=torch.bfloat16, device=launchers.device)
    launchers.rms_norm(x, torch.ones(64, device=launchers.device), torch.empty_like(x), eps=EPS)


@pytest.mark.parametrize("wrong", ["x", "weight", "out", "residual"])
def test_a_tensor_that_does_not_fit_is_named(launchers: Launchers, wrong: str) -> None:
    on = launchers.device
    tensors = {name: torch.zeros((3, 64), dtype=torch.bfloat16, device=on) for name in ("x", "out", "residual")}
    tensors["weight"] = torch.zeros(64, device=on)
    tensors["residual"] = torch.zeros((3, 64), device=on)
    tensors[wrong] = {
        "x": tensors["x"].long(),
        "weight": tensors["weight"].bfloat16(),
        "out": tensors["out"][:2],
        "residual": torch.zeros((3, 128), device=on)[:, ::2],
    }[wrong]
    with pytest.raises(ValueError, match=f"^{wrong}: "):
        launchers.rms_norm(tensors["x"], tensors["weight"], tensors["out"], eps=EPS, residual=tensors["residual"])


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_int8_rows_have_a_scale_each(launchers: Launchers, kind: dtype) -> None:
    for (rows, columns), gap in zip(SHAPES, (0, 8, 0, 3, 0, 0, 8, 1, 0, 0, 0), strict=True):
        x, _ = draw((rows, columns), kind, launchers.device, columns + gap)
        x[0] = 0
        weight = torch.randn(columns, device=launchers.device)
        out, memory = guarded(rows, columns, torch.int8, launchers.device, gap=gap)
        scales, scale_memory = guarded(1, rows, torch.float32, launchers.device)
        residual = None if gap == 8 else torch.randn((rows, columns), device=launchers.device)
        if residual is not None:
            residual[0] = 0
        launchers.rms_norm(x, weight, out, eps=EPS, residual=residual, scales=scales[0])
        assert int8_agrees(out, scales[0], expected(x if residual is None else residual, weight)), (rows, columns)
        assert scales[0, 0] == 0
        assert is_untouched_around(out, memory)
        assert is_untouched_around(scales, scale_memory)


@pytest.mark.parametrize("wrong", ["out", "scales"])
def test_int8_rows_that_do_not_fit_are_named(launchers: Launchers, wrong: str) -> None:
    x = torch.zeros((3, 64), dtype=torch.bfloat16, device=launchers.device)
    out = torch.zeros((3, 64), dtype=torch.bfloat16 if wrong == "out" else torch.int8, device=launchers.device)
    scales = torch.zeros(2 if wrong == "scales" else 3, device=launchers.device)
    with pytest.raises(ValueError, match=f"^{wrong}: "):
        launchers.rms_norm(x, torch.ones(64, device=launchers.device), out, eps=EPS, scales=scales)
