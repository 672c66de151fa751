"""The engine dies, the server is told to end: every client hears of it, and a new engine takes over."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.real_server import LLMSERVE, ROOT, children, default_model, events, real_server, wait_until_gone

pytestmark = pytest.mark.model
_LONG = {"prompt": "Once upon a time", "max_tokens": 4000, "ignore_eos": True, "stream": True}
_NUM_STREAMS = 8
_RECOVERY_S = 5.0


async def _last_event(client: httpx.AsyncClient, running: asyncio.Semaphore) -> dict[str, Any] | None:
    """The last event of a long stream; None for `[DONE]`. `running` is released at the first one."""
    last: dict[str, Any] | None = {}
    async with client.stream("POST", "/v1/completions", json=_LONG) as response:
        async for event in events(response):
            if last == {}:
                running.release()
            last = event
    return last


def test_killed_engine_ends_streams_and_comes_back(tmp_path: Path) -> None:
    async def run() -> float:
        async with httpx.AsyncClient(base_url=server.url, timeout=30) as client:
            running = asyncio.Semaphore(0)
            streams = [asyncio.create_task(_last_event(client, running)) for _ in range(_NUM_STREAMS)]
            for _ in streams:
                await running.acquire()
            killed_s = time.monotonic()
            os.kill(first_pid, signal.SIGKILL)
            for last in await asyncio.gather(*streams):
                assert last is not None, "a stream must not claim to be complete"
                assert last["error"]["code"] == "engine_died"
            while (await client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1})).status_code != 200:
                assert time.monotonic() - killed_s < _RECOVERY_S * 4
                await asyncio.sleep(0.05)
            return time.monotonic() - killed_s

    with real_server(tmp_path) as server:
        first_pid = server.engine_pid
        took_s = asyncio.run(run())
        assert took_s < _RECOVERY_S
        assert server.engine_pid != first_pid
        assert httpx.get(f"{server.url}/readyz").status_code == 200
        assert server.metric("vllm:kv_cache_usage_perc") == 0


def test_sigterm_lets_a_stream_finish(tmp_path: Path) -> None:
    with real_server(tmp_path) as server:
        engine_pid = server.engine_pid
        body = _LONG | {"max_tokens": 60}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-2]
        assert server.process.wait(10) == 0
        wait_until_gone(engine_pid)


def test_second_sigterm_ends_now(tmp_path: Path) -> None:
    with real_server(tmp_path) as server:
        engine_pid = server.engine_pid
        with httpx.stream("POST", f"{server.url}/v1/completions", json=_LONG, timeout=30) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            while httpx.get(f"{server.url}/readyz").status_code == 200:
                time.sleep(0.01)
            told_s = time.monotonic()
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert '"error"' in rest[-1]
        assert server.process.wait(10) == 0
        assert time.monotonic() - told_s < 3
        wait_until_gone(engine_pid)


def test_ctrl_c_of_an_idle_server_is_quiet(tmp_path: Path) -> None:
    with real_server(tmp_path) as server:
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(10) == 0
        assert "Traceback" not in server.log.read_text()


def test_killed_server_takes_its_engine_along(tmp_path: Path) -> None:
    with real_server(tmp_path) as server:
        engine_pid = server.engine_pid
        server.process.kill()
        wait_until_gone(engine_pid)


@pytest.mark.parametrize("delay_s", [0.0, 0.05, 0.1, 0.2])
def test_ctrl_c_while_loading_is_quiet(delay_s: float) -> None:
    """Whatever it was doing: it ends, without a traceback and without leaving an engine behind."""
    command = [*LLMSERVE, "serve", str(default_model()), "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        while not (engines := children(process.pid)):
            assert process.poll() is None
        time.sleep(delay_s)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=15)
    assert "Traceback" not in errors
    assert process.returncode in (0, 130)
    for pid in engines:
        wait_until_gone(pid)


def test_probes_are_answered_while_the_model_loads(tmp_path: Path) -> None:
    """The address answers before the model is there, and says so."""
    seen: list[tuple[int, int, int]] = []
    ended = threading.Event()
    port = _free_port()

    def probe() -> None:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}") as client:
            while not ended.is_set():
                try:
                    codes = [client.get(path).status_code for path in ("/livez", "/readyz")]
                    codes.append(client.post("/v1/completions", json={"prompt": "a", "max_tokens": 1}).status_code)
                    seen.append((codes[0], codes[1], codes[2]))
                except httpx.TransportError:
                    time.sleep(0.001)

    thread = threading.Thread(target=probe)
    thread.start()
    try:
        with real_server(tmp_path, "--port", str(port)):
            while not seen or seen[-1] != (200, 200, 200):
                time.sleep(0.01)
    finally:
        ended.set()
        thread.join()
    assert (200, 503, 503) in seen, seen


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
