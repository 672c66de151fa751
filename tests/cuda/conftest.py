"""Tests of the CUDA executor: with the launchers in torch anywhere, with the kernels where there is a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from llmserve.ops.cuda_library import Launchers


@pytest.fixture(params=["emulation", pytest.param("gpu", marks=pytest.mark.gpu)])
def launchers(request: pytest.FixtureRequest) -> Launchers:
    """Each kind of launchers in turn."""
    torch = pytest.importorskip("torch", reason="torch is not installed in this environment: make test-cuda")
    if request.param == "gpu" and not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU is usable here")
    from llmserve.ops.cuda_library import CudaLibrary
    from tests.cuda.emulation import TorchLaunchers

    return CudaLibrary() if request.param == "gpu" else TorchLaunchers()
