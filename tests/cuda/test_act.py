"""Activations by every kind of launchers against float64: gated or not, bfloat16 and int8, odd shapes, strides."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, cast, get_args

import pytest

from llmserve.ops.protocol import ActKind
from tests.ops.seeds import fresh_seed

torch = pytest.importorskip("torch", reason="torch is not installed in this environment: make test-cuda")

if TYPE_CHECKING:
    from torch import Tensor
    from torch import dtype as Dtype

    from llmserve.ops.cuda.launchers import Launchers

from tests.cuda.rows import BF16, SLACK, guarded, int8_agrees, is_untouched_around  # noqa: E402

KINDS: Final = get_args(ActKind)
SHAPES: Final = ((1, 8), (5, 64), (3, 200), (2, 1000), (3, 4104), (1, 9000), (4, 7), (1, 1))


def draw(rows: int, columns: int, launchers: Launchers, *, gap: int = 0, dtype: Dtype = torch.bfloat16) -> Tensor:
    """Rows of different sizes, with values where exponentials overflow and vanish."""
    view, _ = guarded(rows, columns, dtype, launchers.device, gap=gap)
    random = torch.Generator().manual_seed(fresh_seed())
    scale = 10.0 ** torch.empty(rows, 1).uniform_(-2, 1.5, generator=random)
    view.copy_((torch.randn((rows, columns), generator=random) * scale).to(dtype))
    if columns > 7:
        view[0, 0] = -200.0
    return view


def activation(x: Tensor, kind: ActKind) -> Tensor:
    """In float64, from the definitions of reference_math."""
    if kind == "silu":
        return x / (1 + torch.exp(-x))
    if kind == "relu2":
        return x.clamp_min(0).square()
    if kind == "gelu":
        return 0.5 * x * torch.erfc(-x * math.sqrt(0.5))
    return x / (1 + torch.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def expected(x: Tensor, kind: ActKind, *, gated: bool) -> tuple[Tensor, Tensor]:
    """The result, and what 1 + erf and 1 + tanh lose in float32 where they cancel."""
    values = x.double()
    gate, up = values.chunk(2, -1) if gated else (values, torch.ones_like(values))
    return activation(gate, kind) * up, 2e-6 * gate.abs() * up.abs() if kind.startswith("gelu") else 0 * gate


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("gap", [0, 8, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_agrees_with_float64(launchers: Launchers, kind: ActKind, gap: int, gated: bool, dtype: Dtype) -> None:
    for rows, columns in SHAPES:
        x = draw(rows, columns * (2 if gated else 1), launchers, gap=gap, dtype=dtype)
        out, memory = guarded(rows, columns, torch.bfloat16, launchers.device, gap=gap)
        launchers.act(x, out, kind=kind)
        want, error = expected(x, kind, gated=gated)
        assert ((out.double() - want).abs() <= SLACK * BF16 * want.abs() + error + 1e-30).all(), (rows, columns)
        assert is_untouched_around(out, memory)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("gated", [True, False])
def test_int8_rows_have_a_scale_each(launchers: Launchers, kind: ActKind, gated: bool) -> None:
    for (rows, columns), gap in zip(SHAPES, (0, 8, 3, 0, 0, 8, 1, 0), strict=True):
        x = draw(rows, columns * (2 if gated else 1), launchers, gap=gap)
        out, memory = guarded(rows, columns, torch.int8, launchers.device, gap=gap)
        scales, scale_memory = guarded(1, rows, torch.float32, launchers.device)
        launchers.act(x, out, kind=kind, scales=scales[0])
        want, error = expected(x, kind, gated=gated)
        assert int8_agrees(out, scales[0], want, error=error), (rows, columns)
        assert is_untouched_around(out, memory)
        assert is_untouched_around(scales, scale_memory)


def test_halves_round_to_even(launchers: Launchers) -> None:
    gate = torch.tensor([[1.0, 1.0, 1.0, 1.0, 1.0]], dtype=torch.bfloat16, device=launchers.device)
    up = torch.tensor([[254.0, 1.0, 3.0, -5.0, 0.0]], dtype=torch.bfloat16, device=launchers.device)
    out, scales = torch.empty((1, 5), dtype=torch.int8), torch.empty(1)
    out, scales = out.to(launchers.device), scales.to(launchers.device)
    launchers.act(torch.cat((gate, up), -1), out, kind="relu2", scales=scales)
    assert scales.tolist() == [2.0]
    assert out.tolist() == [[127, 0, 2, -2, 0]]


def test_a_row_that_is_not_finite_has_such_a_scale(launchers: Launchers) -> None:
    x = torch.ones((4, 32), dtype=torch.bfloat16, device=launchers.device)
    x[0, 5], x[1, 6], x[2] = float("nan"), float("inf"), 0.0
    out = torch.empty((4, 32), dtype=torch.int8, device=launchers.device)
    scales = torch.empty(4, device=launchers.device)
    launchers.act(x, out, kind="relu2", scales=scales)
    assert scales.isfinite().tolist() == [False, False, True, True]
    assert scales[2] == 0
    assert not out[2].any()
    wide = torch.empty((4, 32), dtype=torch.bfloat16, device=launchers.device)
    for kind in KINDS:
        launchers.act(x, wide, kind=kind)
        assert wide[0, 5].isnan(), kind


def test_what_the_bound_finds(launchers: Launchers) -> None:
    """Gate and up exchanged, another kind, a reference of neighbours: none passes for the result."""
    random = torch.Generator().manual_seed(fresh_seed())
    x = (3 * torch.randn((5, 128), generator=random)).to(torch.bfloat16).to(launchers.device)
    out = torch.empty((5, 64), dtype=torch.bfloat16, device=launchers.device)
    launchers.act(x, out, kind="gelu")
    swapped = torch.cat((x[:, 64:], x[:, :64]), -1)
    wrongs: tuple[tuple[Tensor, ActKind], ...] = (
        (swapped, "gelu"),
        (x, "gelu_tanh"),
        (x, "silu"),
        (x.roll(1, 0), "gelu"),
    )
    for wrong, kind in wrongs:
        want, error = expected(wrong, kind, gated=True)
        assert not ((out.double() - want).abs() <= SLACK * BF16 * want.abs() + error).all(), kind


def test_no_rows_are_no_work(launchers: Launchers) -> None:
    x = torch.empty((0, 64), dtype=torch.bfloat16, device=launchers.device)
    launchers.act(x, torch.empty((0, 32), dtype=torch.bfloat16, device=launchers.device), kind="silu")


@pytest.mark.parametrize("wrong", ["x", "out", "kind", "scales"])
def test_what_does_not_fit_is_named(launchers: Launchers, wrong: str) -> None:
    on = launchers.device
    x = torch.zeros((3, 64 if wrong != "x" else 60), dtype=torch.bfloat16, device=on)
    out = torch.zeros((3, 32), dtype=torch.bfloat16 if wrong == "out" else torch.int8, device=on)
    scales = torch.zeros(2 if wrong == "scales" else 3, device=on)
    kind = cast("ActKind", "tanh" if wrong == "kind" else "silu")
    with pytest.raises(ValueError, match=f"^{wrong}: "):
        launchers.act(x, out, kind=kind, scales=scales)
