"""Both engine clients over a real engine and a tiny checkpoint.

Most use the NumPy executor: it is slow enough that a stream can be interrupted in the middle.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmserve.client.exchange import Exchange
from llmserve.client.inproc import InprocClient
from llmserve.client.process import ProcessClient, restart_delay_s
from llmserve.client.protocol import EngineClient
from llmserve.client.wire import ControlReply, StepMessage
from llmserve.config import EngineConfig
from llmserve.errors import EngineDied, InvalidRequest, LLMServeError, ModelNotFound, NotReady
from llmserve.types import EngineInfo, Request, SamplingParams
from tests.tiny.checkpoints import write
from tests.tiny.models import TinyModel

pytest.importorskip("llmserve._C", reason="the extension is not built")

MAX_LEN = 128


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    path = write(TinyModel(name="tiny", model_type="llama"), tmp_path_factory.mktemp("checkpoint"))
    return EngineConfig(model_path=path, device="reference", max_model_len=MAX_LEN, kv_cache_bytes=1 << 23)


@pytest.fixture(scope="module")
def cpu_config(config: EngineConfig) -> EngineConfig:
    return replace(config, device="cpu")


def make_request(request_id: str, max_tokens: int, prompt: list[int] | None = None) -> Request:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0)
    return Request(request_id=request_id, prompt_token_ids=prompt or [1, 2, 3], sampling=sampling)


async def complete(client: EngineClient, request_id: str, max_tokens: int) -> tuple[list[int], str | None]:
    tokens: list[int] = []
    reason = None
    async with contextlib.aclosing(client.submit(make_request(request_id, max_tokens))) as stream:
        async for output in stream:
            tokens += output.token_ids
            reason = output.finish_reason
    return tokens, reason


async def until(condition: Callable[[], object], timeout_s: float = 10.0) -> float:
    """Wait for a condition; returns the seconds it took."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() - started < timeout_s, "it did not happen in time"
        await asyncio.sleep(0.005)
    return time.monotonic() - started


def serve(make: Callable[[], EngineClient], use: Callable[[Any], Awaitable[None]]) -> None:
    """Start a client, use it, stop it."""

    async def run() -> None:
        client = make()
        await client.start()
        try:
            await use(client)
        finally:
            await client.stop()
            await client.stop()
        assert client.state == "stopped"

    asyncio.run(run())


@pytest.fixture(params=[ProcessClient, InprocClient])
def make_client(request: pytest.FixtureRequest, config: EngineConfig) -> Callable[[], EngineClient]:
    return lambda: request.param(config)


def test_requests_together_equal_requests_alone(make_client: Callable[[], EngineClient]) -> None:
    async def use(client: EngineClient) -> None:
        alone = await complete(client, "alone", 20)
        together = await asyncio.gather(*[complete(client, str(i), 20) for i in range(8)])
        assert together == [alone] * 8
        assert (len(alone[0]), alone[1]) == (20, "length")
        assert not client.is_busy
        assert client.info is not None
        assert client.stats.num_generation_tokens == 9 * 20

    serve(make_client, use)


def test_a_step_is_one_message(cpu_config: EngineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[StepMessage] = []
    receive = Exchange.receive

    def spy(exchange: Exchange, message: StepMessage | ControlReply) -> None:
        if isinstance(message, StepMessage):
            messages.append(message)
        receive(exchange, message)

    monkeypatch.setattr(Exchange, "receive", spy)

    async def use(client: EngineClient) -> None:
        await asyncio.gather(*[complete(client, str(i), 40) for i in range(8)])
        assert len(messages) == client.stats.num_steps
        assert sum(len(message.outputs) for message in messages) == 8 * 40
        assert max(len(message.outputs) for message in messages) == 8

    serve(lambda: ProcessClient(cpu_config), use)


def test_compiled_executor_serves_and_counts_its_progress(cpu_config: EngineConfig) -> None:
    async def use(client: ProcessClient) -> None:
        alone = await complete(client, "alone", 100)
        assert await asyncio.gather(*[complete(client, str(i), 100) for i in range(32)]) == [alone] * 32
        assert client._child is not None
        assert 0 < client._child.moved_s() <= time.monotonic()

    serve(lambda: ProcessClient(cpu_config), use)


def test_refusals(make_client: Callable[[], EngineClient]) -> None:
    async def use(client: EngineClient) -> None:
        [output] = [output async for output in client.submit(make_request("long", 1, prompt=[1] * MAX_LEN))]
        assert output.finish_reason == "error"
        assert "128" in (output.error or "")
        stream = client.submit(make_request("twice", 2))
        with pytest.raises(InvalidRequest, match="in use"):
            client.submit(make_request("twice", 2))
        assert len([output async for output in stream]) == 2
        with pytest.raises(InvalidRequest, match="unknown engine command"):
            await client.control("dance")

    serve(make_client, use)


def test_leaving_a_stream_aborts_the_request(make_client: Callable[[], EngineClient]) -> None:
    async def use(client: EngineClient) -> None:
        leavers = [asyncio.create_task(complete(client, str(i), 120)) for i in range(4)]
        async with contextlib.aclosing(client.submit(make_request("closer", 120))) as stream:
            assert (await anext(stream)).finish_reason is None
            await until(lambda: client.stats.num_running == 5)
        for task in leavers:
            task.cancel()
        await until(lambda: not client.is_busy)
        assert (await client.control("stats"))["num_running"] == 0
        assert await client.control("check_integrity") == {"num_blocks_used": 0}

    serve(make_client, use)


def test_abort_ends_the_stream(make_client: Callable[[], EngineClient]) -> None:
    async def use(client: EngineClient) -> None:
        stream = client.submit(make_request("a", 120))
        await anext(stream)
        await client.abort("a")
        await client.abort("unknown")
        reasons = [output.finish_reason async for output in stream]
        assert reasons[-1] == "abort"

    serve(make_client, use)


def test_stop_ends_open_streams(make_client: Callable[[], EngineClient]) -> None:
    async def use(client: EngineClient) -> None:
        stream = client.submit(make_request("a", 120))
        await anext(stream)
        await client.stop()
        assert [output.finish_reason async for output in stream][-1] == "abort"
        with pytest.raises(NotReady):
            client.submit(make_request("b", 1))

    serve(make_client, use)


def test_loading_error_reaches_the_caller(tmp_path: Path) -> None:
    async def run(client: EngineClient) -> None:
        with pytest.raises(ModelNotFound):
            await client.start()
        assert client.state == "stopped"

    config = EngineConfig(model_path=tmp_path / "missing", device="reference")
    asyncio.run(run(ProcessClient(config)))
    asyncio.run(run(InprocClient(config)))


def test_killed_child_ends_every_stream_and_is_replaced(config: EngineConfig) -> None:
    async def use(client: ProcessClient) -> None:
        tasks = [asyncio.create_task(complete(client, str(i), 120)) for i in range(16)]
        expected, _ = await complete(client, "first", 10)
        pid = client.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, EngineDied) for result in results)
        assert "signal 9" in str(results[0])
        assert client.state == "restarting"
        with pytest.raises(NotReady, match="restarting"):
            client.submit(make_request("too early", 1))
        assert await until(lambda: client.state == "ready") < 5.0
        assert client.pid != pid
        assert await complete(client, "first", 10) == (expected, "length")
        assert client.num_restarts == 1

    serve(lambda: ProcessClient(config), use)


