"""A process that answers a line of JSON with a line of JSON: how a benchmark drives a library that is not ours."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import msgspec

_END_S: Final = 30.0
_LOG_BYTES: Final = 500


class LineWorker:
    """A script under the Python of an environment of its own; a context manager, which ends it."""

    def __init__(self, python: Path, script: Path) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the worker
        # -P: modules beside the script must not hide packages of the same name.
        self._process = subprocess.Popen(
            [python, "-P", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log
        )

    def last_words(self) -> str:
        """The end of what it wrote to stderr, as one line."""
        self._log.seek(0)
        return " ".join(self._log.read()[-_LOG_BYTES:].decode(errors="replace").split())

    def ask(self, request: object) -> bytes:
        """The answer as JSON; empty when the process has ended."""
        assert self._process.stdin is not None, "both are pipes"
        assert self._process.stdout is not None, "both are pipes"
        try:
            self._process.stdin.write(msgspec.json.encode(request) + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return b""
        return self._process.stdout.readline()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None, "it is a pipe"
        assert self._process.stdout is not None, "it is a pipe"
        self._process.stdin.close()
        try:
            self._process.wait(_END_S if error is None else 0.0)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()
