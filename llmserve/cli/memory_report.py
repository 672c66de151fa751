"""Why the KV cache is as large as it is, in words: what every limit allows, which of them holds, how to move it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from llmserve.cli.byte_size import format_bytes

if TYPE_CHECKING:
    from llmserve.config import EngineConfig
    from llmserve.engine.memory import MemoryRoom
    from llmserve.types import KVCacheLimit


def describe_available(rooms: list[MemoryRoom], total: int) -> str:
    """What each limit of the memory leaves; the least comes first. `total` is the machine's memory in bytes."""
    least, *others = sorted(rooms, key=lambda room: room.num_bytes)
    text = f"{format_bytes(least.num_bytes)} available: {_whose(least, total)}"
    return "; ".join([text, *(f"{_whose(room, total)} would leave {format_bytes(room.num_bytes)}" for room in others)])


def describe_limits(config: EngineConfig, limits: dict[KVCacheLimit, int], *, available: int, max_position: int) -> str:
    """What each limit allows the KV cache; the least, which holds, comes first."""
    from llmserve.engine.memory import DEVICE_KEPT_FRACTION, KEPT_FRACTION

    kept = DEVICE_KEPT_FRACTION if config.device == "cuda" else KEPT_FRACTION
    names: dict[KVCacheLimit, str] = {
        "available": f"{1 - kept:.0%} of the {format_bytes(available)} available",
        "cap": "the default limit",
        "kv_cache_bytes": "--kv-cache-memory",
        "max_num_seqs": f"{config.max_num_seqs} sequences of {config.max_model_len or max_position} tokens",
    }
    least, *others = sorted(limits, key=lambda name: (limits[name], name))
    text = f"{names[least]} ({format_bytes(limits[least])})"
    if not others:
        return text
    return f"{text}; not reached: " + ", ".join(f"{names[name]} ({format_bytes(limits[name])})" for name in others)


def describe_change(limit: KVCacheLimit, *, available: int, group: Path | None) -> str:
    """How to get a larger cache where `limit` holds. `group`: the control group that limits the memory, if one does."""
    largest = format_bytes(available)
    if limit == "max_num_seqs":
        return "more would lie idle: raise --max-num-seqs or --max-model-len, and the cache grows with them"
    if limit == "kv_cache_bytes":
        return f"--kv-cache-memory takes up to {largest} now; without it the size follows the free memory"
    if limit == "cap":
        return f"--kv-cache-memory SIZE, up to {largest} now"
    more = "free memory" if group is None else f"raise the limit of the control group {group}"
    return f"{more}, or take a larger share with --kv-cache-memory SIZE, up to {largest} now"


def _whose(room: MemoryRoom, total: int) -> str:
    if room.group is None:
        return f"what is free of the machine's {format_bytes(total)}"
    return f"the control group {room.group}"
