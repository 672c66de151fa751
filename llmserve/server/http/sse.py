"""Server-sent events over ASGI.

Invariants: nothing is sent before the first event or the first keep-alive comment, so an error until then is a plain
HTTP error; a stream ends with `[DONE]` or with one error event, never with both, and with neither only when the
client left.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator

from starlette.types import Send

from llmserve.errors import ClientDisconnected, LLMServeError
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

    def __init__(self, send: Send, *, keep_alive_s: float, request_id: str) -> None:
        """After `keep_alive_s` without an event a comment is sent, so that no proxy or client gives up."""
        self._send = send
        self._keep_alive_s = keep_alive_s
        self._request_id = request_id
        self._started = False
        self._ended = False
        self._loop = asyncio.get_running_loop()
        self._last_write_s = self._loop.time()
        self._timer = self._loop.call_later(keep_alive_s, self._on_timer)
        self._comment: asyncio.Task[None] | None = None

    async def run(self, events: AsyncGenerator[bytes, None], ticket: Ticket) -> None:
        """Write all events and the end. Raises what `events` raised, after the error event if the stream had begun."""
        try:
            async with contextlib.aclosing(events):
                async for event in events:
                    await self._write(event)
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

    async def _fail(self, error: Exception) -> None:
        if self._started and not isinstance(error, ClientDisconnected):
            await self._end(b"data: " + error_body(error, request_id=self._request_id) + b"\n\n")

    async def _write(self, event: bytes) -> None:
        if not self._started:
            self._started = True
            await self._send({"type": "http.response.start", "status": 200, "headers": _HEADERS})
        self._last_write_s = self._loop.time()
        await self._send({"type": "http.response.body", "body": event, "more_body": True})

    async def _end(self, event: bytes) -> None:
        if not self._ended:
            self._ended = True
            await self._write(event)
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    def _on_timer(self) -> None:
        quiet_s = self._loop.time() - self._last_write_s
        if quiet_s >= self._keep_alive_s and not self._ended:
            self._comment = self._loop.create_task(self._write_comment())
            quiet_s = 0.0
        self._timer = self._loop.call_later(self._keep_alive_s - quiet_s, self._on_timer)

    async def _write_comment(self) -> None:
        with contextlib.suppress(LLMServeError, OSError):
            if not self._ended:
                await self._write(_COMMENT)
