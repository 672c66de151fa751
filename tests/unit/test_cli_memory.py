"""What `llmserve doctor` says of memory: each limit that can hold, its amount and its remedy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from llmserve.cli.memory_report import describe_available, describe_change, describe_limits
from llmserve.config import EngineConfig
from llmserve.engine.memory import fit_kv_cache, kv_cache_limits, memory_rooms
from llmserve.types import KVCacheLimit
from tests.engine.test_memory import machine

GIB = 1024**3
BLOCK_BYTES = 16 * 23040
CONFIG = EngineConfig(model_path=Path("model"))
FEW = replace(CONFIG, max_num_seqs=2, max_model_len=1024)


@pytest.mark.parametrize(
    ("config", "available", "limit", "text"),
    [
        (
            CONFIG,
            5 * GIB,
            "available",
            "40% of the 5.0 GiB available (2.0 GiB); not reached: the default limit (4.0 GiB)",
        ),
        (CONFIG, 64 * GIB, "cap", "the default limit (4.0 GiB); not reached: 128 sequences of 8192 tokens (22 GiB)"),
        (FEW, 64 * GIB, "max_num_seqs", "2 sequences of 1024 tokens (45 MiB); not reached: the default limit"),
        (replace(CONFIG, kv_cache_bytes=GIB), 2 * GIB, "kv_cache_bytes", "--kv-cache-memory (1.0 GiB)"),
    ],
    ids=["memory", "cap", "sequences", "as told"],
)
def test_the_limit_that_holds_comes_first(config: EngineConfig, available: int, limit: KVCacheLimit, text: str) -> None:
    plan = fit_kv_cache(config, max_position=8192, bytes_per_block=BLOCK_BYTES, available=available)
    assert plan.limit == limit
    limits = kv_cache_limits(config, max_position=8192, bytes_per_block=BLOCK_BYTES, available=available)
    assert describe_limits(config, limits, available=available, max_position=8192).startswith(text)


def test_memory_of_machine_and_group(tmp_path: Path) -> None:
    files = {"a/memory.max": f"{4 * GIB}", "a/memory.current": f"{1 * GIB}"}
    root = machine(tmp_path, cgroup="0::/a\n", files=files)
    text = describe_available(memory_rooms(root), 16 * GIB)
    group = root / "sys/fs/cgroup/a"
    assert text == (
        f"3.0 GiB available: the control group {group}; what is free of the machine's 16 GiB would leave 8.0 GiB"
    )


def test_memory_of_the_machine_alone(tmp_path: Path) -> None:
    root = machine(tmp_path, cgroup="0::/\n", files={})
    assert describe_available(memory_rooms(root), 16 * GIB) == (
        "8.0 GiB available: what is free of the machine's 16 GiB"
    )


@pytest.mark.parametrize(
    ("limit", "group", "text"),
    [
        ("available", None, "free memory, or"),
        ("available", Path("/sys/fs/cgroup/a"), "raise the limit of the control group /sys/fs/cgroup/a, or"),
        ("cap", None, "--kv-cache-memory SIZE, up to 3.0 GiB"),
        ("kv_cache_bytes", None, "--kv-cache-memory takes up to 3.0 GiB"),
        ("max_num_seqs", None, "raise --max-num-seqs or --max-model-len"),
    ],
)
def test_what_to_change(limit: KVCacheLimit, group: Path | None, text: str) -> None:
    assert text in describe_change(limit, available=3 * GIB, group=group)
