"""`llmserve serve` as a user starts it, with the real model, in processes of its own."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from llmserve.checkpoints import pull
from llmserve.errors import LLMServeError

ROOT = Path(__file__).resolve().parent.parent.parent
LLMSERVE = [sys.executable, "-m", "llmserve"]
_URL = re.compile(r"is ready at (http://\S+)")


def default_model() -> Path:
    """The real model's file; the test skips, and says why, where it cannot be had."""
    try:
        return pull.resolve("smollm2")
    except LLMServeError as error:
        pytest.skip(f"the default model cannot be had: {error}")


@dataclass(frozen=True, slots=True)
class RealServer:
    """A server that is ready."""

    url: str
    process: subprocess.Popen[str]
    log: Path
    """Where its stderr goes."""

    @property
    def engine_pid(self) -> int:
        """The process id of the engine child that runs now."""
        (pid,) = children(self.process.pid)
        return pid

    def metric(self, name: str) -> float:
        """The value of a metric that has one sample."""
        text = httpx.get(f"{self.url}/metrics").text
        (line,) = (line for line in text.splitlines() if line.startswith(name + "{"))
        return float(line.split()[-1])


@contextlib.contextmanager
def real_server(
    folder: Path, *args: str, env: Mapping[str, str] | None = None, model: str = ""
) -> Iterator[RealServer]:
    """Serve the default model, or `model`, on a free port; `folder` takes the log. Killed at the end if it runs."""
    log = folder / "serve.log"
    what = [model] if model else [str(default_model()), "--served-model-name", "smollm2"]
    command = [*LLMSERVE, "serve", *what, "--port", "0", *args]
    with (
        log.open("w") as stderr,
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=stderr, text=True, env=env) as process,
    ):
        assert process.stdout is not None
        try:
            match = _URL.search(process.stdout.readline())
            assert match, log.read_text()
            yield RealServer(match[1], process, log)
        finally:
            process.kill()


def children(pid: int) -> list[int]:
    """The processes whose parent is `pid`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                if stat_fields(int(entry.name))[1] == str(pid):
                    found.append(int(entry.name))
    return found


def stat_fields(pid: int) -> list[str]:
    """/proc/PID/stat from the state on: state, parent, …; user and system time are at 11 and 12."""
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()


async def events(response: httpx.Response) -> AsyncIterator[dict[str, Any] | None]:
    """The JSON events of a stream; None for `[DONE]`."""
    async for line in response.aiter_lines():
        if line.startswith("data: "):
            yield None if line == "data: [DONE]" else json.loads(line.removeprefix("data: "))


def wait_until_gone(pid: int, *, timeout_s: float = 5.0) -> None:
    """Wait for a process to end."""
    end = time.monotonic() + timeout_s
    while Path(f"/proc/{pid}").exists() and stat_fields(pid)[0] != "Z":
        assert time.monotonic() < end, f"process {pid} still runs"
        time.sleep(0.01)
