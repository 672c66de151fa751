"""One engine process, from its start to its end: a plain subprocess and two ZMQ sockets in a private folder.

Invariants: never forked, always executed afresh; it dies with this process (the child asks the kernel for that); its
messages come in order, and its exit is reported exactly once, after the last of them. A child is never restarted: a
new one is made.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from llmserve.client import wire
from llmserve.config import EngineConfig

if TYPE_CHECKING:
    from llmserve._C import ProgressCell

_LAST_WORDS_MS = 20
"""How long a dead child's last messages may take through the I/O thread."""


class EngineChild:
    """Spawns the process when made; call from the event loop's thread, which must outlive the child.

    (The kernel's parent-death signal is tied to the thread that spawned the process.)
    """

    def __init__(
        self,
        config: EngineConfig,
        endpoint: Path,
        *,
        context: zmq.Context[zmq.Socket[bytes]],
        on_message: Callable[[wire.FromEngine], None],
        on_exit: Callable[[int], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_message = on_message
        self._on_exit = on_exit
        self._paths = [endpoint.with_suffix(suffix) for suffix in (".in", ".out", ".progress")]
        self._progress_path = self._paths[-1]
        self._progress_cell: ProgressCell | None = None
        self._outbox = _bind(context, zmq.PUSH, endpoint.with_suffix(".in"))
        self._inbox = _bind(context, zmq.PULL, endpoint.with_suffix(".out"))
        self._inbox_fd = self._inbox.fileno()
        self._loop.add_reader(self._inbox_fd, self._drain)
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "llmserve.cli.engine_main",
                str(endpoint),
                str(os.getpid()),
                wire.encode_config(config),
            ],
            stdin=subprocess.DEVNULL,
            process_group=0,  # Ctrl-C at a terminal is for the frontend, which then decides
        )
        self._exited = asyncio.Event()
        threading.Thread(target=self._wait, name="engine-watch", daemon=True).start()

    @property
    def pid(self) -> int:
        return self._process.pid

    def send(self, message: wire.ToEngine) -> None:
        """Queue a message. One that no peer can take any more is dropped: the child's exit is about to be reported."""
        with contextlib.suppress(zmq.Again):
            self._outbox.send(wire.encode(message), zmq.NOBLOCK)

    def moved_s(self) -> float:
        """When the engine last moved inside a step, by its own account: monotonic seconds, 0 before it did."""
        cell = self._cell()
        return cell.moved_s if cell is not None else 0.0

    def abandon(self, num_requests: int) -> None:
        """Nobody waits for the first requests sent to this child: it may leave a step that computes no other."""
        cell = self._cell()
        if cell is not None:
            cell.abandon(num_requests)

    def _cell(self) -> ProgressCell | None:
        if self._progress_cell is None and self._progress_path.exists():
            from llmserve._C import ProgressCell

            self._progress_cell = ProgressCell(str(self._progress_path), False)
        return self._progress_cell

    def kill(self) -> None:
        """End the process now."""
        self._process.kill()

    async def stop(self, timeout_s: float) -> None:
        """Ask the process to end, insist after timeout_s; returns when its exit has been reported."""
        self.send(wire.Shutdown())
        try:
            await asyncio.wait_for(self._exited.wait(), timeout_s)
        except TimeoutError:
            self.kill()
            await self._exited.wait()

    def _wait(self) -> None:
        exit_code = self._process.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(self._finish, exit_code)

    def _finish(self, exit_code: int) -> None:
        self._drain()
        while self._inbox.poll(_LAST_WORDS_MS):
            self._drain()
        self._loop.remove_reader(self._inbox_fd)
        self._inbox.close(linger=0)
        self._outbox.close(linger=0)
        for path in self._paths:  # the one that bound a socket leaves its file when the other end was killed
            path.unlink(missing_ok=True)
        self._exited.set()
        self._on_exit(exit_code)

    def _drain(self) -> None:
        """Read all that has arrived: the socket's descriptor reports changes, not what is left unread."""
        while wire.has_message(self._inbox):
            self._on_message(wire.decode_from_engine(self._inbox.recv()))


def _bind(context: zmq.Context[zmq.Socket[bytes]], kind: int, path: Path) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.set_hwm(0)
    socket.bind(f"ipc://{path}")
    return socket
