"""Block copies through addresses, as the kernel sees them."""

from __future__ import annotations

import ctypes

from torch import Tensor

from llmserve.ops.cuda.copy_blocks import check_arguments


def copy_blocks(pairs: Tensor, count: Tensor, tensors: Tensor, *, block_bytes: int) -> None:
    check_arguments(pairs, count, tensors, block_bytes)
    for source, target in pairs[: int(count[0])].tolist():
        for address in tensors.tolist():
            ctypes.memmove(address + target * block_bytes, address + source * block_bytes, block_bytes)
