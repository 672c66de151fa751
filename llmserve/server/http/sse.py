"""Server-sent events over ASGI.

Invariants: nothing is sent before the first event or the first keep-alive comment, so an error until then is a plain
HTTP error; a stream ends with `[DONE]` or with one error event, never with both, and with neither only when the
client left; events leave in the order they were written.

An event goes straight to the connection where that is possible: the turn of the loop that brought a step's tokens
writes all its events, and no task runs for them. What cannot (the first one, with which the headers are sent; a client
that reads slowly) is gathered, and one task sends it on.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from starlette.types import Send

from llmserve.errors import ClientDisconnected
from llmserve.server.http.connection import WriteNow
from llmserve.server.http.errors import error_body
from llmserve.service.in_flight import Ticket

_DONE = b"data: [DONE]\n\n"
_COMMENT = b": keep-alive\n\n"
_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class EventStream:
    """Writes the events of one answer."""

    def __init__(self, send: Send, *, keep_alive_s: float, request_id: str, write_now: WriteNow | None = None) -> None:
        """After `keep_alive_s` without an event a comment is sent, so that no proxy or client gives up."""
        self._send = send
        self._write_now = write_now
        self._keep_alive_s = keep_alive_s
        self._request_id = request_id
        self._pending: list[bytes] = []
        self._sender: asyncio.Task[None] | None = None  # exists while something is pending
        self._started = False
        self._ended = False
        self._loop = asyncio.get_running_loop()
        self._time = self._loop.time
        self._last_write_s = self._time()
        self._timer = self._loop.call_later(keep_alive_s, self._on_timer)

    def write(self, event: bytes) -> None:
        """Send an event, now or as soon as the client takes it. Only while `run` runs."""
        self._last_write_s = self._time()
        if self._sender is None:
            if self._started and self._write_now is not None and self._write_now(event):
                return
            self._sender = self._loop.create_task(self._send_pending())
        self._pending.append(event)

    async def run(self, events: Coroutine[Any, Any, None], ticket: Ticket) -> None:
        """Await `events`, which writes them all, and write the end.

        Raises what `events` raised, after the error event if the stream had begun.
        """
        try:
            await events
            await self._end(_DONE)
        except asyncio.CancelledError:
            if ticket.reason is not None:
                await self._fail(ticket.reason)
            raise
        except Exception as error:
            await self._fail(error)
            raise
        finally:
            self._timer.cancel()
            if self._sender is not None:
                self._sender.cancel()

    async def _fail(self, error: Exception) -> None:
        if (self._started or self._pending) and not isinstance(error, ClientDisconnected):
            await self._end(b"data: " + error_body(error, request_id=self._request_id) + b"\n\n")

    async def _end(self, event: bytes) -> None:
        if self._ended:
            return
        self._ended = True
        if self._sender is not None:
            await self._sender
        await self._start()
        await self._send({"type": "http.response.body", "body": event, "more_body": False})

    async def _start(self) -> None:
        if not self._started:
            self._started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})

    async def _send_pending(self) -> None:
        try:
            await self._start()
            while self._pending:
                events = b"".join(self._pending)
                self._pending.clear()
                await self._send({"type": "http.response.body", "body": events, "more_body": True})
        finally:
            self._sender = None

    def _on_timer(self) -> None:
        quiet_s = self._time() - self._last_write_s
        if quiet_s >= self._keep_alive_s and not self._ended:
            self.write(_COMMENT)
            quiet_s = 0.0
        self._timer = self._loop.call_later(self._keep_alive_s - quiet_s, self._on_timer)
