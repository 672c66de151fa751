"""A model behind somebody's OpenAI-compatible HTTP, as a partner to chat with."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncGenerator, AsyncIterator
from dataclasses import asdict
from typing import Any, Final

import httpx

from llmserve.cli.partner import ChatMessage, ChatOptions
from llmserve.errors import EngineFault, InvalidRequest, LLMServeError, ModelNotFound, NotReady

_CONNECT_S: Final = 5.0
_ANSWER_S: Final = 300.0
API_KEY_VARIABLE: Final = "LLMSERVE_API_KEY"


class RemoteModel:
    """Made by `open_remote_model`."""

    def __init__(self, http: httpx.AsyncClient, name: str) -> None:
        self.name = name
        self.num_tokens: int | None = None
        self._http = http

    async def answer(self, messages: list[ChatMessage], options: ChatOptions) -> AsyncGenerator[str, None]:
        """Pieces of text as they come. Raises what the server's error means, `NotReady` when it cannot be reached."""
        self.num_tokens = None
        given = {name: value for name, value in asdict(options).items() if value is not None}
        body = {"model": self.name, "messages": messages, "stream": True, "stream_options": {"include_usage": True}}
        try:
            async with self._http.stream("POST", "chat/completions", json={**body, **given}) as response:
                if response.status_code != 200:
                    raise _error_of(response.status_code, await response.aread())
                async for event in _events(response):
                    usage = event.get("usage")
                    if usage:
                        self.num_tokens = usage.get("completion_tokens")
                    for choice in event.get("choices") or ():
                        yield choice.get("delta", {}).get("content") or ""
        except httpx.HTTPError as error:
            raise _unreachable(self._http, error) from error

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()


async def open_remote_model(url: str) -> RemoteModel:
    """Ask the server at `url` (with or without `/v1`) which model it has. Raises `NotReady`, `ModelNotFound`."""
    base = url.rstrip("/")
    key = os.environ.get(API_KEY_VARIABLE)
    http = httpx.AsyncClient(
        base_url=base if base.endswith("/v1") else f"{base}/v1",
        headers={"authorization": f"Bearer {key}"} if key else {},
        timeout=httpx.Timeout(_ANSWER_S, connect=_CONNECT_S),
    )
    try:
        return RemoteModel(http, await _first_model(http))
    except BaseException:
        await http.aclose()
        raise


async def _first_model(http: httpx.AsyncClient) -> str:
    try:
        response = await http.get("models")
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise _unreachable(http, error) from error
    if response.status_code != 200:
        raise _error_of(response.status_code, response.content)
    try:
        return str(response.json()["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as error:
        raise ModelNotFound(f"{http.base_url}models lists no model; is this an OpenAI-compatible server?") from error


async def _events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """The JSON events of a stream. Raises `EngineFault` for an error event and for a stream that just ends."""
    async for line in response.aiter_lines():
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        try:
            event = json.loads(data)
        except ValueError as error:
            raise EngineFault(f"the server sent what is no JSON: {data[:80]!r}") from error
        if "error" in event:
            raise EngineFault(f"the server ended the answer: {_message(event)}")
        yield event
    raise EngineFault("the server ended the answer without saying so")


def _error_of(status: int, body: bytes) -> LLMServeError:
    try:
        message = _message(json.loads(body))
    except ValueError:
        message = body[:200].decode(errors="replace").strip() or "no explanation"
    kind = InvalidRequest if status in (400, 413) else NotReady if status == 503 else EngineFault
    return kind(f"the server answered {status}: {message}")


def _message(body: Any) -> str:
    error = body.get("error") if isinstance(body, dict) else None
    return str(error.get("message") if isinstance(error, dict) else error or body)


def _unreachable(http: httpx.AsyncClient, error: Exception) -> NotReady:
    return NotReady(f"{http.base_url} cannot be reached: {str(error) or type(error).__name__}")
