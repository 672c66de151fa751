"""A closed loop over an OpenAI-compatible endpoint: each of N streams sends a request when its last has ended."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Final

import msgspec

from llmserve.errors import EngineFault, ModelNotFound, NotReady
from llmserve.tools.bench_http import Endpoint, Reply, exchange
from llmserve.tools.bench_prompts import random_prompts
from llmserve.tools.bench_stats import LevelReport, level_report
from llmserve.tools.bench_trace import read_trace

MIN_REQUESTS: Final = 6
REQUESTS_A_STREAM: Final = 2
_WARM_UP_TOKENS: Final = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is sent. The same load gives the same requests to every server."""

    prompt_tokens: int = 128
    output_tokens: int = 64
    num_requests: int = 0
    """For each level; 0: two for each stream, six at least."""
    seed: int = 0
    chat: bool = False
    """The chat endpoint instead of completions."""
    timeout_s: float = 600.0
    model: str = ""
    """Empty: the first that the server lists."""
    ignore_eos: bool = True
    """Left out when the server does not know it; answers may then be shorter."""

    def requests_of(self, num_streams: int) -> int:
        """Requests of one level."""
        return max(num_streams, self.num_requests or max(MIN_REQUESTS, REQUESTS_A_STREAM * num_streams))

    def body(self, prompt: str, *, output_tokens: int | None = None) -> bytes:
        """The JSON of one request: greedy, streamed, with usage."""
        content: dict[str, Any] = (
            {"messages": [{"role": "user", "content": prompt}]} if self.chat else {"prompt": prompt}
        )
        return msgspec.json.encode(
            {
                "model": self.model,
                **content,
                "max_tokens": output_tokens or self.output_tokens,
                "temperature": 0,
                "stream": True,
                "stream_options": {"include_usage": True},
                **({"ignore_eos": True} if self.ignore_eos else {}),
            }
        )

    @property
    def path(self) -> str:
        """Of the endpoint."""
        return "/v1/chat/completions" if self.chat else "/v1/completions"


async def prepare(endpoint: Endpoint, load: Load) -> Load:
    """Fill in the model's name, find out whether the server takes `ignore_eos`, and warm it up by one request.

    Raises `NotReady`, `ModelNotFound`, `EngineFault` for a server that cannot be measured.
    """
    if not load.model:
        load = replace(load, model=await _first_model(endpoint, timeout_s=load.timeout_s))
    prompt = next(random_prompts(load.prompt_tokens, load.seed + 1))
    reply = await _send(endpoint, load, prompt, output_tokens=_WARM_UP_TOKENS)
    if reply.status == 400 and load.ignore_eos and "ignore_eos" in (reply.failure or ""):
        load = replace(load, ignore_eos=False)
        reply = await _send(endpoint, load, prompt, output_tokens=_WARM_UP_TOKENS)
    failure = read_trace(reply, expected_tokens=None).failure
    if failure is not None:
        kind = NotReady if reply.status in (0, 503) else EngineFault
        raise kind(f"the first request failed: {failure}")
    return load


async def run_level(endpoint: Endpoint, load: Load, num_streams: int) -> LevelReport:
    """One level of a load that `prepare` returned."""
    num_requests = load.requests_of(num_streams)
    prompts = random_prompts(load.prompt_tokens, load.seed * 1000 + num_streams)
    requests = iter([endpoint.request("POST", load.path, load.body(next(prompts))) for _ in range(num_requests)])
    started_s, started_cpu_s = time.perf_counter(), time.process_time()
    streams = [_stream(endpoint, requests, timeout_s=load.timeout_s) for _ in range(num_streams)]
    replies = [reply for stream in await asyncio.gather(*streams) for reply in stream]
    wall_s, cpu_s = time.perf_counter() - started_s, time.process_time() - started_cpu_s
    expected = load.output_tokens if load.ignore_eos else None
    traces = [read_trace(reply, expected_tokens=expected) for reply in replies]
    return level_report(num_streams, traces, wall_s=wall_s, client_cpu_s=cpu_s)


async def _stream(endpoint: Endpoint, requests: Iterator[bytes], *, timeout_s: float) -> list[Reply]:
    """One stream of the loop: it takes from the requests that all streams share."""
    return [await exchange(endpoint, request, timeout_s=timeout_s) for request in requests]


async def _send(endpoint: Endpoint, load: Load, prompt: str, *, output_tokens: int) -> Reply:
    request = endpoint.request("POST", load.path, load.body(prompt, output_tokens=output_tokens))
    return await exchange(endpoint, request, timeout_s=load.timeout_s)


async def _first_model(endpoint: Endpoint, *, timeout_s: float) -> str:
    reply = await exchange(endpoint, endpoint.request("GET", "/v1/models"), timeout_s=timeout_s)
    if reply.failure is not None:
        raise NotReady(f"{endpoint.host}:{endpoint.port}: {reply.failure}")
    try:
        return str(msgspec.json.decode(reply.body)["data"][0]["id"])
    except (msgspec.DecodeError, LookupError, TypeError) as error:
        raise ModelNotFound(f"{endpoint.host}:{endpoint.port} lists no model; is it OpenAI-compatible?") from error
