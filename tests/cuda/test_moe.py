"""Mixture of experts in Triton against the reference: the choice exactly, the experts within what rounding may do."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pytest

from llmserve.ops import reference_moe
from tests.ops.seeds import fresh_seed

torch = pytest.importorskip("torch", reason="torch is not installed in this environment: make test-cuda")
pytest.importorskip("triton", reason="triton is not installed in this environment: make test-cuda")

from llmserve.ops.cuda.moe import Router, group, moe, route, tiles_for  # noqa: E402
from llmserve.ops.cuda.stacked_weights import StackedWeights  # noqa: E402
from llmserve.ops.protocol import RouterSpec  # noqa: E402
from tests.cuda import mixture  # noqa: E402 - all after what they need was looked for
from tests.cuda.mixture import Sizes  # noqa: E402

if TYPE_CHECKING:
    from torch import Tensor, device

ROUTERS: Final[tuple[dict[str, Any], ...]] = (
    {},
    {"normalize": "before_top_k", "scaling": 1.5},
    {"scoring": "sigmoid", "choice_bias": True, "scaling": 2.5},
    {"num_groups": 4, "top_k_groups": 3},
    {"scoring": "sigmoid", "choice_bias": True, "num_groups": 2, "top_k_groups": 1, "normalize": "before_top_k"},
)
SIZES: Final = ((1, 4, 1), (33, 8, 2), (7, 60, 6), (20, 12, 6))
"""(tokens, experts, top_k)."""


def check(cases: mixture.Mixture, x: Tensor, y: Tensor) -> None:
    error = np.abs(y.double().cpu().numpy() - cases.expected(x))
    assert (error <= cases.allowance(x)).all(), f"{np.max(error / cases.allowance(x)):.2f} times what is allowed"


@pytest.mark.parametrize("options", ROUTERS, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_the_choice_is_the_references(
    triton_device: device, sizes: tuple[int, int, int], options: dict[str, Any]
) -> None:
    """Logits are eighths, so many are equal, and those that are not are far apart."""
    count, experts, top_k = sizes
    random = np.random.default_rng(fresh_seed())
    logits = random.integers(-12, 13, (count, experts)) / 8.0
    bias = random.integers(-4, 5, experts) / 4.0
    options = dict(options)
    spec = RouterSpec(mixture.named("router"), experts, top_k, **(options | {"choice_bias": None}))
    if biased := options.pop("choice_bias", False):
        spec = replace(spec, choice_bias=mixture.named("bias"))
    arrays = {"router": np.eye(experts, dtype=np.float32), "bias": bias.astype(np.float32)}
    chosen, mixing = reference_moe.route(logits.astype(np.float32), spec, lambda tensor: arrays[tensor.name])
    memory = torch.full((count, experts + 5), float("nan"), device=triton_device)
    memory[:, :experts] = torch.from_numpy(logits)
    on_device = torch.from_numpy(arrays["bias"]).to(triton_device) if biased else None
    ids, weights = route(memory[:, :experts], spec, on_device)
    assert ids.dtype == torch.int32
    assert weights.dtype == torch.float32
    np.testing.assert_array_equal(ids.cpu().numpy(), chosen)
    np.testing.assert_allclose(weights.cpu().numpy(), mixing, rtol=2e-6)


def test_among_equals_the_lowest_experts_win(triton_device: device) -> None:
    spec = RouterSpec(mixture.named("router"), 6, 3)
    ids, weights = route(torch.ones((2, 6), device=triton_device), spec)
    assert ids.tolist() == [[0, 1, 2]] * 2
    assert weights.cpu().numpy() == pytest.approx(np.full((2, 3), 1 / 3))


def test_logits_that_are_no_numbers_choose_within_bounds(triton_device: device) -> None:
    logits = torch.zeros((3, 6), device=triton_device)
    logits[0] = float("nan")
    logits[1, 4] = float("nan")
    spec = RouterSpec(mixture.named("router"), 6, 3, scoring="sigmoid")
    ids, weights = route(logits, spec)
    assert ids.tolist() == [[0, 1, 2], [0, 1, 2], [0, 1, 2]]
    assert weights[0].isnan().all()
    assert weights[1:].isfinite().all()


@pytest.mark.parametrize("kind", ["random", "one", "last", "few"])
@pytest.mark.parametrize("shape", [(65, 1, 4), (66, 2, 4), (70, 6, 60), (700, 3, 8)], ids=str)
@pytest.mark.parametrize("rows", [16, 64])
def test_every_pair_is_in_one_tile_of_its_expert(
    triton_device: device, shape: tuple[int, int, int], kind: str, rows: int
) -> None:
    count, top_k, experts = shape
    random = np.random.default_rng(fresh_seed())
    drawn = {
        "random": random.integers(0, experts, (count, top_k)),
        "one": np.full((count, top_k), 1),
        "last": np.full((count, top_k), experts - 1),
        "few": random.choice([0, experts - 2], (count, top_k)),
    }[kind]
    groups = group(torch.from_numpy(drawn.astype(np.int32)).to(triton_device), experts, rows)
    assert groups.pairs is not None
    assert groups.tile_expert is not None
    tile_expert, pairs = groups.tile_expert.tolist(), groups.pairs.reshape(-1, rows).tolist()
    used = [tile for tile, expert in enumerate(tile_expert) if expert >= 0]
    assert used == list(range(len(used))), "tiles that are not needed come last"
    found: dict[int, list[int]] = {expert: [] for expert in range(experts)}
    for tile in used:
        real = [pair for pair in pairs[tile] if pair != count * top_k]
        assert real, "no tile is empty"
        assert pairs[tile][len(real) :] == [count * top_k] * (rows - len(real))
        found[tile_expert[tile]] += real
    assert found == {expert: np.flatnonzero(drawn.reshape(-1) == expert).tolist() for expert in range(experts)}


@pytest.mark.parametrize("options", ROUTERS[1:4], ids=str)
@pytest.mark.parametrize("sizes", [(1, 4, 1), (7, 8, 2), (33, 4, 2)], ids=str)
def test_agrees_with_float64(triton_device: device, sizes: tuple[int, int, int], options: dict[str, Any]) -> None:
    count, experts, top_k = sizes
    random = np.random.default_rng(fresh_seed())
    cases = mixture.build(random, Sizes(experts=experts, top_k=top_k), triton_device, **options)
    x = mixture.tokens(random, count, 72, triton_device)
    check(cases, x, moe(x, cases.router, cases.experts))


@pytest.mark.parametrize("act", ["silu", "gelu", "gelu_tanh", "relu2"])
@pytest.mark.parametrize("shape", [(1, 1), (17, 33), (130, 70)], ids=str)
def test_activations_at_odd_sizes(triton_device: device, shape: tuple[int, int], act: Any) -> None:
    random = np.random.default_rng(fresh_seed())
    cases = mixture.build(random, Sizes(hidden=shape[0], columns=shape[1], act=act), triton_device)
    x = mixture.tokens(random, 3, shape[0], triton_device)
    check(cases, x, moe(x, cases.router, cases.experts))


def test_many_experts_and_few_tokens(triton_device: device) -> None:
    random = np.random.default_rng(fresh_seed())
    cases = mixture.build(random, Sizes(hidden=40, columns=24, experts=60, top_k=6), triton_device)
    for count in (5, 17):  # without and with a table
        x = mixture.tokens(random, count, 40, triton_device)
        check(cases, x, moe(x, cases.router, cases.experts))


@pytest.mark.parametrize("count", [9, 40, 70, 140])
def test_every_table_of_tiles(triton_device: device, count: int) -> None:
    """All tokens go to expert 2 first, so one expert has many tiles, and others few or none."""
    random = np.random.default_rng(fresh_seed())
    cases = mixture.build(random, Sizes(experts=3), triton_device, scoring="sigmoid", choice_bias=True)
    cases.arrays["bias"][2] = 4.0
    cases.router.choice_bias[2] = 4.0  # type: ignore[index]
    assert tiles_for(count * 2, cases.experts).rows == {9: 16, 40: 32, 70: 64, 140: 128}[count]
    x = mixture.tokens(random, count, 72, triton_device)
    check(cases, x, moe(x, cases.router, cases.experts))


@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("count", [1, 19])
def test_shared_experts_and_the_residual(triton_device: device, count: int, gated: bool, shared: int) -> None:
    random = np.random.default_rng(fresh_seed())
    cases = mixture.build(random, Sizes(shared=shared, shared_gate=gated), triton_device)
    x = mixture.tokens(random, count, 72, triton_device)
    check(cases, x, moe(x, cases.router, cases.experts))
    residual = mixture.tokens(random, count, 72, triton_device)
    y = moe(x, cases.router, cases.experts, residual=residual).double().cpu().numpy()
    want = cases.expected(x) + residual.double().cpu().numpy()
    assert (np.abs(y - want) <= cases.allowance(x) + mixture.UNIT * np.abs(want)).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("count", "group_size", "hidden"), [(3, 0, 72), (1, 16, 80), (5, 32, 96), (2, 48, 96)])
def test_codes_are_multiplied(triton_device: device, count: int, group_size: int, hidden: int, bits: int) -> None:
    random = np.random.default_rng(fresh_seed())
    make = mixture.coded(bits, group_size, biased=bool(random.integers(2)))
    columns = group_size or 40
    sizes = Sizes(hidden=hidden, columns=columns, shared=1, shared_columns=columns)
    cases = mixture.build(random, sizes, triton_device, make=make)
    x = mixture.tokens(random, count, hidden, triton_device)
    check(cases, x, moe(x, cases.router, cases.experts))


def test_rows_of_codes_of_odd_lengths(triton_device: device) -> None:
    random = np.random.default_rng(fresh_seed())
    make = mixture.coded(4, 0, biased=True)
    cases = mixture.build(random, Sizes(hidden=50, columns=134), triton_device, make=make)
    x = mixture.tokens(random, 70, 50, triton_device)
    check(cases, x, moe(x, cases.router, cases.experts))


def test_gate_and_up_may_be_halves_of_one_tensor(triton_device: device) -> None:
    random = np.random.default_rng(fresh_seed())
    cases = mixture.build(random, Sizes(), triton_device)
    both = torch.cat((cases.experts.gate.values, cases.experts.up.values), 1)
    halves = replace(cases.experts, gate=StackedWeights(both[:, :40]), up=StackedWeights(both[:, 40:]))
    x = mixture.tokens(random, 7, 72, triton_device)
    assert torch.equal(moe(x, cases.router, halves), moe(x, cases.router, cases.experts))


def test_only_the_chosen_experts_are_read(triton_device: device) -> None:
    random = np.random.default_rng(fresh_seed())
    cases = mixture.build(random, Sizes(experts=8), triton_device)
    x = mixture.tokens(random, 2, 72, triton_device)
    want = moe(x, cases.router, cases.experts)
    chosen = set(route(x.float() @ cases.router.weight.T, cases.spec)[0].flatten().tolist())
    for part in (cases.experts.gate, cases.experts.up, cases.experts.down):
        part.values[[expert for expert in range(8) if expert not in chosen]] = float("nan")
    assert torch.equal(moe(x, cases.router, cases.experts), want)


def test_a_bad_token_spoils_no_other(triton_device: device) -> None:
    random = np.random.default_rng(fresh_seed())
    cases = mixture.build(random, Sizes(shared=1, shared_gate=True), triton_device)
    x = mixture.tokens(random, 7, 72, triton_device)
    want = moe(x, cases.router, cases.experts)
    x[3] = float("nan")
    y = moe(x, cases.router, cases.experts)
    assert y[3].isnan().all()
    others = [0, 1, 2, 4, 5, 6]
    if triton_device.type == "cpu":  # NumPy sums in another order when rows of a tile move
        check(cases, x[others], y[others])
    else:
        assert torch.equal(y[others], want[others])


@pytest.mark.gpu
@pytest.mark.parametrize("count", [3, 40])
def test_a_graph_replays_it(count: int) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU is usable here")
    random = np.random.default_rng(fresh_seed())
    on = torch.device("cuda")
    cases = mixture.build(random, Sizes(experts=8, shared=1, shared_gate=True), on)
    x = mixture.tokens(random, count, 72, on).contiguous()
    moe(x, cases.router, cases.experts)  # compiles, which a capture does not take
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = moe(x, cases.router, cases.experts)
    for _ in range(3):
        x.copy_(mixture.tokens(random, count, 72, on))
        graph.replay()
        assert torch.equal(y, moe(x, cases.router, cases.experts))


def test_no_tokens_are_no_work(triton_device: device) -> None:
    cases = mixture.build(np.random.default_rng(fresh_seed()), Sizes(), triton_device)
    x = torch.empty((0, 72), dtype=torch.bfloat16, device=triton_device)
    assert moe(x, cases.router, cases.experts).shape == (0, 72)


def test_mistakes_are_seen(triton_device: device) -> None:
    """Each is made in the reference, for the same result."""
    random = np.random.default_rng(fresh_seed())
    sizes = Sizes(hidden=96, columns=64, experts=8, shared=1, shared_gate=True, shared_columns=32)
    make = mixture.coded(4, 32, biased=False)
    options = {"scoring": "sigmoid", "choice_bias": True, "scaling": 1.25}
    cases = mixture.build(random, sizes, triton_device, make=make, **options)
    x = mixture.tokens(random, 9, 96, triton_device)
    y = moe(x, cases.router, cases.experts)
    check(cases, x, y)
    spec, arrays = cases.spec, cases.arrays
    mistakes = (
        replace(cases, spec=replace(spec, normalize="before_top_k")),
        replace(cases, spec=replace(spec, scaling=1.0)),
        replace(cases, arrays=arrays | {"bias": -arrays["bias"]}),
        replace(cases, arrays=arrays | {"gate": arrays["up"], "up": arrays["gate"]}),
        replace(cases, spec=replace(spec, top_k=1)),
        replace(cases, experts_spec=replace(cases.experts_spec, shared_gate=None)),
        replace(cases, experts_spec=replace(cases.experts_spec, shared=None)),
        replace(cases, arrays=arrays | {"down": np.roll(arrays["down"], 1, axis=-1)}),
    )
    for mistaken in mistakes:
        with pytest.raises(AssertionError, match="times what is allowed"):
            check(mistaken, x, y)


@pytest.mark.parametrize("wrong", ["x", "router", "gate", "up", "down", "down.scales", "residual", "shared_gate"])
def test_a_tensor_that_does_not_fit_is_named(triton_device: device, wrong: str) -> None:
    cases = mixture.build(np.random.default_rng(fresh_seed()), Sizes(), triton_device)
    x = torch.zeros((3, 72), dtype=torch.bfloat16, device=triton_device)
    residual = x
    router, experts = cases.router, cases.experts
    short = StackedWeights(experts.gate.values[:, :, :40])
    if wrong == "x":
        x = x.float()
    elif wrong == "router":
        router = Router(router.spec, router.weight.bfloat16())
    elif wrong in ("gate", "up"):
        experts = replace(experts, gate=short) if wrong == "gate" else replace(experts, up=short)
    elif wrong == "down":
        experts = replace(experts, down=replace(experts.down, bits=8))
    elif wrong == "down.scales":
        codes = torch.zeros((4, 72, 40), dtype=torch.int8, device=triton_device)
        scales = torch.zeros((4, 72, 1), dtype=torch.float64, device=triton_device)
        experts = replace(experts, down=StackedWeights(codes, 8, scales))
    elif wrong == "shared_gate":
        experts = replace(experts, shared_gate=torch.zeros(71, device=triton_device))
    else:
        residual = residual[:2]
    with pytest.raises(ValueError, match=f"^{wrong}: "):
        moe(x, router, experts, residual=residual)
