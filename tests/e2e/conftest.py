"""Servers in processes of their own, on loopback."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.e2e.real_server import RealServer, real_server

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True, slots=True)
class ServerProcess:
    """A running server."""

    url: str
    process: subprocess.Popen[str]


@contextlib.contextmanager
def scripted_server(*, drain_timeout_s: float = 5.0) -> Iterator[ServerProcess]:
    """A server around the scripted engine, ready; killed at the end if it still runs."""
    command = [sys.executable, "-m", "tests.e2e.scripted_server", str(drain_timeout_s)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            url = process.stdout.readline().strip()
            assert url, process.stderr.read() if process.stderr else ""
            yield ServerProcess(url, process)
        finally:
            process.kill()


@pytest.fixture(scope="module")
def server() -> Iterator[ServerProcess]:
    """One scripted server for all tests of a module."""
    with scripted_server() as running:
        yield running


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    """One `llmserve serve` of the real model for all tests that leave it as it was."""
    with real_server(tmp_path_factory.mktemp("served")) as running:
        yield running
