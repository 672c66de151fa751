"""Clients that leave, streams that wait, and the end of a server: real sockets, real signals."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import ServerProcess, scripted_server


def until(condition: Callable[[], bool], *, timeout_s: float = 5.0) -> None:
    """Wait for a condition."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def num_aborted(server: ServerProcess) -> int:
    """Sequences ended because their client left."""
    text = httpx.get(f"{server.url}/metrics").text
    line = next(line for line in text.splitlines() if line.startswith("vllm:request_success_total") and "abort" in line)
    return int(float(line.split()[-1]))


def test_leaving_a_stream_aborts(server: ServerProcess) -> None:
    before = num_aborted(server)
    body = {"prompt": "forever", "stream": True, "n": 2}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as response:
        next(response.iter_lines())
    until(lambda: num_aborted(server) == before + 2)


@pytest.mark.parametrize("stream", [False, True])
def test_leaving_before_the_first_token_aborts(server: ServerProcess, stream: bool) -> None:
    before = num_aborted(server)
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(
            f"{server.url}/v1/completions", json={"prompt": "stuck", "stream": stream}, timeout=httpx.Timeout(0.05)
        )
    until(lambda: num_aborted(server) == before + 1)


def test_comments_keep_a_waiting_stream_alive(server: ServerProcess) -> None:
    response = httpx.post(f"{server.url}/v1/completions", json={"prompt": "slow", "stream": True})
    assert response.text.startswith(": keep-alive\n\n")
    assert response.text.endswith("data: [DONE]\n\n")
    assert 2 <= response.text.count(": keep-alive") <= 5


def test_running_requests_finish_before_the_end() -> None:
    with scripted_server() as server:
        body = {"prompt": "slow", "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            until(lambda: httpx.get(f"{server.url}/readyz").status_code == 503)
            assert httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"}).status_code == 503
            assert httpx.get(f"{server.url}/livez").status_code == 200
            assert list(lines)[-2] == "data: [DONE]"
        assert server.process.wait(5) == 0


def test_drain_timeout_ends_streams_with_an_error() -> None:
    with scripted_server(drain_timeout_s=0.2) as server:
        body = {"prompt": "forever", "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            last = list(lines)[-2]
        assert '"error"' in last
        assert "shutting down" in last
        assert server.process.wait(5) == 0


def test_second_signal_ends_now() -> None:
    with scripted_server(drain_timeout_s=60) as server:
        body = {"prompt": "forever", "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=body) as response:
            lines = response.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            until(lambda: httpx.get(f"{server.url}/readyz").status_code == 503)
            server.process.send_signal(signal.SIGTERM)
            assert '"error"' in list(lines)[-2]
        assert server.process.wait(5) == 0


def test_idle_server_ends_at_once() -> None:
    with scripted_server() as server:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(2) == 0


def cpu_ticks_and_waits(pid: int) -> tuple[int, int]:
    """Clock ticks of CPU time that a process took, and how often its main thread went to sleep."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    waits = re.search(r"^voluntary_ctxt_switches:\s+(\d+)", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert waits is not None
    return int(fields[11]) + int(fields[12]), int(waits[1])


def test_idle_server_rests(server: ServerProcess) -> None:
    httpx.get(f"{server.url}/livez")
    ticks, waits = cpu_ticks_and_waits(server.process.pid)
    time.sleep(1.0)  # the measured time itself
    ticks_after, waits_after = cpu_ticks_and_waits(server.process.pid)
    assert (ticks_after - ticks) / os.sysconf("SC_CLK_TCK") <= 0.01
    assert waits_after - waits <= 3, "something ticks"


def test_one_log_line_for_a_request() -> None:
    with scripted_server() as server:
        httpx.get(f"{server.url}/livez")
        httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"}, headers={"x-request-id": "mine"})
        server.process.send_signal(signal.SIGTERM)
        server.process.wait(5)
        assert server.process.stderr is not None
        lines = [line for line in server.process.stderr.read().splitlines() if "event=request" in line]
    assert len(lines) == 1
    for field in ("request_id=mine", "status=200", "completion_tokens=8", "ttft_ms=", "finish_reason=stop"):
        assert field in lines[0]