def test_sigterm_of_the_child_aborts_and_sigint_is_not_its_business(config: EngineConfig) -> None:
    async def use(client: ProcessClient) -> None:
        assert client.pid is not None
        os.kill(client.pid, signal.SIGINT)
        stream = client.submit(make_request("a", 120))
        await anext(stream)
        os.kill(client.pid, signal.SIGTERM)
        assert [output.finish_reason async for output in stream][-1] == "abort"
        await until(lambda: client.num_restarts == 1)

    serve(lambda: ProcessClient(config), use)


def test_stopped_child_is_seen_not_to_progress(config: EngineConfig) -> None:
    async def use(client: ProcessClient) -> None:
        stream = client.submit(make_request("a", 120))
        await anext(stream)
        assert client.pid is not None
        os.kill(client.pid, signal.SIGSTOP)
        await asyncio.sleep(0.1)
        frozen_s = client.last_progress_s
        await asyncio.sleep(0.1)
        assert client.is_busy
        assert client.last_progress_s == frozen_s
        os.kill(client.pid, signal.SIGCONT)
        await until(lambda: client.last_progress_s > frozen_s)
        await stream.aclose()

    serve(lambda: ProcessClient(config), use)


def test_stop_while_loading(config: EngineConfig) -> None:
    async def run() -> None:
        client = ProcessClient(config)
        starting: asyncio.Task[EngineInfo] = asyncio.create_task(client.start())
        await asyncio.sleep(0)
        await client.stop()
        with pytest.raises(LLMServeError, match="stopped while it loaded"):
            await starting

    asyncio.run(run())


PARENT = """
import asyncio, os, sys
from dataclasses import replace
from pathlib import Path
from llmserve.client import wire
from llmserve.client.process import ProcessClient
async def main():
    client = ProcessClient(wire.decode_config(sys.argv[1]))
    await client.start()
    os.write(1, str(client.pid).encode())
    os.kill(os.getpid(), 9)
asyncio.run(main())
"""


def test_child_dies_with_its_parent(config: EngineConfig) -> None:
    from llmserve.client.wire import encode_config

    parent = subprocess.run(
        [sys.executable, "-c", PARENT, encode_config(config)], capture_output=True, check=False, timeout=60
    )
    assert parent.returncode == -signal.SIGKILL, parent.stderr.decode()
    child = Path(f"/proc/{int(parent.stdout)}/cmdline")

    async def gone() -> None:
        await until(lambda: not child.exists() or b"engine_main" not in child.read_bytes())

    asyncio.run(gone())


@pytest.mark.slow
def test_idle_engine_uses_no_time(cpu_config: EngineConfig) -> None:
    async def use(client: ProcessClient) -> None:
        await complete(client, "a", 5)
        before_s = cpu_s(client.pid or 0) + time.process_time()
        await asyncio.sleep(3.0)
        assert cpu_s(client.pid or 0) + time.process_time() - before_s < 0.03

    serve(lambda: ProcessClient(cpu_config), use)


def cpu_s(pid: int) -> float:
    """Processor seconds a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_engine_child_imports_little(config: EngineConfig) -> None:
    code = (
        "import sys, llmserve.cli.engine_main, llmserve.engine.loader, llmserve.ops.reference;"
        "print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, timeout=60)
    loaded = set(run.stdout.decode().split())
    assert not loaded & {"torch", "transformers", "typer", "rich", "starlette", "uvicorn", "jinja2", "tokenizers"}


def test_restart_delays() -> None:
    assert [restart_delay_s(count) for count in range(5)] == [0.0, 0.5, 1.0, 2.0, 4.0]
    assert restart_delay_s(50) == 30.0
