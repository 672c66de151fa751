"""Norm, rotation and the cache by every kind of launchers against float64: all cache types, strides, padding tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
import pytest

from tests.ops.seeds import fresh_seed

torch = pytest.importorskip("torch", reason="torch is not installed in this environment: make test-cuda")

if TYPE_CHECKING:
    from torch import Tensor, device, dtype

    from llmserve.ops.cuda.kv_append import HeadNorm, Rotation
    from llmserve.ops.cuda.kv_cache import KvCache
    from llmserve.ops.cuda.launchers import Launchers

TYPES: Final = (torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.int8)
STEP: Final = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float8_e4m3fn: 2.0**-4, torch.int8: 0.0}
"""Half a unit in the last place, relative."""
FLAT: Final = {torch.bfloat16: 0.0, torch.float16: 2.0**-25, torch.float8_e4m3fn: 2.0**-10, torch.int8: 0.5}
"""Half the step between the smallest numbers, in units of the scale where there is one."""
FLOAT32: Final = 4e-6
"""Of the norm, the rotation and the scale, relative to the largest value of a head: some ten roundings of 2^-24."""
NUM_BLOCKS, GUARD = 7, 64


def poisoned(shape: tuple[int, ...], kind: dtype, on: device) -> Tensor:
    """Every byte 0x7F: NaN in float8, a pattern to recognize in the others."""
    count = int(np.prod(shape)) * torch.empty(0, dtype=kind).element_size()
    return torch.full((count,), 0x7F, dtype=torch.uint8, device=on).view(kind).view(shape)


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


class Case:
    """Random inputs, poisoned outputs."""

    def __init__(self, on: device, kind: dtype, *, heads: int = 6, kv_heads: int = 2, head_dim: int = 64) -> None:
        from llmserve.ops.cuda.kv_cache import KvCache

        self.random = np.random.default_rng(fresh_seed())
        self.on, self.kind, self.heads, self.kv_heads, self.head_dim = on, kind, heads, kv_heads, head_dim
        self.block_size = int(self.random.choice([8, 16, 32]))
        self.tokens = int(self.random.integers(1, NUM_BLOCKS * self.block_size // 2))
        columns = (heads + 2 * kv_heads) * head_dim
        spread = 10.0 ** self.random.uniform(-2, 2, (self.tokens, columns // head_dim, 1))
        values = self.random.standard_normal((self.tokens, columns // head_dim, head_dim)) * spread
        memory = torch.full((self.tokens, columns + 8), float("nan"), dtype=torch.bfloat16, device=on)
        self.qkv = memory[:, :columns]
        self.qkv.copy_(torch.from_numpy(values.reshape(self.tokens, columns)))
        self.q_memory = torch.full(
            (self.tokens, heads * head_dim + GUARD), float("nan"), dtype=torch.bfloat16, device=on
        )
        self.q_out = self.q_memory[:, : heads * head_dim]
        shape = (NUM_BLOCKS, kv_heads, self.block_size, head_dim)
        scales = [poisoned(shape[:3], torch.float32, on) for _ in "kv"] if kind.itemsize == 1 else [None, None]
        self.cache: KvCache = KvCache(poisoned(shape, kind, on), poisoned(shape, kind, on), *scales)
        self.positions = self.ints(self.random.integers(0, 100, self.tokens), torch.int32)
        slots = self.random.permutation(NUM_BLOCKS * self.block_size)[: self.tokens]
        self.slots = self.ints(np.where(self.random.random(self.tokens) < 0.2, -1, slots), torch.int64)

    def ints(self, values: object, kind: dtype) -> Tensor:
        return torch.tensor(values, dtype=kind, device=self.on)

    def rotation(self, rotary_dim: int, style: Literal["half", "interleaved"]) -> Rotation:
        from llmserve.ops.cuda.kv_append import Rotation

        angles = np.arange(100)[:, None] * 10000.0 ** (-np.arange(rotary_dim // 2) / (rotary_dim // 2))
        table = torch.from_numpy(1.3 * np.stack([np.cos(angles), np.sin(angles)], -1)).float().to(self.on)
        return Rotation(table, style)

    def norm(self, *, with_q: bool = True) -> HeadNorm:
        from llmserve.ops.cuda.kv_append import HeadNorm

        q, k = (torch.from_numpy(self.random.uniform(0.5, 2, self.head_dim)).float().to(self.on) for _ in "qk")
        return HeadNorm(q if with_q else None, k, 1e-5)

    def expected(self, rotation: Rotation | None, norm: HeadNorm | None) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values in float64, [tokens, heads, head_dim]."""
        x = self.qkv.double().reshape(self.tokens, -1, self.head_dim)
        q, k, v = x.split([self.heads, self.kv_heads, self.kv_heads], dim=1)
        turned = []
        for part, weight in ((q, None if norm is None else norm.q), (k, None if norm is None else norm.k)):
            y = part
            if norm is not None and weight is not None:
                y = y / (y.square().mean(-1, keepdim=True) + norm.eps).sqrt() * weight.double()
            if rotation is not None:
                y = rotated(y, rotation, self.positions)
            turned.append(y)
        return turned[0], turned[1], v

    def check(self, rotation: Rotation | None, norm: HeadNorm | None) -> None:
        q, k, v = self.expected(rotation, norm)
        assert_close(self.q_out.double().reshape(q.shape), q, STEP[torch.bfloat16] * q.abs())
        assert self.q_memory[:, self.heads * self.head_dim :].isnan().all(), "it wrote behind a row"
        written = self.slots >= 0
        blocks, offsets = self.slots[written] // self.block_size, self.slots[written] % self.block_size
        for want, values, scales in ((k, self.cache.k, self.cache.k_scales), (v, self.cache.v, self.cache.v_scales)):
            want = want[written]
            got, scale = values[blocks, :, offsets].double(), torch.ones((), dtype=torch.float64, device=self.on)
            if scales is not None:
                scale = want.abs().amax(-1, keepdim=True) / (127 if self.kind == torch.int8 else 448)
                stored = scales[blocks, :, offsets].double()[..., None]
                assert ((stored - scale).abs() <= FLOAT32 * scale).all()
                got = got * stored
            assert_close(got, want, STEP[self.kind] * want.abs() + FLAT[self.kind] * scale)
        self.check_untouched(blocks, offsets)

    def check_untouched(self, blocks: Tensor, offsets: Tensor) -> None:
        for tensor in (self.cache.k, self.cache.v, self.cache.k_scales, self.cache.v_scales):
            if tensor is not None:
                others = torch.ones(tensor.shape[:3], dtype=torch.bool, device=self.on)
                others[blocks, :, offsets] = False
                rows = bits(tensor).reshape(*tensor.shape[:3], -1)
                assert (rows[others] == 0x7F).all(), "it wrote where no token goes"


