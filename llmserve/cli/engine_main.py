"""The engine child's composition root: `python -m llmserve.cli.engine_main ENDPOINT PARENT_PID CONFIG_JSON`.

Started by `client.process` alone. It loads the model, says how far it is, then runs the engine loop until it is told
to shut down, gets SIGTERM, or its parent ends. Exit codes: 0 shut down, 2 the model could not be loaded or the usage
is wrong.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import zmq

from llmserve.client import wire
from llmserve.client.loop import drive
from llmserve.client.runtime_dir import runtime_dir
from llmserve.config import EngineConfig
from llmserve.engine.engine import Engine
from llmserve.errors import LLMServeError

if TYPE_CHECKING:
    from llmserve._C import ProgressCell

_PR_SET_PDEATHSIG = 1
_FAREWELL_MS = 5000
_GC_THRESHOLD = 100_000
_log = logging.getLogger("llmserve.engine")


class Link:
    """The child's ends of the two sockets. SIGTERM arrives here as a `Shutdown` message."""

    def __init__(self, endpoint: Path) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._inbox = self._connect(zmq.PULL, endpoint.with_suffix(".in"))
        self._outbox = self._connect(zmq.PUSH, endpoint.with_suffix(".out"))
        self._poller = zmq.Poller()
        self._poller.register(self._inbox, zmq.POLLIN)
        self._terminated = False

    def watch_sigterm(self) -> None:
        """From now on SIGTERM ends the loop instead of the process, also while it sleeps in `receive`."""
        self._wakeup, sender = socket.socketpair()
        sender.setblocking(False)
        self._wakeup_sender = sender
        self._poller.register(self._wakeup.fileno(), zmq.POLLIN)
        signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGTERM, lambda number, frame: setattr(self, "_terminated", True))

    def send(self, message: wire.FromEngine) -> None:
        """Queue a message for the frontend; never blocks."""
        self._outbox.send(wire.encode(message))

    def receive(self, *, wait: bool) -> list[wire.ToEngine]:
        """All messages that have arrived; with `wait`, sleeps until there is one."""
        if wait and not self._terminated:
            self._poller.poll()
        messages: list[wire.ToEngine] = []
        while wire.has_message(self._inbox):
            messages.append(wire.decode_to_engine(self._inbox.recv()))
        if self._terminated:
            messages.append(wire.Shutdown())
        return messages

    def wait_for_farewell(self) -> None:
        """Give the frontend time to read the last message: it answers with a `Shutdown`."""
        self._inbox.poll(_FAREWELL_MS)

    def close(self) -> None:
        """Send what is queued, then close."""
        self._inbox.close(linger=0)
        self._outbox.close(linger=_FAREWELL_MS)
        self._context.term()

    def _connect(self, kind: int, path: Path) -> zmq.Socket[bytes]:
        connected = self._context.socket(kind)
        connected.set_hwm(0)
        connected.connect(f"ipc://{path}")
        return connected


def main() -> int:
    """Run the child; returns its exit code."""
    if len(sys.argv) != 4:
        print("started by the llmserve frontend: engine_main ENDPOINT PARENT_PID CONFIG_JSON", file=sys.stderr)
        return 2
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _die_with(int(sys.argv[2]))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s engine %(message)s", stream=sys.stderr)
    link = Link(Path(sys.argv[1]))
    loaded = _load(link)
    if loaded is not None:
        _serve(*loaded, link)
    link.close()
    return 0 if loaded is not None else 2


def _die_with(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends; end at once if that has already happened."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent_pid:
        sys.exit(0)


def _load(link: Link) -> tuple[Engine, ProgressCell] | None:
    """The engine and what it shows its progress in, or None after telling the frontend why not."""
    try:
        from llmserve.engine.loader import load_engine

        config = wire.decode_config(sys.argv[3])
        engine = load_engine(config, progress=lambda phase, done, total: link.send(wire.Progress(phase, done, total)))
        cell = _attach(engine, config, Path(sys.argv[1]))
    except Exception as error:  # noqa: BLE001  # whatever it is, the frontend must learn of it
        if not isinstance(error, LLMServeError):
            _log.exception("loading failed")
        reason = str(error) if isinstance(error, LLMServeError) else f"{type(error).__name__}: {error}"
        link.send(wire.Failed(" ".join(reason.split()), wire.error_kind(error)))
        link.wait_for_farewell()
        return None
    return engine, cell


def _attach(engine: Engine, config: EngineConfig, endpoint: Path) -> ProgressCell:
    """Give the engine what it shares with other processes: its progress with the frontend, the cores with engines."""
    from llmserve._C import ProgressCell, StepLease

    cell = ProgressCell(str(endpoint.with_suffix(".progress")), True)
    engine.attach_progress(cell)
    if config.step_lease:
        try:
            engine.attach_lease(StepLease(str(runtime_dir() / "step-lease"), watched=cell))
        except (OSError, RuntimeError) as error:
            _log.warning("engines on these cores do not take turns: %s", error)
    return cell


def _serve(engine: Engine, cell: ProgressCell, link: Link) -> None:
    """The loop. Garbage is collected while it sleeps; steps make no cycles, so none piles up between."""
    link.watch_sigterm()
    gc.collect()
    gc.freeze()
    gc.set_threshold(_GC_THRESHOLD)
    link.send(wire.Ready(engine.info))
    drive(engine, link.receive, link.send, on_idle=_collect_garbage, on_taken=cell.take)
    engine.close()


def _collect_garbage() -> None:
    gc.collect()


if __name__ == "__main__":
    sys.exit(main())
