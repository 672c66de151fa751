"""Tests of the CUDA executor: in torch and with the kernels on the CPU anywhere, on a GPU where there is one."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from torch import device

    from llmserve.ops.cuda.launchers import Launchers

if importlib.util.find_spec("torch") is not None:
    import torch

    # Triton reads this when it is first imported, which is after this file.
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")

GPU = pytest.param("gpu", marks=pytest.mark.gpu)


@pytest.fixture(params=("torch", "emulator", GPU))
def launchers(request: pytest.FixtureRequest) -> Launchers:
    """Each kind of launchers in turn: torch is the reference, the others run the kernels."""
    return _launchers(request.param)


@pytest.fixture(params=("emulator", GPU))
def kernel_launchers(request: pytest.FixtureRequest) -> Launchers:
    """Those that run the kernels."""
    return _launchers(request.param)


@pytest.fixture(params=("torch", GPU))
def fast_launchers(request: pytest.FixtureRequest) -> Launchers:
    """Those that run a whole model in seconds."""
    return _launchers(request.param)


def _launchers(kind: str) -> Launchers:
    torch = pytest.importorskip("torch", reason="torch is not installed in this environment: make test-cuda")
    from llmserve.ops.cuda.launchers import of_library
    from llmserve.ops.cuda.library import open_library
    from tests.cuda import emulation

    if kind == "gpu" and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU is usable here")
    if kind == "emulator" and not emulation.EMULATOR.exists():
        pytest.skip("the kernels are not built for the CPU: make cuda-emulator, which needs CUDA's headers")
    if kind != "gpu":
        torch.set_num_threads(1)  # threads that wait for each other cost more than small tensors gain
    if kind == "gpu":
        return of_library(open_library())
    return emulation.emulated_launchers() if kind == "emulator" else emulation.torch_launchers()


@pytest.fixture(params=("interpreter", GPU))
def triton_device(request: pytest.FixtureRequest) -> device:
    """Where Triton's kernels run: interpreted on the CPU, or compiled on a GPU. One process does one of the two."""
    torch = pytest.importorskip("torch", reason="torch is not installed in this environment: make test-cuda")
    triton = pytest.importorskip("triton", reason="triton is not installed in this environment: make test-cuda")
    if request.param == "gpu" and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU is usable here")
    if (request.param == "interpreter") != triton.knobs.runtime.interpret:
        pytest.skip("there is a GPU, so Triton compiles in this process; TRITON_INTERPRET=1 makes it interpret")
    return torch.device("cuda" if request.param == "gpu" else "cpu")
