"""How far a download or a load is, shown to a person: a bar on a terminal, lines anywhere else; always on stderr.

Invariant: the bar's library is imported when there is something to show, not before.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Final, Self

from llmserve.cli.byte_size import format_bytes

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_LINE_INTERVAL_S: Final = 5.0


@dataclass(slots=True)
class _Phase:
    """One kind of work, as far as it was shown."""

    shown_s: float
    shown_bytes: int
    ended: bool = False


class ProgressDisplay:
    """Call it with `(phase, done, total)`, in bytes; total 0 means unknown. May be called from any one thread."""

    def __init__(self) -> None:
        self._with_bar = sys.stderr.isatty()
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._phases: dict[str, _Phase] = {}

    def __call__(self, phase: str, done: int, total: int) -> None:
        if self._with_bar:
            self._draw(phase, done, total)
        else:
            self._write(phase, done, total)

    def close(self) -> None:
        """Remove the bar; what is reported later comes as lines."""
        self._with_bar = False
        self._phases.clear()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _draw(self, phase: str, done: int, total: int) -> None:
        if self._bar is None:
            self._bar = _new_bar()
            self._bar.start()
        if phase not in self._tasks:
            self._tasks[phase] = self._bar.add_task(phase, total=None)
        self._bar.update(self._tasks[phase], completed=done, total=total or None)

    def _write(self, phase: str, done: int, total: int) -> None:
        """One line when a phase is complete, and one every few seconds until then."""
        now = time.monotonic()
        state = self._phases.get(phase)
        if state is None or (state.ended and done < total):
            state = self._phases[phase] = _Phase(now, done)
        if state.ended:
            return
        state.ended = 0 < total <= done
        if state.ended:
            print(f"{phase}: {format_bytes(total)}, done", file=sys.stderr, flush=True)
        elif now - state.shown_s >= _LINE_INTERVAL_S:
            of_all = f" of {format_bytes(total)}" if total else ""
            rate = max(0.0, (done - state.shown_bytes) / (now - state.shown_s))
            print(f"{phase}: {format_bytes(done)}{of_all}, {format_bytes(rate)}/s", file=sys.stderr, flush=True)
            state.shown_s, state.shown_bytes = now, done


def _new_bar() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
