"""An engine in a child process: started, watched and restarted here.

Invariants: at most one child at a time; a child's death ends every open stream with `EngineDied` before the next one
starts; nothing runs while the engine is idle (death is reported by a blocked thread, messages by the event loop's own
poll).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import zmq

from llmserve.client import wire
from llmserve.client.child import EngineChild
from llmserve.client.exchange import Exchange, RequestStream
from llmserve.client.protocol import ClientState
from llmserve.client.runtime_dir import FrontendFolder
from llmserve.config import EngineConfig
from llmserve.errors import EngineDied, LLMServeError, NotReady
from llmserve.types import EngineInfo, EngineStats, Request

_log = logging.getLogger(__name__)
_FIRST_DELAY_S = 0.5
_MAX_DELAY_S = 30.0


class ProcessClient:
    """`EngineClient` over a child process. `on_progress(phase, done, total)` is told how far loading is."""

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_progress: Callable[[str, int, int], None] | None = None,
        stop_timeout_s: float = 5.0,
    ) -> None:
        self._config = config
        self._on_progress = on_progress
        self._stop_timeout_s = stop_timeout_s
        self._exchange = Exchange(self._send, self._abandon)
        self._child: EngineChild | None = None
        self._started: asyncio.Future[EngineInfo] | None = None
        self._restart: asyncio.TimerHandle | None = None
        self._load_error: LLMServeError | None = None
        self._num_children = 0
        self._num_useless = 0
        self.state: ClientState = "stopped"
        self.info: EngineInfo | None = None
        self.num_restarts = 0
        """How often a child died and another was started."""

    @property
    def stats(self) -> EngineStats:
        return self._exchange.stats

    @property
    def is_busy(self) -> bool:
        return self._exchange.is_busy

    @property
    def pid(self) -> int | None:
        """Process id of the child, None while there is none."""
        return self._child.pid if self._child is not None else None

    @property
    def last_progress_s(self) -> float:
        """When the engine last finished a step, moved inside one, or stopped being idle."""
        moved_s = self._child.moved_s() if self._child is not None else 0.0
        return max(moved_s, self._exchange.last_message_s)

    async def start(self) -> EngineInfo:
        """Load the model in a child; raises what loading raised, or `EngineDied`. May be called again after `stop`."""
        if self._started is not None:
            return await asyncio.shield(self._started)
        self.state = "starting"
        self._folder = FrontendFolder()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._started = asyncio.get_running_loop().create_future()
        try:
            self._spawn()
            return await asyncio.shield(self._started)
        except BaseException:
            await self.stop()
            raise

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
        """End the child: gently, then not. Streams still open end with `abort` or raise `EngineDied`."""
        started = self._started
        if started is None:
            return
        was_ready, self.state = self.state == "ready", "stopped"
        if self._restart is not None:
            self._restart.cancel()
            self._restart = None
        if self._child is not None:
            if not was_ready:  # it reads no messages while it loads
                self._child.kill()
            self._exchange.abandon_all()
            await self._child.stop(self._stop_timeout_s)
        if self._started is not started:
            return  # another call of stop got here first
        self._started = None
        if not started.done():
            started.set_exception(EngineDied("the engine was stopped while it loaded"))
            started.exception()  # whoever waits in `start` still gets it; nobody need
        self._context.destroy(linger=0)
        self._folder.close()

    def _spawn(self) -> None:
        self._restart = None
        self._load_error = None
        self._num_children += 1
        self._child = EngineChild(
            self._config,
            self._folder.path / str(self._num_children),
            context=self._context,
            on_message=self._receive,
            on_exit=self._on_exit,
        )

    def _send(self, message: wire.ToEngine) -> None:
        if self._child is not None:
            self._child.send(message)

    def _abandon(self, num_requests: int) -> None:
        if self._child is not None:
            self._child.abandon(num_requests)

    def _receive(self, message: wire.FromEngine) -> None:
        if isinstance(message, (wire.StepMessage, wire.ControlReply)):
            self._num_useless = 0
            self._exchange.receive(message)
        elif isinstance(message, wire.Progress):
            if self._on_progress is not None:
                self._on_progress(message.phase, message.done, message.total)
        elif isinstance(message, wire.Ready):
            self._on_ready(message.info)
        else:
            self._load_error = wire.restore_error(message.error, message.error_kind)
            self._send(wire.Shutdown())

    def _on_ready(self, info: EngineInfo) -> None:
        self.info = info
        if self.state == "stopped":
            return
        self.state = "ready"
        if self._started is not None and not self._started.done():
            self._started.set_result(info)

    def _on_exit(self, exit_code: int) -> None:
        was_starting = self.state == "starting"
        self._child = None
        error = self._load_error or EngineDied(f"the engine process {_describe(exit_code)}")
        self._exchange.fail_all(EngineDied(f"the engine process {_describe(exit_code)}"))
        if self.state == "stopped":
            return
        if was_starting:
            if self._started is not None and not self._started.done():
                self._started.set_exception(error)
            return
        self.state = "restarting"
        self.num_restarts += 1
        self._respawn_later(str(error))

    def _respawn_later(self, reason: str) -> None:
        delay_s = restart_delay_s(self._num_useless)
        self._num_useless += 1
        _log.error("engine process ended reason=%r restart_in_s=%.1f", reason, delay_s)
        self._restart = asyncio.get_running_loop().call_later(delay_s, self._respawn)

    def _respawn(self) -> None:
        try:
            self._spawn()
        except (OSError, zmq.ZMQError) as error:  # out of processes or descriptors: that may pass
            self._respawn_later(str(error))


def restart_delay_s(num_useless: int) -> float:
    """Wait before the next start after so many children in a row that finished no step: 0, 0.5, 1, 2, … seconds."""
    return 0.0 if num_useless == 0 else min(_MAX_DELAY_S, _FIRST_DELAY_S * 2.0 ** (num_useless - 1))


def _describe(exit_code: int) -> str:
    return f"was killed by signal {-exit_code}" if exit_code < 0 else f"ended with exit code {exit_code}"
