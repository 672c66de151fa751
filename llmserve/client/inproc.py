"""An engine on a thread of this process: for offline use, tests and benchmarks.

The thread runs the same loop over the same messages as the engine child; only the way of the messages differs.
Invariant: the engine is touched by its thread alone, streams by the event loop alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from llmserve.client import wire
from llmserve.client.exchange import Exchange, RequestStream
from llmserve.client.loop import drive
from llmserve.client.protocol import ClientState
from llmserve.config import EngineConfig
from llmserve.engine.engine import Engine
from llmserve.engine.loader import load_engine
from llmserve.errors import EngineDied, LLMServeError, NotReady
from llmserve.types import EngineInfo, EngineStats, Request

if TYPE_CHECKING:
    from llmserve._C import ProgressCell

_log = logging.getLogger(__name__)


class InprocClient:
    """`EngineClient` over a thread. `on_progress` is called from that thread while the model loads."""

    def __init__(
        self, config: EngineConfig, *, on_progress: Callable[[str, int, int], None] = lambda phase, done, total: None
    ) -> None:
        self._load: Callable[[], Engine] = lambda: load_engine(config, progress=on_progress)
        self._inbox: queue.SimpleQueue[wire.ToEngine] = queue.SimpleQueue()
        self._cell: ProgressCell | None = None
        self._exchange = Exchange(self._inbox.put, self._abandon)
        self._thread: threading.Thread | None = None
        self._loop: asyncio.AbstractEventLoop
        self._started: asyncio.Future[EngineInfo]
        self._ended: asyncio.Event
        self.state: ClientState = "stopped"
        self.info: EngineInfo | None = None

    @property
    def stats(self) -> EngineStats:
        return self._exchange.stats

    @property
    def is_busy(self) -> bool:
        return self._exchange.is_busy

    @property
    def last_progress_s(self) -> float:
        moved_s = self._cell.moved_s if self._cell is not None else 0.0
        return max(moved_s, self._exchange.last_message_s)

    async def start(self) -> EngineInfo:
        """Load the model; raises what loading raised."""
        if self._thread is None:
            self.state = "starting"
            self._loop = asyncio.get_running_loop()
            self._started = self._loop.create_future()
            self._ended = asyncio.Event()
            self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
            self._thread.start()
        return await asyncio.shield(self._started)

    def watch_steps(self, on_step: Callable[[EngineStats], None]) -> None:
        """Have `on_step` called with the statistics after each step that computed something."""
        self._exchange.on_step = on_step

    def check_capacity(self) -> None:
        """Raise `Overloaded` when `submit` would."""
        self._exchange.check_capacity(self.info)

    def submit(self, request: Request) -> RequestStream:
        """Send a request. Raises `NotReady`, `Overloaded`, and `InvalidRequest` for an id in use."""
        if self.state != "ready":
            raise NotReady(f"the engine is {self.state}")
        self.check_capacity()
        return self._exchange.submit(request)

    async def abort(self, request_id: str) -> None:
        self._exchange.abort(request_id)

    async def control(self, command: str, **args: Any) -> dict[str, Any]:
        """Run an engine command. Raises `NotReady`, `EngineDied`, or what the engine raised."""
        if self.state != "ready":
            raise NotReady(f"the engine is {self.state}")
        return await self._exchange.control(command, args)

    async def stop(self) -> None:
        """End the loop; streams still open end with `abort`."""
        if self._thread is not None:
            self._inbox.put(wire.Shutdown())
            self._exchange.abandon_all()
            await self._ended.wait()
            self._thread = None

    def _run(self) -> None:
        error: Exception | None = None
        try:
            engine = self._announce(self._load())
            assert self._cell is not None
            drive(engine, self._receive, self._tell, on_idle=lambda: None, on_taken=self._cell.take)
            engine.close()
        except Exception as failure:  # noqa: BLE001  # the thread's last words; the loop's side raises it
            if not isinstance(failure, LLMServeError):
                _log.exception("engine thread ended")
            error = failure
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to tell
            self._loop.call_soon_threadsafe(self._finish, error)

    def _announce(self, engine: Engine) -> Engine:
        from llmserve._C import ProgressCell

        self._cell = ProgressCell("", True)
        engine.attach_progress(self._cell)
        self._tell(wire.Ready(engine.info))
        return engine

    def _abandon(self, num_requests: int) -> None:
        if self._cell is not None:
            self._cell.abandon(num_requests)

    def _tell(self, message: wire.FromEngine) -> None:
        self._loop.call_soon_threadsafe(self._take, message)

    def _receive(self, *, wait: bool) -> list[wire.ToEngine]:
        messages = [self._inbox.get()] if wait else []
        with contextlib.suppress(queue.Empty):
            while True:
                messages.append(self._inbox.get_nowait())
        return messages

    def _take(self, message: wire.FromEngine) -> None:
        if isinstance(message, (wire.StepMessage, wire.ControlReply)):
            self._exchange.receive(message)
        elif isinstance(message, wire.Ready):
            self.info = message.info
            self.state = "ready"
            self._started.set_result(message.info)

    def _finish(self, error: Exception | None) -> None:
        self.state = "stopped"
        if not self._started.done():
            self._started.set_exception(error or EngineDied("the engine was stopped while it loaded"))
        reason = f"the engine failed: {error}" if error is not None else "the engine was stopped"
        self._exchange.fail_all(EngineDied(reason))
        self._ended.set()
