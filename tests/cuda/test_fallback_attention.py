"""Paged attention in Triton against float64: odd heads, other sizes for values, every option, poisoned blocks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pytest

from tests.ops.seeds import fresh_seed

torch = pytest.importorskip("torch", reason="torch is not installed in this environment: make test-cuda")
pytest.importorskip("triton", reason="triton is not installed in this environment: make test-cuda")

from llmserve.ops.cuda.fallback_attention import paged_attention  # noqa: E402 - after what it needs was looked for

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor, device

BLOCK_SIZE: Final = 16
UNIT: Final = 2.0**-8
"""Half a unit in the last place of bfloat16, relative."""


@dataclass(frozen=True, slots=True)
class Heads:
    """Of a layer."""

    heads: int
    kv_heads: int
    head_dim: int
    v_dim: int


@dataclass(slots=True)
class Batch:
    """A step's tensors, and keys and values of each sequence in order."""

    q: Tensor
    out: Tensor
    caches: tuple[Tensor, Tensor]
    tables: dict[str, Tensor]
    keys: list[NDArray[np.float64]]  # [seq_len, kv_heads, D]
    values: list[NDArray[np.float64]]
    spare_rows: int

    def run(self, **options: Any) -> NDArray[np.float64]:
        k_cache, v_cache = self.caches
        paged_attention(self.q, k_cache, v_cache, self.out, **self.tables, **options)
        y = self.out.double().cpu().numpy()
        assert self.spare_rows == 0 or np.isnan(y[-self.spare_rows :]).all(), "it wrote rows of no sequence"
        return np.asarray(y[: len(y) - self.spare_rows])


