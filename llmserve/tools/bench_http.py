"""The load generator's HTTP client: one POST on a connection of its own, the events of the answer with their times.

It must not be what is measured: while requests run it only stamps and keeps what arrives (a few µs for each piece);
JSON is read after the level has ended (`bench_trace`). Invariants: `post` never raises for what a server or a network
did, it says it in `Reply.failure`; a reply's events are complete server-sent events, in order.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import dataclass, field
from typing import Final, cast
from urllib.parse import urlsplit

import httptools

from llmserve.errors import InvalidRequest

_END_OF_EVENT: Final = b"\n\n"
_MAX_ERROR_BYTES: Final = 2000


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where an OpenAI-compatible server listens."""

    host: str
    port: int
    secure: bool = False
    prefix: str = ""
    """Path before `/v1`."""
    api_key: str | None = None

    @classmethod
    def parse(cls, url: str, *, api_key: str | None = None) -> Endpoint:
        """From `http://host:port`, with or without `/v1`. Raises `InvalidRequest`."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise InvalidRequest(f"{url} is not a URL: {error}") from error
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidRequest(f"{url} is not an http or https URL")
        secure = parts.scheme == "https"
        prefix = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port or (443 if secure else 80), secure, prefix, api_key)

    def request(self, method: str, path: str, body: bytes = b"") -> bytes:
        """A whole HTTP request."""
        key = f"Authorization: Bearer {self.api_key}\r\n" if self.api_key else ""
        head = (
            f"{method} {self.prefix}{path} HTTP/1.1\r\nHost: {self.host}:{self.port}\r\nConnection: close\r\n{key}"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode("latin-1") + body


@dataclass(slots=True)
class Reply:
    """What came back. Times are `time.perf_counter()`."""

    started_s: float
    """Before the connection was opened."""
    status: int = 0
    retry_after: bytes = b""
    """The header of a refusal."""
    events: list[tuple[float, bytes]] = field(default_factory=list)
    """Arrival time and bytes of one or more whole events."""
    body: bytes = b""
    """Of an answer that is no event stream; of a stream, what came after its last whole event."""
    ended_s: float = 0.0
    failure: str | None = None
    """One line about the transport; what the events say is judged in `bench_trace`."""


class _Receiver(asyncio.Protocol):
    """Takes one answer. `done` ends when the answer does, however it does."""

    def __init__(self, request: bytes, reply: Reply) -> None:
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._request = request
        self._reply = reply
        self._parser = httptools.HttpResponseParser(self)
        self._is_stream = False
        self._tail = b""
        self._now_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast("asyncio.Transport", transport).write(self._request)  # uvloop's is no subclass

    def data_received(self, data: bytes) -> None:
        self._now_s = time.perf_counter()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._finish(f"not HTTP: {error}")

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"content-type":
            self._is_stream = value.startswith(b"text/event-stream")
        elif name.lower() == b"retry-after":
            self._reply.retry_after = value

    def on_headers_complete(self) -> None:
        self._reply.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._tail:
            body = self._tail + body
            self._tail = b""
        if self._is_stream and body.endswith(_END_OF_EVENT):  # nearly always: a write of the server is an event
            self._reply.events.append((self._now_s, body))
            return
        end = body.rfind(_END_OF_EVENT) + len(_END_OF_EVENT) if self._is_stream else 0
        if end >= len(_END_OF_EVENT):
            self._reply.events.append((self._now_s, body[:end]))
            body = body[end:]
        self._tail = body

    def on_message_complete(self) -> None:
        self._finish(None)

    def connection_lost(self, exc: Exception | None) -> None:
        self._finish(f"the connection was lost: {exc}" if exc else "the connection was closed within the answer")

    def _finish(self, failure: str | None) -> None:
        if not self.done.done():
            self._reply.ended_s = time.perf_counter()
            self._reply.failure = failure
            self._reply.body = self._tail
            self.done.set_result(None)


async def exchange(endpoint: Endpoint, request: bytes, *, timeout_s: float) -> Reply:
    """Send one request (`Endpoint.request`) and wait for the whole answer."""
    reply = Reply(time.perf_counter())
    loop = asyncio.get_running_loop()
    transport: asyncio.BaseTransport | None = None
    try:
        async with asyncio.timeout(timeout_s):
            transport, receiver = await loop.create_connection(
                lambda: _Receiver(request, reply), endpoint.host, endpoint.port, ssl=endpoint.secure or None
            )
            await receiver.done
    except TimeoutError:
        reply.failure = f"no end after {timeout_s:.0f} s"
    except OSError as error:
        reply.failure = f"cannot connect: {(error.strerror or str(error)).lower()}"
    finally:
        reply.ended_s = reply.ended_s or time.perf_counter()
        if transport is not None:
            with contextlib.suppress(OSError):
                transport.close()
    if reply.failure is None and reply.status != 200:
        text = " ".join(reply.body[:_MAX_ERROR_BYTES].decode(errors="replace").split())
        reply.failure = f"status {reply.status}: {text}"
    return reply
