"""The paged KV cache of all layers in GPU memory."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor

from llmserve.config import KVCacheDtype
from llmserve.errors import InvalidRequest, OutOfMemory
from llmserve.ops.cuda.copy_blocks import addresses
from llmserve.ops.cuda.kv_cache import LARGEST, KvCache

DTYPES: Final[dict[KVCacheDtype, torch.dtype]] = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
}


@dataclass(slots=True)
class PagedCache:
    """Caches by layer, all with the same blocks."""

    dtype: torch.dtype
    block_size: int
    shapes: dict[int, tuple[int, int]]
    """layer → (kv_heads, head_dim)."""
    layers: dict[int, KvCache] = field(default_factory=dict)

    def bytes_per_block(self) -> int:
        """Over all layers."""
        scale_bytes = 4 if self.dtype in LARGEST else 0
        return sum(
            2 * self.block_size * heads * (head_dim * self.dtype.itemsize + scale_bytes)
            for heads, head_dim in self.shapes.values()
        )

    def allocate(self, num_blocks: int, device: torch.device) -> None:
        """Raises `OutOfMemory`."""
        self.layers.clear()
        try:
            for layer, (heads, head_dim) in self.shapes.items():
                slots = num_blocks, heads, self.block_size
                k, v = (torch.zeros((*slots, head_dim), dtype=self.dtype, device=device) for _ in range(2))
                scales = [torch.zeros(slots, device=device) for _ in range(2)] if self.dtype in LARGEST else []
                self.layers[layer] = KvCache(k, v, *scales)
        except torch.OutOfMemoryError as error:
            self.layers.clear()
            need = self.bytes_per_block() * num_blocks
            raise OutOfMemory(f"a KV cache of {num_blocks} blocks ({need} bytes) does not fit on the GPU") from error

    def addresses(self) -> dict[int, Tensor]:
        """Bytes of a block → where the tensors with blocks of this size lie, on the device."""
        groups: dict[int, list[Tensor]] = defaultdict(list)
        for tensor in self.tensors():
            groups[tensor[0].nbytes].append(tensor)
        return {size: addresses(tensors) for size, tensors in groups.items()}

    def tensors(self) -> Iterator[Tensor]:
        """All memory, each tensor with a row per block."""
        for cache in self.layers.values():
            yield from (part for part in (cache.k, cache.v, cache.k_scales, cache.v_scales) if part is not None)


def check_block_size(block_size: int) -> None:
    """Raises `InvalidRequest` for one that the kernels do not take."""
    if block_size < 8 or block_size & (block_size - 1):
        raise InvalidRequest(
            f"block_size: {block_size}; on CUDA it is a power of two, 8 at the least", param="block_size"
        )
