"""`libllmserve_cuda.so`: opening it, and calling a launcher on the current stream.

Owns the C ABI of `csrc/cuda`. Invariants: the library is of the version this file speaks; nothing here synchronizes.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from llmserve.errors import EngineFault, ExtensionNotBuilt, InvalidRequest

ABI_VERSION: Final = 4
LIBRARY: Final = Path(__file__).resolve().parents[2] / "libllmserve_cuda.so"
TYPES: Final = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2, torch.float8_e4m3fn: 3, torch.int8: 4}
"""`Type` of csrc/cuda/abi.h."""


class CudaLibrary:
    """The compiled kernels, and the device they run on."""

    def __init__(self, path: Path, device: torch.device) -> None:
        if not path.exists():
            raise ExtensionNotBuilt(f"{path.name} is missing; build it where nvcc is with: make cuda")
        self.device = device
        self._library = ctypes.CDLL(str(path))
        self._library.llmserve_cuda_error.restype = ctypes.c_char_p
        version = self._library.llmserve_cuda_abi_version()
        if version != ABI_VERSION:
            raise ExtensionNotBuilt(f"{path} is of another version ({version}, not {ABI_VERSION}); make cuda builds it")

    def call(self, name: str, arguments: ctypes.Structure) -> None:
        """Launch `llmserve_cuda_<name>` on the current stream. Raises `EngineFault` when the launch is refused."""
        status = getattr(self._library, f"llmserve_cuda_{name}")(ctypes.byref(arguments), self.stream())
        if status != 0:
            raise EngineFault(f"{name}: {self._library.llmserve_cuda_error(status).decode()}")

    def stream(self) -> ctypes.c_void_p:
        """The current one of torch."""
        return ctypes.c_void_p(torch.cuda.current_stream(self.device).cuda_stream)


def open_library(device: int = 0) -> CudaLibrary:
    """The library on a GPU, which becomes the current one. Raises `ExtensionNotBuilt`, `InvalidRequest`."""
    if not LIBRARY.exists():
        raise ExtensionNotBuilt(f"{LIBRARY.name} is missing; build it where nvcc is with: make cuda")
    if not torch.cuda.is_available():
        raise InvalidRequest("no NVIDIA GPU is usable here (see nvidia-smi)", param="device")
    torch.cuda.set_device(device)
    return CudaLibrary(LIBRARY, torch.device("cuda", device))


def pointer(tensor: Tensor | None) -> int | None:
    """For a `c_void_p` field."""
    return None if tensor is None else tensor.data_ptr()


def check(name: str, tensor: Tensor, *, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    """One of `dtypes`, exactly of `shape`, with dense rows. Raises `ValueError` naming the tensor."""
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name}: {tensor.dtype} is not one of {', '.join(map(str, dtypes))}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: shape {tuple(tensor.shape)}, expected {tuple(shape)}")
    if tensor.ndim > 0 and tensor.numel() > 0 and tensor.stride(-1) != 1:
        raise ValueError(f"{name}: its rows are not dense")


def check_dense(name: str, tensor: Tensor, *, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> None:
    """As `check`, and without gaps."""
    check(name, tensor, dtypes=dtypes, shape=shape)
    if not tensor.is_contiguous():
        raise ValueError(f"{name}: must be dense")


def check_device(**tensors: Tensor | None) -> None:
    """All on one device. Raises `ValueError` naming the first that is not where the first is."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    home = next(iter(devices.values()))
    for name, device in devices.items():
        if device != home:
            raise ValueError(f"{name}: is on {device}, not on {home}")


def check_quantized(out: Tensor, scales: Tensor | None, *, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """Rows that a kernel writes: of `dtype`, or int8 with one float32 scale each. Raises `ValueError`."""
    check("out", out, dtypes=(dtype,) if scales is None else (torch.int8,), shape=shape)
    if scales is not None:
        check_dense("scales", scales, dtypes=(torch.float32,), shape=shape[:1])