def make(lengths: list[tuple[int, int]], heads: Heads, on: device, *, spare_rows: int = 0) -> Batch:
    """Sequences of (new tokens, length in all) in shuffled blocks; whatever holds no token is not a number."""
    random = np.random.default_rng(fresh_seed())
    count = [-(-length // BLOCK_SIZE) for _, length in lengths]
    order = random.permutation(sum(count) + 3)
    widest = max([*count, 1]) + 1
    table = np.full((len(lengths), widest), 2**30, np.int32)
    sizes = [(len(order), heads.kv_heads, BLOCK_SIZE, dim) for dim in (heads.head_dim, heads.v_dim)]
    caches = [torch.full(size, float("nan"), dtype=torch.bfloat16) for size in sizes]
    history: tuple[list[Any], list[Any]] = ([], [])
    taken = 0
    for row, (_, length) in enumerate(lengths):
        table[row, : count[row]] = order[taken : taken + count[row]]
        taken += count[row]
        for cache, kept in zip(caches, history, strict=True):
            drawn = torch.from_numpy(random.standard_normal((length, *cache.shape[1::2]))).bfloat16()
            for position in range(length):
                block = table[row, position // BLOCK_SIZE]
                cache[block, :, position % BLOCK_SIZE] = drawn[position]
            kept.append(drawn.double().numpy())
    starts = np.cumsum([0, *(new for new, _ in lengths)])
    rows = int(starts[-1]) + spare_rows
    memory = torch.full((rows, heads.heads + 1, heads.head_dim), float("nan"), dtype=torch.bfloat16)
    memory[:, : heads.heads] = torch.from_numpy(random.standard_normal((rows, heads.heads, heads.head_dim)))
    memory = memory.to(on)
    out = torch.full((rows, heads.heads, heads.v_dim), float("nan"), dtype=torch.bfloat16, device=on)
    lens = [length for _, length in lengths]
    arrays = {"block_tables": table, "seq_lens": np.array(lens), "query_start": starts}
    tables = {name: torch.from_numpy(array.astype(np.int32)).to(on) for name, array in arrays.items()}
    k_cache, v_cache = (cache.to(on) for cache in caches)
    return Batch(memory[:, : heads.heads], out, (k_cache, v_cache), tables, *history, spare_rows)


def expected(
    batch: Batch,
    *,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
    sinks: Tensor | None = None,
    causal: bool = True,
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The attention, and the same of the values' magnitudes."""
    q = batch.q.double().cpu().numpy()
    starts = batch.tables["query_start"].tolist()
    results, magnitudes = [], []
    for index, (keys, values) in enumerate(zip(batch.keys, batch.values, strict=True)):
        group = q.shape[1] // keys.shape[1]
        new = starts[index + 1] - starts[index]
        for row in range(new):
            position = len(keys) - new + row
            distance = position - np.arange(len(keys))
            seen = np.abs(distance) < window if window else np.ones(len(keys), bool)
            seen &= (distance >= 0) if causal else True
            for head in range(q.shape[1]):
                scores = keys[:, head // group] @ q[starts[index] + row, head] * scale
                scores = softcap * np.tanh(scores / softcap) if softcap else scores
                weights = np.where(seen, np.exp(scores), 0.0)
                total = weights.sum() + (0.0 if sinks is None else np.exp(float(sinks[head])))
                results.append(weights / total @ values[:, head // group])
                magnitudes.append(weights / total @ np.abs(values[:, head // group]))
    shape = (starts[-1], q.shape[1], batch.out.shape[2])
    return np.array(results).reshape(shape), np.array(magnitudes).reshape(shape)


def check(batch: Batch, y: NDArray[np.float64], **options: Any) -> None:
    """Weights are rounded to bfloat16 and so is the result, half a unit each; float32 adds a little to scores."""
    want, magnitude = expected(batch, **options)
    error = np.abs(y - want)
    assert (error <= UNIT * 1.02 * (magnitude + np.abs(want)) + 1e-6).all(), "more than rounding"


MIXED: Final = [(1, 1), (1, 40), (5, 5), (3, 37), (0, 20), (20, 33)]
SHAPES: Final = (
    Heads(4, 2, 20, 20),
    Heads(6, 2, 36, 24),
    Heads(3, 1, 7, 1),
    Heads(2, 2, 130, 64),
    Heads(5, 1, 288, 256),
)


@pytest.mark.parametrize("heads", SHAPES, ids=str)
def test_any_size_of_heads(triton_device: device, heads: Heads) -> None:
    batch = make(MIXED, heads, triton_device, spare_rows=2)
    check(batch, batch.run(scale=heads.head_dim**-0.5), scale=heads.head_dim**-0.5)


def test_latent_attention_reads_values_out_of_the_keys(triton_device: device) -> None:
    """Many query heads, one latent vector of 576 per token whose first 512 are the value."""
    heads = Heads(40, 1, 576, 512)
    batch = make([(1, 35), (1, 2)], heads, triton_device)
    k_cache = batch.caches[0]
    batch = replace(batch, caches=(k_cache, k_cache[..., :512]), values=[keys[..., :512] for keys in batch.keys])
    check(batch, batch.run(scale=576**-0.5), scale=576**-0.5)


OPTIONS: Final[tuple[dict[str, Any], ...]] = (
    {"window": 9},
    {"window": 1},
    {"softcap": 2.0},
    {"sinks": True},
    {"causal": False},
    {"causal": False, "window": 6},
    {"sinks": True, "window": 18, "softcap": 3.0},
)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_options(triton_device: device, options: dict[str, Any]) -> None:
    batch = make(MIXED, Heads(6, 2, 20, 12), triton_device)
    if "sinks" in options:
        options = options | {"sinks": torch.randn(6, device=triton_device)}
    check(batch, batch.run(scale=0.3, **options), scale=0.3, **options)


def test_long_prompts_fill_larger_tiles(triton_device: device) -> None:
    batch = make([(70, 90), (2, 50), (65, 65)], Heads(2, 1, 20, 20), triton_device)
    check(batch, batch.run(scale=0.2, window=40), scale=0.2, window=40)


def test_large_scores_do_not_overflow(triton_device: device) -> None:
    batch = make([(3, 40)], Heads(2, 1, 20, 20), triton_device)
    y = batch.run(scale=100.0)
    keys, values = batch.keys[0][:, 0], batch.values[0][:, 0]
    for row, position in enumerate((37, 38, 39)):
        for head in range(2):
            scores = keys[: position + 1] @ batch.q[row, head].double().cpu().numpy() * 100.0
            weights = np.exp(scores - scores.max())
            np.testing.assert_allclose(y[row, head], weights / weights.sum() @ values[: position + 1], atol=0.05)


def test_mistakes_are_seen(triton_device: device) -> None:
    batch = make(MIXED, Heads(4, 2, 20, 20), triton_device)
    sinks = torch.zeros(4, device=triton_device)
    right = {"scale": 0.2, "window": 12, "softcap": 5.0, "sinks": sinks}
    y = batch.run(**right)
    check(batch, y, **right)
    mistakes: tuple[dict[str, Any], ...] = (
        {"scale": 0.21},
        {"window": 11},
        {"window": 13},
        {"softcap": 0.0},
        {"sinks": None},
        {"sinks": sinks + 0.1},
        {"causal": False},
    )
    for mistake in mistakes:
        with pytest.raises(AssertionError, match="more than rounding"):
            check(batch, y, **(right | mistake))


def test_no_tokens_are_no_work(triton_device: device) -> None:
    batch = make([(0, 5)], Heads(2, 1, 20, 20), triton_device, spare_rows=3)
    assert batch.run(scale=1.0).shape == (0, 2, 20)


@pytest.mark.parametrize("wrong", ["q", "k_cache", "v_cache", "out", "seq_lens", "query_start", "sinks"])
def test_a_tensor_that_does_not_fit_is_named(triton_device: device, wrong: str) -> None:
    batch = make([(2, 5)], Heads(4, 2, 20, 20), triton_device)
    tensors = {"q": batch.q, "k_cache": batch.caches[0], "v_cache": batch.caches[1], "out": batch.out, **batch.tables}
    tensors["sinks"] = torch.zeros(4, device=triton_device)
    tensors[wrong] = {
        "q": batch.q[:, :3],
        "k_cache": batch.caches[0][..., :19],
        "v_cache": batch.caches[1].float(),
        "out": batch.out[:1],
        "seq_lens": batch.tables["seq_lens"].long(),
        "query_start": batch.tables["query_start"][:1],
        "sinks": torch.zeros(3, device=triton_device),
    }[wrong]
    with pytest.raises(ValueError, match=f"^{wrong}: "):
        paged_attention(**tensors, scale=1.0)
