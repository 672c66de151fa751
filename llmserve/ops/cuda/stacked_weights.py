"""Matrices of all experts of a layer on the GPU, in bfloat16 or as codes: the layout that the Triton kernels read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmserve.ops.cuda.library import check, check_dense


@dataclass(frozen=True, slots=True)
class StackedWeights:
    """One matrix of each expert, `[num_experts, columns, depth]`: bfloat16, or codes of 8 or 4 bits.

    Codes of 8 bits are int8. Codes of 4 bits are uint8, two to a byte, the even input in the low half:

        byte j of a row:  | input 2j + 1 | input 2j |
                            bits 7 … 4     bits 3 … 0

    A weight is `scale * code + bias`, or without biases `scale * code` in 8 bits and `scale * (code - 8)` in 4. Scales
    and biases, float16 or float32, belong to a group of inputs: `[num_experts, columns, depth / group]`.
    """

    values: Tensor
    bits: int = 16
    scales: Tensor | None = None
    biases: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(num_experts, columns, depth)."""
        experts, columns, width = self.values.shape
        return experts, columns, width * 2 if self.bits == 4 else width

    @property
    def group(self) -> int:
        """Inputs that share a scale; all of them where there are no scales."""
        return self.shape[2] if self.scales is None else self.shape[2] // max(1, self.scales.shape[2])

    def check(self, name: str, shape: tuple[int, int, int]) -> None:
        """Raises `ValueError` naming what the kernels could not take."""
        if self.bits not in (4, 8, 16):
            raise ValueError(f"{name}: {self.bits} bits; 4, 8 and 16 are known")
        experts, columns, depth = shape
        dtype = {4: torch.uint8, 8: torch.int8, 16: torch.bfloat16}[self.bits]
        check(name, self.values, dtypes=(dtype,), shape=(experts, columns, depth // 2 if self.bits == 4 else depth))
        if (self.scales is None) != (self.bits == 16):
            raise ValueError(f"{name}: codes have scales, and bfloat16 has none")
        if self.scales is None:
            return
        groups = self.scales.shape[-1]
        if groups < 1 or depth % groups or depth % 2 or (groups > 1 and self.group % 16):
            raise ValueError(f"{name}: {groups} groups of {depth} inputs; a group is a multiple of 16 or all of them")
        for part, tensor in (("scales", self.scales), ("biases", self.biases)):
            if tensor is not None:
                dtypes = (torch.float16, torch.float32)
                check_dense(f"{name}.{part}", tensor, dtypes=dtypes, shape=(experts, columns, groups))


def stack_codes(
    codes: NDArray[np.uint8], bits: int, scales: NDArray[Any], biases: NDArray[Any] | None, device: torch.device
) -> StackedWeights:
    """Codes as rows, `[num_experts, columns, depth]` with a byte each (int8 ones by their bits), on the device."""
    packed = codes[..., 0::2] | codes[..., 1::2] << 4 if bits == 4 else codes.view(np.int8)
    # Copies: torch warns of arrays that are mapped read-only.
    values, scales_there, biases_there = (
        None if part is None else torch.from_numpy(np.array(part, order="C")).to(device)
        for part in (packed, scales, biases)
    )
    assert values is not None
    return StackedWeights(values, bits, scales_there, biases_there)
