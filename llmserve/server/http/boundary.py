"""The outermost layer of the application: request ids, errors, one log line per request.

Invariant: whatever happens inside, a client gets an answer in OpenAI's shape or the end of the stream it was reading;
no traceback leaves the process, and every one is logged with the request's id.
"""

from __future__ import annotations

import logging
import time
from collections import Counter

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from llmserve.errors import ClientDisconnected, LLMServeError
from llmserve.server.http.context import Exchange, new_exchange
from llmserve.server.http.errors import (
    error_body,
    error_headers,
    error_kind,
)

logger = logging.getLogger("llmserve.http")


class Boundary:
    """ASGI middleware; `responses` counts answers by (route, status)."""

    def __init__(self, app: ASGIApp, *, responses: Counter[tuple[str, str]]) -> None:
        self._app = app
        self._responses = responses

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one exchange; other ASGI events pass through."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        exchange = scope["llmserve.exchange"] = new_exchange(scope)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", exchange.request_id.encode())]
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except Exception as error:  # noqa: BLE001 - the one place where every error ends
            await _answer_error(error, exchange, send_with_id)
        finally:
            self._note(exchange, scope)

    def _note(self, exchange: Exchange, scope: Scope) -> None:
        route = scope.get("route")
        exchange.route = getattr(route, "path", "") or "unknown"
        self._responses[exchange.route, str(exchange.status)] += 1
        level = logging.INFO if exchange.generation else logging.DEBUG
        if logger.isEnabledFor(level):
            logger.log(level, "%s", _log_line(exchange, scope["method"]))


async def _answer_error(error: Exception, exchange: Exchange, send: Send) -> None:
    kind = error_kind(error)
    exchange.error = kind.code or kind.type
    if not isinstance(error, LLMServeError):
        logger.error("event=internal_error request_id=%s", exchange.request_id, exc_info=error)
    if isinstance(error, ClientDisconnected):
        exchange.status = exchange.status or kind.status
        return
    if exchange.status:
        return  # the answer had begun: whoever wrote it has said what there was to say
    body = error_body(error, request_id=exchange.request_id)
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *error_headers(error),
    ]
    await send({"type": "http.response.start", "status": kind.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _log_line(exchange: Exchange, method: str) -> str:
    fields: dict[str, object] = {
        "event": "request",
        "request_id": exchange.request_id,
        "method": method,
        "route": exchange.route,
        "status": exchange.status,
        "duration_ms": round((time.monotonic() - exchange.start_s) * 1e3, 1),
    }
    if exchange.generation:
        fields["stream"] = str(exchange.stream).lower()
        fields["prompt_tokens"] = exchange.prompt_tokens
        fields["completion_tokens"] = exchange.completion_tokens
        if exchange.ttft_s is not None:
            fields["ttft_ms"] = round(exchange.ttft_s * 1e3, 1)
        if exchange.finish_reasons:
            fields["finish_reason"] = ",".join(sorted(set(exchange.finish_reasons)))
    if exchange.error:
        fields["error"] = exchange.error
    return " ".join(f"{name}={value}" for name, value in fields.items())
