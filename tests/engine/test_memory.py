"""Sizing the KV cache from what is free."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llmserve.config import EngineConfig
from llmserve.engine.memory import DEFAULT_CAP_BYTES, available_bytes, fit_kv_cache
from llmserve.errors import InvalidRequest, OutOfMemory

GIB = 1024**3
BLOCK_BYTES = 16 * 23040
CONFIG = EngineConfig(model_path=Path("model"))


def machine(root: Path, *, cgroup: str, files: dict[str, str]) -> Path:
    """A file system with 8 GiB free and the given control groups."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text("MemTotal: 16777216 kB\nMemAvailable:    8388608 kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_machine_without_limits(tmp_path: Path) -> None:
    root = machine(tmp_path, cgroup="0::/\n", files={"memory.max": "max\n", "memory.current": "5\n"})
    assert available_bytes(root) == 8 * GIB


def test_cgroup_v2_limit_of_a_parent_counts(tmp_path: Path) -> None:
    files = {
        "a/memory.max": f"{4 * GIB}",
        "a/memory.current": f"{3 * GIB}",
        "a/memory.stat": f"anon 5\ninactive_file {GIB}\n",
        "a/b/memory.max": "max",
        "a/b/memory.current": "1",
    }
    assert available_bytes(machine(tmp_path, cgroup="0::/a/b\n", files=files)) == 2 * GIB


def test_cgroup_v1_limit_counts(tmp_path: Path) -> None:
    files = {
        "memory/memory.limit_in_bytes": f"{3 * GIB}",
        "memory/memory.usage_in_bytes": f"{1 * GIB}",
    }
    root = machine(tmp_path, cgroup="5:cpu,memory:/docker/abc\n4:pids:/x\n", files=files)
    assert available_bytes(root) == 2 * GIB


def test_cgroup_v1_without_limit(tmp_path: Path) -> None:
    files = {
        "memory/memory.limit_in_bytes": "9223372036854771712",
        "memory/memory.usage_in_bytes": f"{1 * GIB}",
    }
    assert available_bytes(machine(tmp_path, cgroup="5:memory:/\n", files=files)) == 8 * GIB


def test_this_machine_has_memory() -> None:
    assert available_bytes() > 0


@pytest.mark.parametrize(
    ("config", "available", "num_bytes"),
    [
        (CONFIG, 64 * GIB, DEFAULT_CAP_BYTES),
        (CONFIG, 5 * GIB, 2 * GIB),
        (replace(CONFIG, max_num_seqs=2, max_model_len=1024), 64 * GIB, 128 * BLOCK_BYTES),
        (replace(CONFIG, kv_cache_bytes=GIB), 2 * GIB, GIB),
        (replace(CONFIG, device="cuda"), 100 * BLOCK_BYTES, 98 * BLOCK_BYTES),
        (replace(CONFIG, device="cuda"), 64 * GIB, 128 * 512 * BLOCK_BYTES),
    ],
    ids=["cap", "share of the free memory", "what the limits need", "as told", "a GPU's", "what a GPU's limits need"],
)
def test_size(config: EngineConfig, available: int, num_bytes: int) -> None:
    plan = fit_kv_cache(config, max_position=8192, bytes_per_block=BLOCK_BYTES, available=available)
    assert plan.num_blocks == num_bytes // BLOCK_BYTES
    assert plan.num_bytes == plan.num_blocks * BLOCK_BYTES


def test_sequences_are_shortened_to_what_fits() -> None:
    plan = fit_kv_cache(CONFIG, max_position=8192, bytes_per_block=BLOCK_BYTES, available=50 * BLOCK_BYTES)
    assert (plan.num_blocks, plan.max_model_len) == (20, 320)


@pytest.mark.parametrize(
    ("config", "available", "message"),
    [
        (replace(CONFIG, max_model_len=8192), GIB // 64, "Lower max_model_len"),
        (replace(CONFIG, kv_cache_bytes=2 * GIB), GIB, "1024 MiB of memory is available"),
        (replace(CONFIG, kv_cache_bytes=1), GIB, "one sequence of 16 tokens"),
        (CONFIG, 0, "one sequence of 16 tokens"),
    ],
)
def test_what_never_fits_is_refused(config: EngineConfig, available: int, message: str) -> None:
    with pytest.raises(OutOfMemory, match=message):
        fit_kv_cache(config, max_position=8192, bytes_per_block=BLOCK_BYTES, available=available)


def test_length_past_the_checkpoint_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="8192 positions"):
        fit_kv_cache(replace(CONFIG, max_model_len=9000), max_position=8192, bytes_per_block=BLOCK_BYTES, available=GIB)
