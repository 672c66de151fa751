"""How much memory the KV cache may take, and how long a sequence may therefore be.

KV memory is reserved lazily: what no sequence touches costs no RAM. So the cache is sized generously but never past
what is free, and control-group limits count as much as the machine's own memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from llmserve.config import EngineConfig
from llmserve.errors import InvalidRequest, OutOfMemory
from llmserve.types import KVCacheLimit

KEPT_FRACTION = 0.6
"""Share of the free memory that is left alone when the cache is sized automatically."""
DEVICE_KEPT_FRACTION = 0.02
"""The same of a GPU's memory that weights and steps leave: nothing else is there to need it."""
DEFAULT_CAP_BYTES = 4 * 1024**3
_MIB = 1024**2
_NO_LIMIT = 1 << 60  # cgroup v1 says "no limit" with a huge number


@dataclass(frozen=True, slots=True, kw_only=True)
class KVCachePlan:
    """The outcome of the fit."""

    num_blocks: int
    max_model_len: int
    num_bytes: int
    limit: KVCacheLimit
    """What the size was limited by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRoom:
    """What one limit still leaves."""

    num_bytes: int
    group: Path | None
    """The control group that sets the limit; None: the machine's own memory."""


def available_bytes(root: Path = Path("/")) -> int:
    """Memory this process can still take: the least of the machine's and of every control group it lives in."""
    return min(room.num_bytes for room in memory_rooms(root))


def memory_rooms(root: Path = Path("/")) -> list[MemoryRoom]:
    """The machine's free memory, then what is left in every limited control group of this process."""
    rooms = [MemoryRoom(num_bytes=_machine_available(root), group=None), *_cgroup_available(root)]
    return [replace(room, num_bytes=max(0, room.num_bytes)) for room in rooms]


def kv_cache_limits(
    config: EngineConfig, *, max_position: int, bytes_per_block: int, available: int
) -> dict[KVCacheLimit, int]:
    """Bytes that each limit allows the KV cache; the least one holds."""
    if config.kv_cache_bytes:
        return {"kv_cache_bytes": config.kv_cache_bytes}
    blocks_per_seq = -(-(config.max_model_len or max_position) // config.block_size)
    bytes_per_seq = blocks_per_seq * bytes_per_block
    if config.device == "cuda":
        return {
            "available": int(available * (1 - DEVICE_KEPT_FRACTION)),
            "max_num_seqs": config.max_num_seqs * bytes_per_seq,
        }
    return {
        "available": int(available * (1 - KEPT_FRACTION)),
        "max_num_seqs": config.max_num_seqs * bytes_per_seq,
        "cap": max(DEFAULT_CAP_BYTES, bytes_per_seq if config.max_model_len else 0),
    }


def fit_kv_cache(config: EngineConfig, *, max_position: int, bytes_per_block: int, available: int) -> KVCachePlan:
    """Choose the number of blocks and max_model_len.

    Raises `InvalidRequest` for a max_model_len past `max_position`, `OutOfMemory` for what can never fit.
    """
    if config.max_model_len > max_position:
        raise InvalidRequest(
            f"max_model_len {config.max_model_len} exceeds the {max_position} positions of the checkpoint",
            param="max_model_len",
        )
    wanted_len = config.max_model_len or max_position
    blocks_per_seq = -(-wanted_len // config.block_size)
    limits = kv_cache_limits(config, max_position=max_position, bytes_per_block=bytes_per_block, available=available)
    num_bytes, limit = min((allowed, name) for name, allowed in limits.items())
    if num_bytes > available:
        raise OutOfMemory(f"a KV cache of {_mib(num_bytes)} does not fit: {_mib(available)} of memory is available")
    num_blocks = num_bytes // bytes_per_block
    if num_blocks < (blocks_per_seq if config.max_model_len else 1):
        needed = blocks_per_seq if config.max_model_len else 1
        raise OutOfMemory(
            f"one sequence of {wanted_len if config.max_model_len else config.block_size} tokens needs a KV cache of "
            f"{_mib(needed * bytes_per_block)}; it may take {_mib(num_bytes)}. "
            "Lower max_model_len, raise kv_cache_bytes, or free memory"
        )
    return KVCachePlan(
        num_blocks=num_blocks,
        max_model_len=min(wanted_len, num_blocks * config.block_size),
        num_bytes=num_blocks * bytes_per_block,
        limit=limit,
    )


def _mib(num_bytes: int) -> str:
    return f"{-(-num_bytes // _MIB)} MiB"


def _machine_available(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    raise OutOfMemory("/proc/meminfo has no MemAvailable; set kv_cache_bytes")


def _cgroup_available(root: Path) -> Iterator[MemoryRoom]:
    """Room left in each limited control group, from the process's own up to the root, cgroup v2 and v1."""
    membership = root / "proc/self/cgroup"
    for line in membership.read_text().splitlines() if membership.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount, files = root / "sys/fs/cgroup", ("memory.max", "memory.current")
        elif "memory" in controllers.split(","):
            mount = root / "sys/fs/cgroup/memory"
            files = ("memory.limit_in_bytes", "memory.usage_in_bytes")
        else:
            continue
        group = mount / path.lstrip("/")
        # Inside a container the path may name a folder of the host; then only the mount's root is visible.
        for folder in (group, *group.parents):
            room = _room(folder, *files)
            if room is not None:
                yield MemoryRoom(num_bytes=room, group=folder)
            if folder == mount:
                break


def _room(folder: Path, limit_file: str, usage_file: str) -> int | None:
    """Limit minus usage of one group, its reclaimable page cache counted as free; None without a limit."""
    limit, usage = _read(folder / limit_file), _read(folder / usage_file)
    if limit in ("", "max") or not usage or int(limit) >= _NO_LIMIT:
        return None
    statistics = dict(line.split() for line in _read(folder / "memory.stat").splitlines())
    reclaimable = int(statistics.get("total_inactive_file", statistics.get("inactive_file", "0")))
    return int(limit) - int(usage) + reclaimable


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
