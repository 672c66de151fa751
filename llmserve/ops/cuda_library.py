"""The launchers of `libllmserve_cuda.so`: torch tensors in, one kernel on the current stream.

Owns the C ABI of `csrc/cuda`. Invariants: the library is of the version this file speaks; tensors are checked before
their pointers are handed over; nothing here synchronizes.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Final, Protocol

import torch
from torch import Tensor

from llmserve.errors import EngineFault, ExtensionNotBuilt, InvalidRequest

ABI_VERSION: Final = 1
LIBRARY: Final = Path(__file__).resolve().parents[1] / "libllmserve_cuda.so"
_TYPES: Final = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


class Launchers(Protocol):
    """The kernels that the CUDA executor calls."""

    device: torch.device

    def rms_norm(self, x: Tensor, weight: Tensor, out: Tensor, *, eps: float, residual: Tensor | None = None) -> None:
        """`out = x / rms(x) * weight` by rows.

        x and out are [rows, columns] with dense rows, in one of bfloat16, float16 and float32; weight is float32. With
        `residual` (dense, like x) it becomes `residual + x` first, and that is what is normalized.
        """


class _RmsNormArgs(ctypes.Structure):
    _fields_ = (
        ("x", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("weight", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("rows", ctypes.c_int64),
        ("columns", ctypes.c_int64),
        ("x_stride", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("eps", ctypes.c_float),
        ("type", ctypes.c_int32),
    )


class CudaLibrary:
    """The compiled kernels on one GPU."""

    def __init__(self, path: Path = LIBRARY, device: int = 0) -> None:
        if not path.exists():
            raise ExtensionNotBuilt(f"{path.name} is missing; build it where nvcc is with: make cuda")
        if not torch.cuda.is_available():
            raise InvalidRequest("no NVIDIA GPU is usable here (see nvidia-smi)", param="device")
        self.device = torch.device("cuda", device)
        self._library = ctypes.CDLL(str(path))
        self._library.llmserve_cuda_error.restype = ctypes.c_char_p
        version = self._library.llmserve_cuda_abi_version()
        if version != ABI_VERSION:
            raise ExtensionNotBuilt(f"{path} is of another version ({version}, not {ABI_VERSION}); make cuda builds it")

    def rms_norm(self, x: Tensor, weight: Tensor, out: Tensor, *, eps: float, residual: Tensor | None = None) -> None:
        check_rms_norm(x, weight, out, residual)
        arguments = _RmsNormArgs(
            x=x.data_ptr(),
            residual=None if residual is None else residual.data_ptr(),
            weight=weight.data_ptr(),
            out=out.data_ptr(),
            rows=x.shape[0],
            columns=x.shape[1],
            x_stride=x.stride(0),
            out_stride=out.stride(0),
            eps=eps,
            type=_TYPES[x.dtype],
        )
        self._call("llmserve_cuda_rms_norm", arguments)

    def _call(self, name: str, arguments: ctypes.Structure) -> None:
        stream = ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)
        with torch.cuda.device(self.device):
            status = getattr(self._library, name)(ctypes.byref(arguments), stream)
        if status != 0:
            raise EngineFault(f"{name}: {self._library.llmserve_cuda_error(status).decode()}")


def check_rms_norm(x: Tensor, weight: Tensor, out: Tensor, residual: Tensor | None) -> None:
    """Raises `ValueError` naming the argument that a kernel could not take."""
    check("x", x, dtypes=tuple(_TYPES), shape=x.shape[:1] + weight.shape)
    check("weight", weight, dtypes=(torch.float32,), shape=weight.shape[:1])
    check("out", out, dtypes=(x.dtype,), shape=tuple(x.shape))
    if residual is not None:
        check("residual", residual, dtypes=(x.dtype,), shape=tuple(x.shape))
        if not residual.is_contiguous():
            raise ValueError("residual: must be dense")
    if len({tensor.device for tensor in (x, weight, out, residual) if tensor is not None}) != 1:
        raise ValueError("x: all tensors must be on one device")


def check(name: str, tensor: Tensor, *, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    """One of `dtypes`, exactly of `shape`, with dense rows. Raises `ValueError` naming the tensor."""
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: {tensor.dtype} is not one of {', '.join(map(str, dtypes))}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    if tensor.ndim > 0 and tensor.numel() > 0 and tensor.stride(-1) != 1:
        raise ValueError(f"{name}: its rows are not dense")
