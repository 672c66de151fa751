"""`serve` and `run_server`: uvicorn on uvloop and httptools, with our own way of stopping.

On the first SIGTERM or SIGINT the server turns not-ready and refuses new requests, but goes on listening so that
probes see it; when the running requests are done, or at the drain timeout with an error to each, it ends. A second
signal ends it now. Invariant: nothing ticks while idle.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
import uvloop
from starlette.applications import Starlette

from llmserve.config import ServerConfig
from llmserve.errors import NotReady
from llmserve.server.http.connection import Connection
from llmserve.service.model import ServedModel

logger = logging.getLogger("llmserve.http")

_BACKLOG = 1024
_LAST_WORDS_S = 2
"""Time that connections get to take their last bytes after everything has ended."""
_KEEP_ALIVE_S = 75


def run_server(
    app: Starlette,
    config: ServerConfig,
    *,
    on_listening: Callable[[str], None] | None = None,
    on_ready: Callable[[], None] | None = None,
) -> None:
    """`serve` on a loop of its own."""
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(app, config, on_listening=on_listening, on_ready=on_ready))


async def serve(
    app: Starlette,
    config: ServerConfig,
    *,
    on_listening: Callable[[str], None] | None = None,
    on_ready: Callable[[], None] | None = None,
) -> None:
    """Serve until a signal ends it, then return. Raises what loading the model raised, and OSError for the address.

    `on_listening` gets the URL as soon as it answers, `on_ready` is called when the model can be used. Port 0 picks a
    free one. Runs in the main thread, whose signals it takes.
    """
    sock = _bind(config)
    host, port = sock.getsockname()[:2]
    server = _Server(_uvicorn_config(app), app, config)
    server.on_ready = on_ready
    if on_listening is not None:
        server.on_started = lambda: on_listening(f"http://{f'[{host}]' if ':' in host else host}:{port}")
    with contextlib.closing(sock):
        await server.serve(sockets=[sock])
    if server.load_error is not None:
        raise server.load_error


def _bind(config: ServerConfig) -> socket.socket:
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((config.host, config.port))
    except OSError:
        sock.close()
        raise
    sock.set_inheritable(False)
    return sock


def _uvicorn_config(app: Starlette) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        loop="uvloop",
        http=Connection,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=_KEEP_ALIVE_S,
        timeout_graceful_shutdown=_LAST_WORDS_S,
    )


class _Server(uvicorn.Server):
    """uvicorn's server with an event instead of a ticking loop, and with draining."""

    def __init__(self, uvicorn_config: uvicorn.Config, app: Starlette, config: ServerConfig) -> None:
        super().__init__(uvicorn_config)
        self.on_started: Callable[[], None] | None = None
        self.on_ready: Callable[[], None] | None = None
        self.load_error: BaseException | None = None
        self._app = app
        self._model: ServedModel = app.state.model
        self._drain_timeout_s = config.drain_timeout_s
        self._exit = asyncio.Event()
        self._draining: asyncio.Task[None] | None = None

    async def main_loop(self) -> None:
        """Wait for the end; replaces a loop that would wake up ten times a second."""
        self.server_state.default_headers = list(self.config.encoded_headers)
        if self.on_started is not None:
            self.on_started()
        loading: asyncio.Task[None] = self._app.state.loading
        loading.add_done_callback(self._on_loaded)
        await self._exit.wait()
        self.should_exit = True

    def _on_loaded(self, loading: asyncio.Task[None]) -> None:
        if loading.cancelled():
            return
        self.load_error = loading.exception()
        if self.load_error is not None:
            self._exit.set()
        elif self.on_ready is not None:
            self.on_ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Take SIGTERM and SIGINT through the loop, which also wakes it."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGTERM, signal.SIGINT)
        for number in signals:
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    def _on_signal(self) -> None:
        if self._draining is None:
            self._model.in_flight.draining = True
            logger.info("event=draining in_flight=%d timeout_s=%g", len(self._model.in_flight), self._drain_timeout_s)
            self._draining = asyncio.get_running_loop().create_task(self._drain())
            return
        logger.info("event=stopping_now in_flight=%d", len(self._model.in_flight))
        self._model.in_flight.end_all(NotReady("the server was stopped"))
        self._exit.set()

    async def _drain(self) -> None:
        await self._model.in_flight.drain(self._drain_timeout_s)
        self._exit.set()
