"""Processor time that the load generator takes for each server-sent event, beside httpx reading the same stream.

    python -m benchmarks.serving.client_cost

A server in a process of its own writes an event every half millisecond, so that each one wakes the reader.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import sys
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from typing import Final

import httpx
import uvloop

from llmserve.tools.bench_http import Endpoint, exchange

NUM_EVENTS: Final = 5_000
_PAUSE_S: Final = 0.0005
_EVENT: Final = (
    b'data: {"id":"cmpl-0123456789abcdef","object":"text_completion","created":1700000000,"model":"model",'
    b'"choices":[{"index":0,"text":" word","finish_reason":null}],"usage":null}\n\n'
)
_HEAD: Final = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


async def _answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(_HEAD)
    chunk = b"%x\r\n%s\r\n" % (len(_EVENT), _EVENT)
    for _ in range(NUM_EVENTS):
        writer.write(chunk)
        await writer.drain()
        await asyncio.sleep(_PAUSE_S)  # so that each event is a read of its own
    writer.write(b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n")
    await writer.drain()
    writer.close()


async def _serve(told: Connection) -> None:
    server = await asyncio.start_server(_answer, "127.0.0.1", 0)
    told.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


def _run_server(told: Connection) -> None:
    uvloop.run(_serve(told))


async def _ours(port: int) -> int:
    endpoint = Endpoint("127.0.0.1", port)
    reply = await exchange(endpoint, endpoint.request("GET", "/"), timeout_s=60)
    assert reply.failure is None, reply.failure
    return sum(piece.count(b"data:") for _, piece in reply.events) - 1


async def _httpx(port: int) -> int:
    async with httpx.AsyncClient() as client, client.stream("GET", f"http://127.0.0.1:{port}/") as response:
        return sum([line.startswith("data: {") async for line in response.aiter_lines()])


def _measure(name: str, read: Callable[[int], Awaitable[int]], port: int) -> None:
    async def run() -> tuple[int, float]:
        started_s = time.process_time()
        count = await read(port)
        return count, time.process_time() - started_s

    count, took_s = uvloop.run(run())
    assert count == NUM_EVENTS, count
    print(f"{name:16} {took_s / count * 1e6:6.1f} µs of processor time for each event")


def main() -> int:
    """Measure both."""
    ours, theirs = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=_run_server, args=(theirs,), daemon=True)
    server.start()
    port = ours.recv()
    _measure("load generator", _ours, port)
    _measure("httpx", _httpx, port)
    server.terminate()
    server.join()
    return 0


if __name__ == "__main__":
    sys.exit(main())
