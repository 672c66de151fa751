"""Load on an OpenAI-compatible endpoint, in two forms.

A closed loop has N streams, each sends a request when its last has ended. An open loop sends requests at given times,
whether or not the server keeps up.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import msgspec

from llmserve.errors import EngineFault, ModelNotFound, NotReady
from llmserve.tools.bench_http import Endpoint, Reply, exchange
from llmserve.tools.bench_prompts import random_prompts
from llmserve.tools.bench_stats import LevelReport, level_report
from llmserve.tools.bench_trace import Trace, read_trace

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a loop saw."""

    traces: list[Trace]
    """Of each request, in no order."""
    wall_s: float
    """From the first request to the last answer."""
    client_cpu_s: float
    """Processor time of this process meanwhile."""
    late_s: list[float]
    """Of an open loop: how long after its time each request was sent."""


async def run_level(endpoint: Endpoint, load: Load, num_streams: int) -> LevelReport:
    """One level of a closed loop, summed up."""
    seen = await closed_loop(endpoint, load, num_streams)
    return level_report(num_streams, seen.traces, wall_s=seen.wall_s, client_cpu_s=seen.client_cpu_s)


async def closed_loop(endpoint: Endpoint, load: Load, num_streams: int) -> Measured:
    """`num_streams` streams of a load that `prepare` returned."""
    num_requests = load.requests_of(num_streams)
    requests = iter(_requests(endpoint, load, num_requests, seed=load.seed * 1000 + num_streams))

    async def run() -> list[Reply]:
        streams = [_stream(endpoint, requests, timeout_s=load.timeout_s) for _ in range(num_streams)]
        return [reply for stream in await asyncio.gather(*streams) for reply in stream]

    return await _watched(load, run(), late_s=[])


async def open_loop(endpoint: Endpoint, load: Load, arrivals_s: Sequence[float], *, prompt_seed: int) -> Measured:
    """A request of a load that `prepare` returned at each of these times, in seconds from now; ascending.

    Levels with prompts of their own need a `prompt_seed` of their own, else a prefix cache answers for the server.
    """
    requests = _requests(endpoint, load, len(arrivals_s), seed=prompt_seed)
    late_s: list[float] = []
    work = send_at(endpoint, iter(requests), arrivals_s, timeout_s=load.timeout_s, late_s=late_s)
    return await _watched(load, work, late_s=late_s)


async def send_at(
    endpoint: Endpoint,
    requests: Iterator[bytes],
    arrivals_s: Sequence[float],
    *,
    timeout_s: float,
    late_s: list[float] | None = None,
) -> list[Reply]:
    """Send a request at each of these times; returns when all have ended. `late_s` takes each one's lateness."""
    started_s = time.perf_counter()
    sent = []
    for at_s in arrivals_s:
        await asyncio.sleep(max(0.0, started_s + at_s - time.perf_counter()))
        if late_s is not None:
            late_s.append(time.perf_counter() - started_s - at_s)
        sent.append(asyncio.create_task(exchange(endpoint, next(requests), timeout_s=timeout_s)))
    return list(await asyncio.gather(*sent))


async def _watched(load: Load, work: Awaitable[list[Reply]], *, late_s: list[float]) -> Measured:
    """Run a loop; JSON is read after it has ended."""
    started_cpu_s = time.process_time()
    replies = await work
    cpu_s = time.process_time() - started_cpu_s
    wall_s = max(reply.ended_s for reply in replies) - min(reply.started_s for reply in replies)
    expected = load.output_tokens if load.ignore_eos else None
    traces = [read_trace(reply, expected_tokens=expected) for reply in replies]
    return Measured(traces=traces, wall_s=wall_s, client_cpu_s=cpu_s, late_s=late_s)


def _requests(endpoint: Endpoint, load: Load, count: int, *, seed: int) -> list[bytes]:
    """Encoded before the clock runs."""
    prompts = random_prompts(load.prompt_tokens, seed)
    return [endpoint.request("POST", load.path, load.body(next(prompts))) for _ in range(count)]


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
