"""What tells one content of a checkpoint from another, without reading gigabytes at each start.

A file of the store is its SHA-256. Any other one is inode, size and both times of change, in nanoseconds: whatever
writes to a file changes them, and so does replacing it; a renamed or copied file counts as another one, which costs
a packing and no truth. Paths and device numbers are left out: both change without the content.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Sequence
from typing import Final

from llmserve.checkpoints.mapping import MappedFile
from llmserve.checkpoints.store import Store

_CLOCK_TICK_NS: Final = 50_000_000
"""More than the granularity of a file system's times."""


def checkpoint_id(files: Sequence[MappedFile]) -> str:
    """One name for the content of all files, in hexadecimal."""
    names = sorted(f"{file.path.name} {_content(file)}" for file in files)
    return hashlib.blake2b("\n".join(names).encode(), digest_size=20).hexdigest()


def _content(file: MappedFile) -> str:
    sha256 = Store().sha256_of(file.path, file.stat)
    if sha256 is not None:
        return f"sha256 {sha256}"
    _let_time_pass(file.stat)
    return f"file {file.stat.st_ino} {file.stat.st_size} {file.stat.st_mtime_ns} {file.stat.st_ctime_ns}"


def _let_time_pass(stat: os.stat_result) -> None:
    """A file written within the last tick could change again and keep its times: from now on it cannot."""
    age_ns = time.time_ns() - max(stat.st_mtime_ns, stat.st_ctime_ns)
    if 0 <= age_ns < _CLOCK_TICK_NS:
        time.sleep((_CLOCK_TICK_NS - age_ns) / 1e9)
