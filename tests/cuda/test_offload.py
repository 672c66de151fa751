"""Host blocks against a plain model of both memories, with caches of several shapes and types."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from tests.ops.seeds import fresh_seed

torch = pytest.importorskip("torch", reason="torch is not installed in this environment: make test-cuda")

if TYPE_CHECKING:
    from torch import Generator, Tensor, device, dtype

from llmserve.errors import InvalidRequest, OutOfMemory  # noqa: E402
from llmserve.ops.cuda import offload  # noqa: E402
from llmserve.ops.cuda.offload import HostBlocks, Transfer, bytes_per_block, host_blocks_in  # noqa: E402

NUM_BLOCKS = 11
SHAPES: dict[str, list[tuple[tuple[int, ...], dtype]]] = {
    "bfloat16": [((2, 8, 16), torch.bfloat16)] * 4,
    "scales": [((2, 8, 16), torch.int8), ((2, 8), torch.float32), ((1, 8, 16), torch.float8_e4m3fn)],
    "odd bytes": [((3,), torch.uint8), ((5,), torch.int16)],
}
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))


@pytest.fixture(params=DEVICES)
def on(request: pytest.FixtureRequest) -> device:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU is usable here")
    return torch.device(request.param)


def random_bytes(tensor: Tensor, generator: Generator) -> None:
    """Any bits, NaNs among them: a move must keep them all."""
    raw = tensor.view(tensor.shape[0], -1).view(torch.uint8)
    raw.copy_(torch.randint(0, 256, raw.shape, generator=generator, dtype=torch.uint8))


def rows(caches: list[Tensor]) -> list[bytes]:
    """What each device block holds, over all caches."""
    raw = [cache.cpu().view(NUM_BLOCKS, -1).view(torch.uint8).numpy() for cache in caches]
    return [b"".join(part[block].tobytes() for part in raw) for block in range(NUM_BLOCKS)]


def random_transfers(choose: random.Random, known: set[int], num_slots: int) -> list[Transfer]:
    """Any order and any reuse of slots and blocks, but no slot is read that was never written."""
    transfers: list[Transfer] = []
    for _ in range(choose.randrange(20)):
        block, slot = choose.randrange(NUM_BLOCKS), choose.randrange(num_slots)
        if known and choose.random() < 0.5:
            transfers.append(("to_device", choose.choice(sorted(known)), block))
        else:
            transfers.append(("to_host", block, slot))
            known.add(slot)
    return transfers


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize(("num_slots", "num_staged"), [(1, 1), (2, 1), (7, 2), (30, 5), (30, 100)])
def test_both_memories_hold_what_the_order_of_transfers_says(
    on: device, shapes: str, num_slots: int, num_staged: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = fresh_seed()
    choose, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    caches = [torch.empty((NUM_BLOCKS, *shape), dtype=kind, device=on) for shape, kind in SHAPES[shapes]]
    monkeypatch.setattr(offload, "STAGING_BYTES", num_staged * bytes_per_block(caches))
    monkeypatch.setattr(offload, "SEGMENT_BYTES", choose.choice((1, 3, 100)) * bytes_per_block(caches))
    blocks = HostBlocks(caches, num_slots)
    host: dict[int, bytes] = {}
    known: set[int] = set()
    for _ in range(20):
        for cache in caches:
            random_bytes(cache, generator)
        want = rows(caches)
        transfers = random_transfers(choose, known, num_slots)
        blocks.apply(transfers)
        for kind, source, target in transfers:
            if kind == "to_host":
                host[target] = want[source]
            else:
                want[target] = host[source]
        assert rows(caches) == want, f"seed {seed}"


def test_the_bytes_of_a_block_are_those_of_all_caches() -> None:
    caches = [torch.zeros((4, 2, 8, 16), dtype=torch.bfloat16), torch.zeros((4, 2, 8))]
    assert bytes_per_block(caches) == 2 * 8 * 16 * 2 + 2 * 8 * 4


def test_a_size_is_of_whole_blocks() -> None:
    assert [host_blocks_in(size, 100) for size in (0, 100, 199, 250)] == [0, 1, 1, 2]
    with pytest.raises(InvalidRequest, match=r"^host_kv_cache_bytes: 99;"):
        host_blocks_in(99, 100)


def test_no_host_blocks_take_no_memory() -> None:
    blocks = HostBlocks([torch.zeros((4, 8))], 0)
    blocks.apply([])
    assert blocks.num_blocks == 0


def test_memory_that_is_not_to_be_had_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    caches = [torch.zeros((4, 8))]

    def refuse(*args: object, **kwargs: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(OutOfMemory, match=r"5 blocks \(160 bytes\)"):
        HostBlocks(caches, 5)


@pytest.mark.parametrize(
    "wrong", [[], [(4, 8), (5, 8)], [(4,)], [(4, 0)]], ids=["none", "other blocks", "no rows", "empty rows"]
)
def test_what_has_no_row_per_block_is_refused(wrong: list[tuple[int, ...]]) -> None:
    with pytest.raises(ValueError, match=r"^tensors: "):
        HostBlocks([torch.zeros(shape) for shape in wrong], 2)


def test_a_cache_that_is_not_dense_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^tensors: number 0"):
        HostBlocks([torch.zeros((4, 8))[:, ::2]], 2)