def rotated(x: Tensor, rotation: Rotation, positions: Tensor) -> Tensor:
    """By complex numbers, so that nothing is shared with what is tested."""
    half = rotation.table.shape[1]
    turn = torch.view_as_complex(rotation.table.double().contiguous())[positions.long()][:, None]
    first = torch.arange(half, device=x.device) * (1 if rotation.style == "half" else 2)
    second = first + (half if rotation.style == "half" else 1)
    pairs = torch.complex(x[..., first], x[..., second]) * turn
    out = x.clone()
    out[..., first], out[..., second] = pairs.real, pairs.imag
    return out


def assert_close(got: Tensor, want: Tensor, rounding: Tensor) -> None:
    largest = want.abs().amax(-1, keepdim=True)
    assert ((got - want).abs() <= 1.002 * rounding + FLOAT32 * largest).all()


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize(
    ("head_dim", "rotary_dim", "style"),
    [(16, 16, "half"), (32, 8, "half"), (64, 64, "interleaved"), (64, 36, "half"), (80, 80, "half"), (128, 128, "half"),
     (80, 20, "interleaved"), (256, 256, "half"), (256, 64, "half")],
)  # fmt: skip
def test_agrees_with_float64(
    launchers: Launchers, head_dim: int, rotary_dim: int, style: Literal["half", "interleaved"], kind: dtype
) -> None:
    case = Case(launchers.device, kind, head_dim=head_dim, heads=3, kv_heads=1)
    rotation, norm = case.rotation(rotary_dim, style), case.norm()
    launchers.kv_append(case.qkv, case.q_out, case.cache, case.positions, case.slots, rotation=rotation, norm=norm)
    case.check(rotation, norm)
    assert norm.q is not None
    with pytest.raises(AssertionError):  # a planted mistake: the norm behind the rotation
        wrong = case.expected(rotation, None)[0]
        wrong = wrong / (wrong.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.q.double()
        assert_close(case.q_out.double().reshape(wrong.shape), wrong, STEP[torch.bfloat16] * wrong.abs())


@pytest.mark.parametrize("kind", TYPES, ids=str)
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize("with_rotation", [False, True])
def test_each_part_may_be_left_out(launchers: Launchers, with_rotation: bool, with_norm: bool, kind: dtype) -> None:
    case = Case(launchers.device, kind)
    rotation = case.rotation(64, "half") if with_rotation else None
    norm = case.norm(with_q=False) if with_norm else None
    launchers.kv_append(case.qkv, case.q_out, case.cache, case.positions, case.slots, rotation=rotation, norm=norm)
    case.check(rotation, norm)


@pytest.mark.parametrize("head_dim", [24, 72])
def test_heads_of_odd_vectors_in_two_bytes(launchers: Launchers, head_dim: int) -> None:
    case = Case(launchers.device, torch.bfloat16, head_dim=head_dim)
    rotation = case.rotation(head_dim, "half")
    launchers.kv_append(case.qkv, case.q_out, case.cache, case.positions, case.slots, rotation=rotation)
    case.check(rotation, None)


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_heads_of_zeros_and_of_nan_keep_their_meaning(launchers: Launchers, kind: dtype) -> None:
    case = Case(launchers.device, kind)
    case.qkv[:] = 0.0
    case.qkv[0, case.heads * case.head_dim + 3] = float("nan")
    case.slots = case.ints(np.arange(case.tokens), torch.int64)
    launchers.kv_append(case.qkv, case.q_out, case.cache, case.positions, case.slots)
    assert case.cache.k_scales is not None
    scales = case.cache.k_scales.transpose(1, 2).reshape(-1, case.kv_heads)[: case.tokens]
    assert scales[0, 0].isnan()
    scales[0, 0] = 0.0
    assert (scales == 0).all()
    values = case.cache.v.transpose(1, 2).reshape(-1, case.kv_heads, case.head_dim)[: case.tokens]
    assert (values.float() == 0).all()


def test_int8_rounds_half_to_even(launchers: Launchers) -> None:
    case = Case(launchers.device, torch.int8, heads=1, kv_heads=1, head_dim=16)
    row = torch.tensor([127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 3.25, -127, 4.5, 5.5, -4.5, 100.5, 99.5, 0, 1.0])
    case.qkv[0, 16:32] = row
    case.slots[0] = 5
    launchers.kv_append(case.qkv[:1], case.q_out[:1], case.cache, case.positions[:1], case.slots[:1])
    assert torch.equal(case.cache.k.reshape(-1, 16)[5].float().cpu(), row.bfloat16().float().round())


def test_no_tokens_are_no_work(launchers: Launchers) -> None:
    case = Case(launchers.device, torch.bfloat16)
    launchers.kv_append(case.qkv[:0], case.q_out[:0], case.cache, case.positions[:0], case.slots[:0])
    assert (bits(case.cache.k) == 0x7F).all()


@pytest.mark.parametrize(
    "wrong", ["qkv", "q_out", "positions", "slots", "k_scales", "v_cache", "rotation", "q_norm", "k_cache"]
)
def test_a_tensor_that_does_not_fit_is_named(launchers: Launchers, wrong: str) -> None:
    case = Case(launchers.device, torch.int8)
    qkv, q_out, cache, positions, slots = case.qkv, case.q_out, case.cache, case.positions, case.slots
    rotation, norm = case.rotation(64, "half"), case.norm()
    if wrong == "qkv":
        qkv = case.qkv[:, 8:]
    elif wrong == "q_out":
        q_out = case.q_memory[:, 1 : 1 + q_out.shape[1]]
    elif wrong == "positions":
        positions = positions.long()
    elif wrong == "slots":
        slots = slots.int()
    elif wrong == "rotation":
        rotation = replace(rotation, table=torch.zeros((100, 40, 2), device=launchers.device))
    elif wrong == "q_norm":
        norm = replace(norm, q=torch.ones(32, device=launchers.device))
    else:
        changed = {"k_scales": None, "v_cache": cache.v[:, :1], "k_cache": cache.k[:, :, :5]}[wrong]
        cache = replace(cache, **{wrong.removesuffix("_cache"): changed})
    with pytest.raises(ValueError, match=f"^{wrong}: "):
        launchers.kv_append(qkv, q_out, cache, positions, slots, rotation=rotation, norm=norm)
