"""The load generator's client against raw bytes: what it takes for an event, an end, a failure."""

from __future__ import annotations

import asyncio
import contextlib

import pytest

from llmserve.errors import InvalidRequest
from llmserve.tools.bench_http import Endpoint, Reply, exchange
from llmserve.tools.bench_trace import Trace, read_trace

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
FIRST = b'data: {"choices":[{"text":"a","finish_reason":null}]}\n\n'
LAST = b'data: {"choices":[{"text":"b","finish_reason":"length"}]}\n\n'
USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":5,"completion_tokens":2}}\n\n'
DONE = b"data: [DONE]\n\n"
END = b"0\r\n\r\n"


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def answer_with(*pieces: bytes, timeout_s: float = 5.0, stay: bool = False) -> tuple[Reply, bytes]:
    """The reply to a server that sends these pieces, one by one, and the request it got."""

    async def run() -> tuple[Reply, bytes]:
        received: list[bytes] = []
        release, ended = asyncio.Event(), asyncio.Event()

        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            received.append(await reader.readuntil(b"\r\n\r\n"))
            with contextlib.suppress(OSError):  # the client has seen enough and left
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0.001)  # so that each piece is a read of its own
                if stay:
                    await release.wait()
                writer.close()
                await writer.wait_closed()
            ended.set()

        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        async with server:
            endpoint = Endpoint("127.0.0.1", server.sockets[0].getsockname()[1], api_key="secret")
            reply = await exchange(endpoint, endpoint.request("POST", "/v1/completions", b"{}"), timeout_s=timeout_s)
            release.set()
            await ended.wait()
        return reply, received[0] if received else b""

    return asyncio.run(run())


def trace_of(*pieces: bytes, expected_tokens: int | None = None) -> Trace:
    return read_trace(answer_with(*pieces)[0], expected_tokens=expected_tokens)


def test_a_whole_answer() -> None:
    trace = trace_of(HEAD, chunk(FIRST), chunk(LAST), chunk(USAGE), chunk(DONE), END, expected_tokens=2)
    assert trace.failure is None
    assert (trace.num_prompt_tokens, trace.num_output_tokens) == (5, 2)
    assert 0 < trace.ttft_s < trace.e2e_s
    assert len(trace.gaps_s) == 1
    assert trace.tpot_s == pytest.approx(trace.e2e_s - trace.ttft_s)


def test_events_cut_anywhere_are_the_same_events() -> None:
    stream = HEAD + chunk(FIRST) + chunk(b": keep-alive\n\n") + chunk(LAST[:20]) + chunk(LAST[20:] + USAGE + DONE) + END
    whole = b"".join(piece for _, piece in answer_with(stream)[0].events)
    for size in (1, 7, 50):
        reply, _ = answer_with(*(stream[at : at + size] for at in range(0, len(stream), size)))
        assert b"".join(piece for _, piece in reply.events) == whole
        assert read_trace(reply, expected_tokens=2).failure is None
        assert all(piece.endswith(b"\n\n") for _, piece in reply.events)


def test_the_request_says_who_asks() -> None:
    _, request = answer_with(HEAD, chunk(FIRST), END)
    assert request.startswith(b"POST /v1/completions HTTP/1.1\r\n")
    assert b"Authorization: Bearer secret\r\n" in request


@pytest.mark.parametrize(
    ("pieces", "failure"),
    [
        ((HEAD, chunk(FIRST), chunk(LAST), END), "finish reason and"),
        ((HEAD, chunk(FIRST), chunk(DONE), END), "finish reason and"),
        ((HEAD, chunk(FIRST)), "closed within the answer"),
        (
            (HEAD, chunk(FIRST), chunk(LAST), chunk(USAGE.replace(b'ns":2', b'ns":1')), chunk(DONE), END),
            "1 tokens instead",
        ),
        ((HEAD, chunk(b'data: {"error":{"message":"it broke"}}\n\n'), END), "error event: it broke"),
        ((HEAD, chunk(b"data: {{\n\n"), END), "an event that is none"),
        ((b"HTTP/1.1 503 x\r\ncontent-length: 4\r\n\r\nbusy",), "status 503: busy"),
        ((b"nonsense\r\n\r\n",), "not HTTP"),
    ],
)
def test_what_is_a_failure(pieces: tuple[bytes, ...], failure: str) -> None:
    found = trace_of(*pieces, expected_tokens=2).failure
    assert found is not None
    assert failure in found


def test_a_silent_server_is_given_up() -> None:
    reply, _ = answer_with(HEAD, timeout_s=0.05, stay=True)
    assert reply.failure == "no end after 0 s"


def test_nobody_there() -> None:
    endpoint = Endpoint("127.0.0.1", 1)
    reply = asyncio.run(exchange(endpoint, endpoint.request("GET", "/"), timeout_s=5))
    assert (reply.failure or "").startswith("cannot connect")


def test_endpoints() -> None:
    assert Endpoint.parse("http://h:80/v1/") == Endpoint("h", 80)
    assert Endpoint.parse("https://h/base/v1") == Endpoint("h", 443, secure=True, prefix="/base")
    for bad in ("ftp://h", "http://", "http://h:port"):
        with pytest.raises(InvalidRequest):
            Endpoint.parse(bad)
