"""Layer norm by every kind of launchers against float64: bias, residual stream, int8 rows, odd shapes, strides."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest

from tests.ops.seeds import fresh_seed

torch = pytest.importorskip("torch", reason="torch is not installed in this environment: make test-cuda")

if TYPE_CHECKING:
    from torch import Tensor, dtype

    from llmserve.ops.cuda.launchers import Launchers

from tests.cuda.rows import BF16, SLACK, guarded, is_untouched_around  # noqa: E402

EPS: Final = 1e-5
KINDS: Final = (torch.bfloat16, torch.float32)
"""Of x; results are bfloat16."""
SHAPES: Final = ((1, 64), (33, 64), (5, 80), (2, 576), (3, 1000), (2, 4104), (3, 7), (1, 1))
GAPS: Final = (0, 8, 3, 0, 8, 0, 1, 0)


def draw(rows: int, columns: int, kind: dtype, launchers: Launchers, *, gap: int = 0) -> Tensor:
    """Rows of different sizes around means that are larger than they are."""
    view, _ = guarded(rows, columns, kind, launchers.device, gap=gap)
    random = torch.Generator().manual_seed(fresh_seed())
    size = 10.0 ** torch.empty(rows, 1).uniform_(-2, 2, generator=random)
    mean = torch.randn((rows, 1), generator=random) * 5
    view.copy_(((torch.randn((rows, columns), generator=random) + mean) * size).to(kind))
    return view


def expected(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The result, and what float32 may lose: a few units of the largest input, scaled like it, and of the bias."""
    values = x.double()
    centered = values - values.mean(-1, keepdim=True)
    factor = torch.rsqrt(centered.square().mean(-1, keepdim=True) + EPS)
    y = centered * factor * weight.double()
    lost = 2e-6 * (values.abs().amax(-1, keepdim=True) * factor * weight.double().abs() + y.abs())
    if bias is None:
        return y, lost
    return y + bias.double(), lost + 2e-7 * bias.double().abs()


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("has_residual", [True, False])
def test_agrees_with_float64(launchers: Launchers, kind: dtype, has_bias: bool, has_residual: bool) -> None:
    for (rows, columns), gap in zip(SHAPES, GAPS, strict=True):
        x = draw(rows, columns, kind, launchers, gap=gap)
        weight, bias = torch.randn(2, columns, device=launchers.device)
        out, memory = guarded(rows, columns, torch.bfloat16, launchers.device, gap=gap)
        residual = draw(rows, columns, torch.float32, launchers).contiguous() if has_residual else None
        source = x.clone() if residual is None else x.float() + residual
        launchers.layer_norm(x, weight, out, eps=EPS, bias=bias if has_bias else None, residual=residual)
        want, lost = expected(source, weight, bias if has_bias else None)
        assert ((out.double() - want).abs() <= SLACK * BF16 * want.abs() + lost).all(), (rows, columns)
        assert residual is None or torch.equal(residual, source)
        assert is_untouched_around(out, memory)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_int8_rows_have_a_scale_each(launchers: Launchers, kind: dtype) -> None:
    for (rows, columns), gap in zip(SHAPES, GAPS, strict=True):
        x = draw(rows, columns, kind, launchers, gap=gap)
        weight, bias = torch.randn(2, columns, device=launchers.device)
        out, memory = guarded(rows, columns, torch.int8, launchers.device, gap=gap)
        scales, scale_memory = guarded(1, rows, torch.float32, launchers.device)
        launchers.layer_norm(x, weight, out, eps=EPS, bias=bias, scales=scales[0])
        want, lost = expected(x, weight, bias)
        error = lost.amax(-1, keepdim=True)
        step = scales[0].double()
        assert ((step * 127 - want.abs().amax(-1)).abs() <= error[:, 0] + 4e-6 * want.abs().amax(-1)).all()
        assert ((out.double() * step[:, None] - want).abs() <= 0.5001 * step[:, None] + 2 * error).all()
        assert is_untouched_around(out, memory)
        assert is_untouched_around(scales, scale_memory)


def test_a_row_does_not_depend_on_the_others(launchers: Launchers) -> None:
    x = draw(19, 576, torch.bfloat16, launchers)
    weight, bias = torch.randn(2, 576, device=launchers.device)
    together, alone = torch.empty_like(x), torch.empty_like(x)
    launchers.layer_norm(x, weight, together, eps=EPS, bias=bias)
    for row in range(len(x)):
        launchers.layer_norm(x[row : row + 1], weight, alone[row : row + 1], eps=EPS, bias=bias)
    assert torch.equal(together, alone)


def test_what_the_bound_finds(launchers: Launchers) -> None:
    """No mean, no bias, the unbiased variance, a weight shifted by one: none passes for the result."""
    x = draw(9, 64, torch.bfloat16, launchers)
    weight, bias = torch.randn(2, 64, device=launchers.device)
    out = torch.empty_like(x)
    launchers.layer_norm(x, weight, out, eps=EPS, bias=bias)
    values = x.double()
    rms = values * torch.rsqrt(values.square().mean(-1, keepdim=True) + EPS) * weight + bias
    unbiased = expected(x, weight * (63 / 64) ** 0.5, bias)[0]
    for wrong in (rms, unbiased, expected(x, weight, None)[0], expected(x, weight.roll(1), bias)[0]):
        lost = expected(x, weight, bias)[1]
        assert not ((out.double() - wrong).abs() <= SLACK * BF16 * wrong.abs() + lost).all()


def test_no_rows_are_no_work(launchers: Launchers) -> None:
    x = torch.empty((0, 64), dtype=torch.bfloat16, device=launchers.device)
    launchers.layer_norm(x, torch.ones(64, device=launchers.device), torch.empty_like(x), eps=EPS)


@pytest.mark.parametrize("wrong", ["x", "weight", "bias", "out", "residual", "scales"])
def test_a_tensor_that_does_not_fit_is_named(launchers: Launchers, wrong: str) -> None:
    on = launchers.device
    x = torch.zeros((3, 64), dtype=torch.float16 if wrong == "x" else torch.bfloat16, device=on)
    weight = torch.zeros(64, dtype=torch.bfloat16 if wrong == "weight" else torch.float32, device=on)
    bias = torch.zeros(63 if wrong == "bias" else 64, device=on)
    out = torch.zeros((3, 64), dtype=torch.bfloat16 if wrong == "out" else torch.int8, device=on)
    residual = torch.zeros((3, 128), dtype=torch.bfloat16, device=on)[:, ::2] if wrong == "residual" else None
    scales = torch.zeros(2 if wrong == "scales" else 3, device=on)
    with pytest.raises(ValueError, match=f"^{wrong}: "):
        launchers.layer_norm(x, weight, out, eps=EPS, bias=bias, residual=residual, scales=scales)
