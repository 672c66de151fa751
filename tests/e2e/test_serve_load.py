"""Many streams at once, and clients that leave: nothing fails, nothing leaks."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import httpx
import pytest

from tests.e2e.real_server import RealServer, events

pytestmark = [pytest.mark.model, pytest.mark.slow]
NUM_STREAMS = 32
_A_STEP_S = 2.0
"""Far more than a step takes; what has not happened by then never will."""


def _body(number: int, **more: Any) -> dict[str, Any]:
    prompt = f"Write one sentence about the number {number}."
    return {"messages": [{"role": "user", "content": prompt}], "temperature": 0, "stream": True} | more


async def _text(client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[str, str, bool]:
    """Text, finish reason and whether the end was said."""
    pieces, reason, done = [], "", False
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        assert response.status_code == 200
        async for event in events(response):
            done = event is None
            if event is not None:
                choice = event["choices"][0]
                pieces.append(choice["delta"].get("content") or "")
                reason = choice["finish_reason"] or reason
    return "".join(pieces), reason, done


async def _leave_after(client: httpx.AsyncClient, body: dict[str, Any], num_events: int) -> None:
    async with client.stream("POST", "/v1/chat/completions", json=body) as response:
        async for _ in events(response):
            num_events -= 1
            if num_events == 0:
                return


def _client(server: RealServer) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=2 * NUM_STREAMS)
    return httpx.AsyncClient(base_url=server.url, limits=limits, timeout=60)


def _assert_nothing_left(server: RealServer) -> None:
    end = time.monotonic() + _A_STEP_S
    names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
    while any(values := {name: server.metric(name) for name in names}.values()):
        assert time.monotonic() < end, values
        time.sleep(0.01)


def test_streams_together_are_as_alone(served: RealServer) -> None:
    async def run() -> None:
        async with _client(served) as client:
            bodies = [_body(number, max_tokens=24) for number in range(NUM_STREAMS)]
            together = await asyncio.gather(*[_text(client, body) for body in bodies])
            assert all(text and reason in ("stop", "length") and done for text, reason, done in together)
            for number in (0, NUM_STREAMS // 2, NUM_STREAMS - 1):
                assert await _text(client, bodies[number]) == together[number]

    asyncio.run(run())
    _assert_nothing_left(served)


def test_half_of_the_streams_leave(served: RealServer) -> None:
    async def run() -> None:
        async with _client(served) as client:
            stay = [_text(client, _body(number, max_tokens=32, ignore_eos=True)) for number in range(0, NUM_STREAMS, 2)]
            leave = [
                _leave_after(client, _body(number, max_tokens=2000, ignore_eos=True), num_events=1 + number % 5)
                for number in range(1, NUM_STREAMS, 2)
            ]
            results, _ = await asyncio.gather(asyncio.gather(*stay), asyncio.gather(*leave))
            assert all(reason == "length" and done for _, reason, done in results)

    asyncio.run(run())
    _assert_nothing_left(served)
    assert httpx.get(f"{served.url}/readyz").status_code == 200


def test_all_streams_leave(served: RealServer) -> None:
    async def run() -> None:
        async with _client(served) as client:
            bodies = [_body(number, max_tokens=2000, ignore_eos=True) for number in range(8)]
            await asyncio.gather(*[_leave_after(client, body, 3) for body in bodies])

    asyncio.run(run())
    _assert_nothing_left(served)
