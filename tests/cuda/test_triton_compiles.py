"""The Triton kernels compile for the GPUs we support, without one: no spills, and shared memory that all have."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

pytest.importorskip("torch", reason="torch is not installed in this environment: make test-cuda")
pytest.importorskip("triton", reason="triton is not installed in this environment: make test-cuda")

ROOT: Final = Path(__file__).resolve().parents[2]
MAX_SHARED: Final = 99 * 1024
"""Bytes that a program may have on GPUs of sm_86 and sm_89, the fewest."""
SPILLS: Final = {("moe 4 bits 4096", "gate_up_kernel", 80): 128}
"""Bytes of stack that are known: codes of 4 bits with biases in long prompts, tiled for sm_90."""


@pytest.mark.slow
def test_kernels_compile_without_spills(tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-W", "error", "-m", "tests.cuda.triton_compile", "80", "90"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert {kernel["kernel"] for kernel in kernels} == {
        "route_kernel",
        "count_kernel",
        "place_kernel",
        "gate_up_kernel",
        "down_kernel",
        "combine_kernel",
        "paged_attention_kernel",
    }
    for kernel in kernels:
        allowed = SPILLS.get((kernel["case"], kernel["kernel"], kernel["sm"]), 0)
        assert kernel["stack"] + kernel["local"] <= allowed, kernel
        assert kernel["shared"] <= MAX_SHARED, kernel
