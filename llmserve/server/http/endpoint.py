"""What chat and completions share: from the body's bytes to the answer's, streamed or whole.

A dialect (`chat.py`, `completions.py`) reads the body into a `Reply`, which knows how its answers look.
Invariant: a request is counted as in flight, and the client watched, from before its prompt is read until its answer
is out.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Generic, Protocol, TypeVar

import msgspec
from starlette.types import Receive, Scope, Send

from llmserve.config import ServerConfig
from llmserve.errors import ClientDisconnected, InvalidRequest
from llmserve.server.http.body import decode_body, read_body
from llmserve.server.http.connection import WRITE_NOW, WriteNow
from llmserve.server.http.context import Exchange, exchange_of
from llmserve.server.http.responses import PromptTokensDetails, UsageBody
from llmserve.server.http.schemas import GenerationBody
from llmserve.server.http.sse import EventStream
from llmserve.server.http.support import check_supported
from llmserve.service.choice import Delta
from llmserve.service.generate import Generation, Usage
from llmserve.service.in_flight import Ticket
from llmserve.service.model import ServedModel
from llmserve.service.options import RequestOptions

BodyT = TypeVar("BodyT", bound=GenerationBody)
_BodyContra = TypeVar("_BodyContra", bound=GenerationBody, contravariant=True)


class Reply(Protocol):
    """One request that was understood, and the shapes of its answer."""

    generation: Generation

    def opening(self) -> bytes:
        """Events before the first delta, possibly none."""

    def event(self, delta: Delta, usage: UsageBody | None) -> bytes:
        """The event of a delta; `usage` where the client wants it in every event."""

    def usage_event(self, usage: UsageBody) -> bytes:
        """The event that carries the usage alone."""

    def answer(self, deltas: list[Delta], usage: UsageBody) -> bytes:
        """The whole answer at once, as JSON."""


class Dialect(Protocol[_BodyContra]):
    """Reads a body of one endpoint. Raises InvalidRequest."""

    async def __call__(self, body: _BodyContra, model: ServedModel, exchange: Exchange) -> Reply: ...


class GenerationEndpoint(Generic[BodyT]):
    """ASGI endpoint of one dialect."""

    def __init__(
        self, model: ServedModel, config: ServerConfig, *, body_type: type[BodyT], dialect: Dialect[BodyT]
    ) -> None:
        self._model = model
        self._config = config
        self._dialect = dialect
        self._decoder = msgspec.json.Decoder(body_type)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request; errors go to the boundary."""
        exchange = exchange_of(scope)
        exchange.generation = True
        raw = await read_body(scope, receive, max_bytes=self._config.max_body_bytes)
        body = self._read(raw, exchange)
        write_now = scope.get("extensions", {}).get(WRITE_NOW)
        with self._model.in_flight.track() as ticket:
            async with _watched(receive, ticket):
                reply = await self._dialect(body, self._model, exchange)
                try:
                    await self._answer(reply, body, exchange, send=send, write_now=write_now, ticket=ticket)
                finally:
                    _note(exchange, reply.generation)

    def _read(self, raw: bytes, exchange: Exchange) -> BodyT:
        body = decode_body(self._decoder, raw)
        if body.request_id is not None:
            exchange.request_id = body.request_id
        exchange.stream = bool(body.stream)
        self._model.check_name(body.model)
        check_supported(body)
        if body.stream_options is not None:
            if not body.stream:
                raise InvalidRequest("stream_options needs stream to be true", param="stream_options")
            check_supported(body.stream_options, "stream_options.")
        self._model.check_accepting()
        return body

    async def _answer(
        self, reply: Reply, body: BodyT, exchange: Exchange, *, send: Send, write_now: WriteNow | None, ticket: Ticket
    ) -> None:
        if body.stream:
            stream = EventStream(
                send,
                keep_alive_s=self._config.keep_alive_comment_s,
                request_id=exchange.request_id,
                write_now=write_now,
            )
            await stream.run(_produce(reply, body, exchange, stream.write), ticket)
            return
        deltas: list[Delta] = []
        await reply.generation.run(deltas.append)
        exchange.finish_reasons = tuple(delta.finish_reason for delta in deltas if delta.finish_reason)
        await send_json(send, reply.answer(deltas, usage_body(reply.generation.usage)))


async def _produce(reply: Reply, body: GenerationBody, exchange: Exchange, write: Callable[[bytes], None]) -> None:
    """Write all events of an answer but its end mark."""
    options = body.stream_options
    continuous = bool(options and options.continuous_usage_stats)
    generation = reply.generation
    opening = reply.opening()

    def emit(delta: Delta) -> None:
        nonlocal opening
        if delta.finish_reason is not None:
            exchange.finish_reasons += (delta.finish_reason,)
        event = reply.event(delta, usage_body(generation.usage) if continuous else None)
        if opening:
            event, opening = opening + event, b""
        write(event)

    await generation.run(emit)
    if options and options.include_usage:
        write(reply.usage_event(usage_body(generation.usage)))


@contextlib.asynccontextmanager
async def _watched(receive: Receive, ticket: Ticket) -> AsyncIterator[None]:
    """End the request when its client goes away."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        ticket.cancel(ClientDisconnected("the client left"))

    task = asyncio.create_task(watch())
    try:
        yield
    finally:
        task.cancel()


def _note(exchange: Exchange, generation: Generation) -> None:
    usage = generation.usage
    exchange.prompt_tokens = usage.prompt_tokens
    exchange.completion_tokens = usage.completion_tokens
    exchange.ttft_s = generation.ttft_s


async def send_json(send: Send, body: bytes) -> None:
    """A whole JSON answer with status 200."""
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def usage_body(usage: Usage) -> UsageBody:
    """The usage as OpenAI shows it."""
    return UsageBody(
        usage.prompt_tokens,
        usage.completion_tokens,
        usage.prompt_tokens + usage.completion_tokens,
        PromptTokensDetails(usage.cached_tokens),
    )


def common_options(
    body: GenerationBody, *, max_tokens: int | None, num_logprobs: int | None, num_prompt_logprobs: int | None
) -> RequestOptions:
    """The options that both dialects read alike."""
    stop = body.stop
    return RequestOptions(
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        min_p=body.min_p,
        n=body.n or 1,
        seed=body.seed,
        stop=(stop,) if isinstance(stop, str) else tuple(stop or ()),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        repetition_penalty=body.repetition_penalty,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
        typical_p=body.typical_p,
        logit_bias=body.logit_bias or {},
        min_tokens=body.min_tokens or 0,
        bad_words=tuple(body.bad_words or ()),
        allowed_token_ids=None if body.allowed_token_ids is None else tuple(body.allowed_token_ids),
        num_logprobs=num_logprobs,
        num_prompt_logprobs=num_prompt_logprobs,
        include_stop=bool(body.include_stop_str_in_output),
        skip_special=body.skip_special_tokens is not False,
        priority=body.priority or 0,
        cache_salt=body.cache_salt or "",
        deadline_ms=body.deadline_ms,
    )
