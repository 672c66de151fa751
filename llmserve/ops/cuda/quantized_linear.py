"""Linear layers with weights of 4 and 8 bits (`csrc/cuda/quantized_linear.cu`)."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from llmserve.ops.cuda.library import TYPES, CudaLibrary, check_dense, check_device, pointer
from llmserve.ops.cuda.linear import LinearArgs, Workspace, check_linear, linear_args
from llmserve.ops.cuda.packing import STRIP, STRIPS, TILE, PackedWeight

GROUPS: Final = (0, 16, 32, 64, 128)


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """`packing.PackedWeight` as tensors."""

    bits: int
    group: int
    outputs: int
    inputs: int
    codes: Tensor
    """uint8 [strips, tiles, bits / 4, 32, 16]."""
    scales: Tensor
    """float16 or float32 [strips, groups, 8, 2]."""
    biases: Tensor | None
    order: Tensor | None
    """int32 [inputs]: column j of the weight multiplies input `order[j]`."""


def to_device(packed: PackedWeight, device: torch.device) -> QuantizedWeight:
    """Copies a packed weight there."""
    return QuantizedWeight(
        bits=packed.bits,
        group=packed.group,
        outputs=packed.outputs,
        inputs=packed.inputs,
        codes=torch.from_numpy(packed.codes).to(device),
        scales=torch.from_numpy(packed.scales).to(device),
        biases=None if packed.biases is None else torch.from_numpy(packed.biases).to(device),
        order=None if packed.order is None else torch.from_numpy(packed.order).to(device),
    )


class QuantizedLinear(Protocol):
    """The launcher."""

    def __call__(
        self,
        x: Tensor,
        weight: QuantizedWeight,
        out: Tensor,
        *,
        workspace: Workspace,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> None:
        """`out = x W^T + bias + residual`, all sums in float32, rounded once.

        x is bfloat16 [rows, inputs] in the weight's order of columns, rows at multiples of 16 bytes; out is bfloat16 or
        float32 [rows, outputs], bias float32 [outputs], residual float32 like out (it may be out). Rows of x and
        outputs may lie apart. The weights are exact, and a row's outputs have the same bits in every batch.
        """


class _Args(ctypes.Structure):
    _fields_ = (
        ("linear", LinearArgs),
        ("codes", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("biases", ctypes.c_void_p),
        ("bits", ctypes.c_int32),
        ("group", ctypes.c_int32),
        ("scale_type", ctypes.c_int32),
    )


def launcher(library: CudaLibrary) -> QuantizedLinear:
    """The compiled kernels."""

    def quantized_linear(
        x: Tensor,
        weight: QuantizedWeight,
        out: Tensor,
        *,
        workspace: Workspace,
        bias: Tensor | None = None,
        residual: Tensor | None = None,
    ) -> None:
        check_arguments(x, weight, out, workspace=workspace, bias=bias, residual=residual)
        arguments = _Args(
            linear=linear_args(x, out, workspace=workspace, bias=bias, residual=residual),
            codes=pointer(weight.codes),
            scales=pointer(weight.scales),
            biases=pointer(weight.biases),
            bits=weight.bits,
            group=weight.group,
            scale_type=TYPES[weight.scales.dtype],
        )
        library.call("quantized_linear", arguments)

    return quantized_linear


def check_weight(weight: QuantizedWeight) -> None:
    """Raises `ValueError` naming what of the weight no kernel could take."""
    if weight.bits not in (4, 8):
        raise ValueError(f"weight: codes of {weight.bits} bits")
    if weight.group not in GROUPS or (weight.group and weight.inputs % weight.group != 0) or weight.inputs % 8 != 0:
        raise ValueError(f"weight: groups of {weight.group} in {weight.inputs} inputs")
    if weight.group == 16 and (weight.bits, weight.biases) != (8, None):
        raise ValueError("weight: groups of 16 have codes of 8 bits and no biases")
    strips, tiles = -(-weight.outputs // (STRIP * STRIPS)) * STRIPS, -(-weight.inputs // TILE)
    groups = tiles * TILE // weight.group if weight.group else 1
    check_dense("weight", weight.codes, dtypes=(torch.uint8,), shape=(strips, tiles, weight.bits // 4, 32, 16))
    check_dense("weight", weight.scales, dtypes=(torch.float16, torch.float32), shape=(strips, groups, 8, 2))
    if weight.biases is not None:
        check_dense("weight", weight.biases, dtypes=(weight.scales.dtype,), shape=tuple(weight.scales.shape))
        if weight.bits == 8 and weight.group != 32:
            raise ValueError("weight: codes of 8 bits have biases in groups of 32 only")
    check_device(weight=weight.codes, scales=weight.scales, biases=weight.biases)


def check_arguments(
    x: Tensor,
    weight: QuantizedWeight,
    out: Tensor,
    *,
    workspace: Workspace,
    bias: Tensor | None,
    residual: Tensor | None,
) -> None:
    """Raises `ValueError` naming the argument that the kernels could not take."""
    check_weight(weight)
    shape = weight.outputs, weight.inputs
    check_linear(x, out, dtype=torch.bfloat16, shape=shape, workspace=workspace, bias=bias, residual=residual)
    check_device(x=x, weight=weight.codes)
