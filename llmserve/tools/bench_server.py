"""A server under test as a process of its own: started, waited for, stopped, whatever happens between."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Final

from llmserve.errors import NotReady
from llmserve.tools.bench_http import Endpoint, exchange

_POLL_S: Final = 0.05
_STOP_S: Final = 15.0
_LOG_BYTES: Final = 1500


@dataclass(frozen=True, slots=True)
class RunningServer:
    """A server that answers."""

    endpoint: Endpoint
    pid: int
    start_s: float
    """From exec to the first 200 of `/health`."""


def free_port() -> int:
    """A port of loopback that nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def llmserve_command(model: str, *, port: int, options: Sequence[str] = ()) -> list[str]:
    """The command line of this installation's own server."""
    command = [sys.executable, "-m", "llmserve", "serve", model, "--port", str(port), "--log-level", "warning"]
    return [*command, *options]


@contextlib.contextmanager
def running_server(
    command: Sequence[str], *, port: int, timeout_s: float = 120.0, env: dict[str, str] | None = None
) -> Iterator[RunningServer]:
    """Run `command`, which listens on loopback's `port`, until the block ends.

    Raises `NotReady` with the end of its output when it ends early or is not ready in time.
    """
    started_s = time.perf_counter()
    with tempfile.TemporaryFile() as log, _process(command, log, env) as process:
        endpoint = Endpoint("127.0.0.1", port)
        while not asyncio.run(_is_healthy(endpoint)):
            took_s = time.perf_counter() - started_s
            if process.poll() is not None or took_s > timeout_s:
                why = "ended" if process.poll() is not None else f"was not ready after {took_s:.0f} s"
                raise NotReady(f"{Path(command[0]).name} {why}: {_end_of(log)}")
            time.sleep(_POLL_S)
        yield RunningServer(endpoint, process.pid, time.perf_counter() - started_s)


@contextlib.contextmanager
def _process(command: Sequence[str], log: IO[bytes], env: dict[str, str] | None) -> Iterator[subprocess.Popen[bytes]]:
    # Also when this process is killed no server must go on using the cores.
    setpriv = shutil.which("setpriv")
    guard = [setpriv, "--pdeathsig", "TERM"] if setpriv else []
    try:
        process = subprocess.Popen(
            [*guard, *command], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env
        )
    except OSError as error:
        raise NotReady(f"{command[0]} cannot be run: {(error.strerror or str(error)).lower()}") from error
    try:
        yield process
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def _is_healthy(endpoint: Endpoint) -> bool:
    reply = await exchange(endpoint, endpoint.request("GET", "/health"), timeout_s=5.0)
    return reply.failure is None


def _end_of(log: IO[bytes]) -> str:
    """The last lines of an output as one line."""
    log.seek(0)
    return " ".join(log.read()[-_LOG_BYTES:].decode(errors="replace").split())
