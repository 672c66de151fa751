"""What the frontend does for a step: nothing per token that could be per step.

Real connections (the protocol the server runs, over loopback) and the real demultiplexer; the engine is the test, which
delivers a step's message when it likes. Counts, no times: a task that wakes up per token shows at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest
import uvicorn
from uvicorn.server import ServerState

from llmserve.client.exchange import Exchange, RequestStream
from llmserve.client.wire import StepMessage, Submit, ToEngine
from llmserve.config import ServerConfig
from llmserve.server.http.app import create_app
from llmserve.server.http.connection import Connection
from llmserve.service.model import ServedModel
from llmserve.text import Tokenizer
from llmserve.types import EngineStats, Output, Request
from tests.service.scripted import MODEL, TEXT, ScriptedClient, Server, ids_of, says

NUM_STREAMS = 8
NUM_STEPS = 20
_BODY = {"prompt": "hi", "max_tokens": 500, "stream": True}


class CountingLoop(asyncio.SelectorEventLoop):
    """Counts callbacks put in line: each wake-up of a task is one."""

    num_wakes = 0

    def call_soon(self, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        self.num_wakes += 1
        return super().call_soon(*args, **kwargs)


class DrivenClient(ScriptedClient):
    """An engine client whose engine is the test: `step` is what arrives from it."""

    def __init__(self) -> None:
        super().__init__(says(""))
        self.sent: list[ToEngine] = []
        self.exchange = Exchange(self.sent.append)
        self._num_steps = 0

    def submit(self, request: Request) -> RequestStream:  # type: ignore[override]
        return self.exchange.submit(request)

    @property
    def request_ids(self) -> list[str]:
        return [message.request.request_id for message in self.sent if isinstance(message, Submit)]

    def step(self, text: str, *, last: bool = False) -> None:
        """The same tokens for every request."""
        self._num_steps += 1
        outputs = [
            Output(request_id=name, token_ids=tuple(ids_of(text)), finish_reason="length" if last else None)
            for name in self.request_ids
        ]
        self.exchange.receive(StepMessage(outputs, EngineStats(num_steps=self._num_steps)))


class Client(asyncio.Protocol):
    """Sends one request and keeps the answer."""

    def __init__(self, body: object) -> None:
        raw = msgspec.json.encode(body)
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(raw)}\r\nconnection: close\r\n\r\n"
        self._request = head.encode() + raw
        self.received = bytearray()
        self.closed = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.received += data

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()

    def texts(self) -> list[str]:
        """Of the events so far."""
        whole = self.received[: self.received.rfind(b"\n\n")]
        lines = [line for line in whole.splitlines() if line.startswith(b"data: {")]
        events = [msgspec.json.decode(line.removeprefix(b"data: ")) for line in lines]
        return [choice["text"] for event in events for choice in event["choices"]]


@contextlib.asynccontextmanager
async def streams(client: DrivenClient, num_streams: int) -> AsyncIterator[list[Client]]:
    """So many requests that the engine has taken, each on a connection of its own."""
    loop = asyncio.get_running_loop()
    model = ServedModel(name=MODEL, client=client, load_text=lambda: TEXT)
    await model.start()
    config = uvicorn.Config(create_app(model, ServerConfig()), http=Connection, log_config=None, lifespan="off")
    config.load()
    state = ServerState()
    server = await loop.create_server(lambda: Connection(config, state, {}), "127.0.0.1", 0)
    server.sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 14)  # connections inherit it, and fill soon
    async with server:
        port = server.sockets[0].getsockname()[1]
        clients = [
            (await loop.create_connection(lambda: Client(_BODY), "127.0.0.1", port))[1] for _ in range(num_streams)
        ]
        await until(lambda: len(client.request_ids) == num_streams)
        try:
            yield clients
        finally:
            for each in clients:
                each.transport.abort()
            await asyncio.gather(*[each.closed.wait() for each in clients])


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for has no event
            await asyncio.sleep(0.001)


def run(act: Callable[[CountingLoop], Any]) -> None:
    loop = CountingLoop()
    with asyncio.Runner(loop_factory=lambda: loop) as runner:
        runner.run(act(loop))


def test_no_task_wakes_for_a_token() -> None:
    async def act(loop: CountingLoop) -> None:
        client = DrivenClient()
        async with streams(client, NUM_STREAMS) as clients:
            client.step("a")  # headers go out with the first event
            await until(lambda: all(each.texts() == ["a"] for each in clients))
            for _ in range(NUM_STEPS):
                before = loop.num_wakes
                client.step("b")
                assert loop.num_wakes - before <= 1, "whatever the number of streams"
                await asyncio.sleep(0.001)  # whoever was woken runs
            client.step("c", last=True)
            await asyncio.gather(*[each.closed.wait() for each in clients])
            assert all(each.texts() == ["a", *"b" * NUM_STEPS, "c"] for each in clients)
            assert all(b"data: [DONE]\n\n" in each.received for each in clients)

    run(act)


def test_several_tokens_of_a_step_are_one_event() -> None:
    async def act(loop: CountingLoop) -> None:
        client = DrivenClient()
        async with streams(client, 2) as clients:
            text = "hello wörld"
            assert len(ids_of(text)) > 2
            client.step(text)
            await until(lambda: all(each.texts() == [text] for each in clients))
            client.step(text)
            client.step("a", last=True)
            await asyncio.gather(*[each.closed.wait() for each in clients])
            assert [each.texts() for each in clients] == [[text, text, "a"]] * 2

    run(act)


def test_slow_reader_gets_everything_in_order() -> None:
    async def act(loop: CountingLoop) -> None:
        client = DrivenClient()
        pieces = [f"{number:05d} " for number in range(20_000)]
        async with streams(client, 2) as (slow, quick):
            slow.transport.pause_reading()
            for piece in pieces[: len(pieces) // 2]:
                client.step(piece)
                await asyncio.sleep(0)
            await until(lambda: pieces[len(pieces) // 2 - 1].encode() in quick.received[-1000:])
            assert len(slow.received) < len(quick.received) // 2, "the connection was full"
            slow.transport.resume_reading()
            for number, piece in enumerate(pieces[len(pieces) // 2 :], len(pieces) // 2):
                client.step(piece, last=number == len(pieces) - 1)
                await asyncio.sleep(0)  # the connection gets free between two steps
            await asyncio.gather(quick.closed.wait(), slow.closed.wait())
            for each in (slow, quick):
                assert "".join(each.texts()) == "".join(pieces)

    run(act)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_long_prompts_leave_the_loop_free(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokenized on another thread, by a call that lets go of the interpreter: the loop turns meanwhile."""
    threads: list[int] = []
    turns: list[int] = []
    ticks = 0
    original = Tokenizer._ids

    def spy(encoder: Any, text: str) -> list[int]:
        before = ticks
        ids = original(encoder, text)
        threads.append(threading.get_ident())
        turns.append(ticks - before)
        return ids

    monkeypatch.setattr(Tokenizer, "_ids", staticmethod(spy))
    server = Server(says("ok"))
    prompt = "lorem ipsum " * 17_000  # 200 kB
    content = {"messages": [{"role": "user", "content": prompt}]} if "chat" in path else {"prompt": prompt}

    async def act(http: Any) -> None:
        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)

        ticking = asyncio.create_task(tick())
        answer = await http.post(path, content=msgspec.json.encode(content | {"max_tokens": 1}))
        ticking.cancel()
        assert answer.status_code == 400, "longer than the context"

    server.run(act)
    assert threading.get_ident() not in threads
    assert max(turns) >= 5
