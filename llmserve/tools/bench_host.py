"""Where and on what a benchmark ran: the facts that a figure is worth nothing without."""

from __future__ import annotations

import os
import platform
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec

from llmserve import __version__

_RESULTS: Final = "benchmarks/results"
_FEATURES: Final = ("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8")


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """The machine, the moment and the code."""

    date: str
    """UTC."""
    cpu: str
    cpu_family_model: str
    """Numbers that tell generations apart where the name is a cloud's own."""
    num_cores: int
    """Available to this process."""
    features: list[str]
    memory_gib: float
    kernel: str
    python: str
    llmserve: str
    commit: str
    """Of the working tree, `-dirty` if it differs; empty outside one."""
    load_before: float
    """Load average of the last minute: what else the machine did."""


def describe_host() -> Host:
    """Read now."""
    cpuinfo = _first_processor()
    flags = set(cpuinfo.get("flags", "").split())
    return Host(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        cpu=cpuinfo.get("model name", platform.processor()),
        cpu_family_model=f"{cpuinfo.get('cpu family', '?')}/{cpuinfo.get('model', '?')}",
        num_cores=len(os.sched_getaffinity(0)),
        features=[name for name in _FEATURES if name in flags],
        memory_gib=round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        kernel=platform.release(),
        python=platform.python_version(),
        llmserve=__version__,
        commit=_commit(),
        load_before=round(os.getloadavg()[0], 2),
    )


def _first_processor() -> dict[str, str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


def _commit() -> str:
    """With `-dirty` where the tree differs from it in more than results that were written meanwhile."""
    commit = _git("rev-parse", "--short=10", "HEAD")
    changed = commit and _git("status", "--porcelain", "--untracked-files=no", "--", ":/", f":(top,exclude){_RESULTS}")
    return f"{commit}-dirty" if changed else commit


def _git(*arguments: str) -> str:
    try:
        found = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()
