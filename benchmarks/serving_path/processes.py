"""What the two processes of a server use: processor time and sleeps of all their threads, as the kernel counts them."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Final

import msgspec

_SLEEPS: Final = re.compile(rb"^voluntary_ctxt_switches:\s+(\d+)", re.MULTILINE)


class Use(msgspec.Struct, frozen=True, kw_only=True):
    """Totals of one process since it began; threads that have ended are left out."""

    cpu_s: float
    """`schedstat` counts nanoseconds; the ticks of `stat` are too coarse for a few hundred tokens."""
    num_sleeps: int
    """How often its main thread gave up its core by itself: once for each wake-up."""

    def since(self, before: Use) -> Use:
        """What was used after `before`."""
        return Use(cpu_s=self.cpu_s - before.cpu_s, num_sleeps=self.num_sleeps - before.num_sleeps)


def use_of(pid: int) -> Use:
    """Read now. Raises OSError for a process that has ended."""
    cpu_ns = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # a thread that has just ended
            cpu_ns += int((task / "schedstat").read_bytes().split()[0])
    found = _SLEEPS.search(Path(f"/proc/{pid}/status").read_bytes())
    return Use(cpu_s=cpu_ns * 1e-9, num_sleeps=int(found[1]) if found else 0)


def engine_pid(frontend_pid: int) -> int:
    """The engine child of a frontend. Raises LookupError when there is none."""
    children = Path(f"/proc/{frontend_pid}/task/{frontend_pid}/children").read_text().split()
    for child in map(int, children):
        if b"llmserve.cli.engine_main" in Path(f"/proc/{child}/cmdline").read_bytes():
            return child
    raise LookupError(f"process {frontend_pid} has no engine child")
