"""`llmserve serve --trace`: the file of a real server, through a crash of its engine and a clean end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.real_server import LLMSERVE, ROOT, RealServer, real_server, wait_until_gone
from tests.engine.test_trace import assert_requests_end, inside, load, spans

pytestmark = pytest.mark.model
_LONG = {"prompt": "Once upon a time", "max_tokens": 4000, "ignore_eos": True, "stream": True}


def _complete(server: RealServer) -> None:
    body = {"prompt": "The capital of France is", "max_tokens": 8, "n": 2}
    assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=30).status_code == 200


def _kill_engine_at_work(server: RealServer) -> None:
    first_pid = server.engine_pid
    with httpx.stream("POST", f"{server.url}/v1/completions", json=_LONG, timeout=30) as response:
        for _ in zip(range(8), response.iter_lines(), strict=False):
            pass
        os.kill(first_pid, signal.SIGKILL)
        wait_until_gone(first_pid)
    end = time.monotonic() + 20
    while httpx.get(f"{server.url}/readyz").status_code != 200:
        assert time.monotonic() < end
        time.sleep(0.05)


def test_trace_of_a_server_whose_engine_was_killed(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    path.write_text("of an earlier server")
    with real_server(tmp_path, "--trace", str(path)) as server:
        _complete(server)
        _kill_engine_at_work(server)
        assert "]" not in path.read_text().rstrip()[-2:]
        left = load(path)
        _complete(server)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
    events: list[dict[str, Any]] = json.loads(path.read_text())
    assert events[: len(left)] == left
    first_pid, last_pid = events[0]["pid"], events[-1]["pid"]
    assert first_pid != last_pid
    assert_requests_end([event for event in events if event["pid"] == last_pid])
    for pid in (first_pid, last_pid):
        own = [event for event in events if event["pid"] == pid]
        steps = spans(own, "step")
        assert len(steps) >= 8
        assert all(any(inside(launch, step) for step in steps) for launch in spans(own, "launch"))
        nodes = [event for event in own if event["ph"] == "X" and event["tid"] == 2]
        assert {"gemm", "attention", "sample"} <= {event["name"] for event in nodes}
        launched_us = sum(launch["dur"] for launch in spans(own, "launch"))
        assert 0 < sum(node["dur"] for node in nodes) <= launched_us


def test_trace_that_cannot_be_written(tmp_path: Path) -> None:
    command = [*LLMSERVE, "serve", "smollm2", "--trace", str(tmp_path / "missing" / "trace.json")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode != 0
    assert "--trace" in result.stderr
    assert "no such file" in result.stderr
    assert "Traceback" not in result.stderr
