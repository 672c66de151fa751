"""Block copies by every kind of launchers: several caches, a count on the device, nothing else written."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.ops.seeds import fresh_seed

torch = pytest.importorskip("torch", reason="torch is not installed in this environment: make test-cuda")

if TYPE_CHECKING:
    from llmserve.ops.cuda.launchers import Launchers

from llmserve.ops.cuda.copy_blocks import addresses  # noqa: E402


@pytest.mark.parametrize("block_bytes", [16, 48, 4096, 5008])
@pytest.mark.parametrize("num_tensors", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 5])
def test_blocks_are_copied_and_nothing_else(
    launchers: Launchers, block_bytes: int, num_tensors: int, count: int
) -> None:
    random = torch.Generator().manual_seed(fresh_seed())
    num_blocks = 20
    before = torch.randint(-128, 128, (num_tensors, num_blocks, block_bytes), generator=random, dtype=torch.int8)
    caches = [cache.clone().to(launchers.device) for cache in before]
    order = torch.randperm(num_blocks, generator=random)
    pairs = torch.stack((order[:8], order[8:16]), -1)
    pairs[1, 0] = pairs[0, 0]  # a block with two copies
    want = before.clone()
    for source, target in pairs[:count].tolist():
        want[:, target] = before[:, source]
    launchers.copy_blocks(
        pairs.contiguous().to(launchers.device),
        torch.tensor([count], dtype=torch.int32, device=launchers.device),
        addresses(caches),
        block_bytes=block_bytes,
    )
    assert torch.equal(torch.stack(caches).cpu(), want)


def test_nothing_to_copy_is_no_work(launchers: Launchers) -> None:
    on = launchers.device
    count, tensors = torch.zeros(1, dtype=torch.int32, device=on), torch.zeros(1, dtype=torch.int64, device=on)
    launchers.copy_blocks(torch.zeros((0, 2), dtype=torch.int64, device=on), count, tensors, block_bytes=16)


@pytest.mark.parametrize("wrong", ["pairs", "count", "tensors", "block_bytes", "caches"])
def test_what_does_not_fit_is_named(launchers: Launchers, wrong: str) -> None:
    on = launchers.device
    cache = torch.zeros((4, 32), dtype=torch.int8, device=on)
    pairs = torch.zeros((1, 3 if wrong == "pairs" else 2), dtype=torch.int64, device=on)
    count = torch.ones(2 if wrong == "count" else 1, dtype=torch.int32, device=on)
    with pytest.raises(ValueError, match=f"^{wrong}: "):
        tensors = addresses([cache[:, :16] if wrong == "caches" else cache])
        launchers.copy_blocks(
            pairs,
            count,
            tensors.int() if wrong == "tensors" else tensors,
            block_bytes=24 if wrong == "block_bytes" else 32,
        )
