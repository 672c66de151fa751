"""Tests of the CUDA executor: in torch and with the kernels on the CPU anywhere, on a GPU where there is one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from llmserve.ops.cuda.launchers import Launchers

KINDS = ("torch", "emulator", pytest.param("gpu", marks=pytest.mark.gpu))


@pytest.fixture(params=KINDS)
def launchers(request: pytest.FixtureRequest) -> Launchers:
    """Each kind of launchers in turn: torch is the reference, the others run the kernels."""
    torch = pytest.importorskip("torch", reason="torch is not installed in this environment: make test-cuda")
    from llmserve.ops.cuda.launchers import of_library
    from llmserve.ops.cuda.library import open_library
    from tests.cuda import emulation

    if request.param == "gpu" and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU is usable here")
    if request.param == "emulator" and not emulation.EMULATOR.exists():
        pytest.skip("the kernels are not built for the CPU: make cuda-emulator, which needs CUDA's headers")
    if request.param == "gpu":
        return of_library(open_library())
    return emulation.emulated_launchers() if request.param == "emulator" else emulation.torch_launchers()
