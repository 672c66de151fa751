"""The emulator finds what it is there to find: each kernel of `self_test.cpp` has one mistake."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

LIBRARY: Final = Path(__file__).resolve().parents[2] / "build" / "cuda-emulator" / "libllmserve_cuda_emulator.so"
RUN: Final = """
import ctypes, sys
out = (ctypes.c_int32 * 64)()
status = ctypes.CDLL(sys.argv[1]).llmserve_emulator_self_test(int(sys.argv[2]), out)
print(status, *out)
"""

pytestmark = pytest.mark.skipif(
    not LIBRARY.exists(), reason="the kernels are not built for the CPU: make cuda-emulator"
)


def run(which: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, str(LIBRARY), str(which)], capture_output=True, text=True, timeout=60, check=False
    )


def test_a_right_kernel_is_right() -> None:
    assert run(0).stdout.split() == ["0", *map(str, range(63, -1, -1))]


def test_a_missing_barrier_shows() -> None:
    assert run(1).stdout.split() != ["0", *map(str, range(63, -1, -1))]


def test_a_copy_that_was_not_waited_for_has_not_arrived() -> None:
    assert set(run(5).stdout.split()[1:]) == {"-1"}, "the poison of shared memory"


@pytest.mark.parametrize(
    ("which", "message"),
    [
        (2, "all threads wait"),
        (3, "wrote outside its dynamic shared memory"),
        (4, "copies that it did not wait for"),
        (6, "whose mask it is not in"),
    ],
)
def test_a_mistake_ends_the_process_and_is_named(which: int, message: str) -> None:
    ended = run(which)
    assert ended.returncode != 0
    assert "CUDA emulator: " in ended.stderr
    assert message in ended.stderr
