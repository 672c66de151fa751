"""A conversation in a real terminal."""

from __future__ import annotations

import errno
import os
import pty
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.e2e.real_server import LLMSERVE, ROOT, default_model

pytestmark = [pytest.mark.model, pytest.mark.slow]
_LAUNCHER = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Terminal:
    """Both ends of a conversation with a program."""

    def __init__(self, process: subprocess.Popen[bytes], descriptor: int) -> None:
        self.shown = ""
        self._process = process
        self._descriptor = descriptor

    def type(self, text: str) -> None:
        """Send keystrokes, and forget what was shown before."""
        self.shown = ""
        os.write(self._descriptor, text.encode())

    def wait_for(self, part: str) -> None:
        """Read until `part` is shown."""
        end = time.monotonic() + 30
        while part not in self.shown:
            assert time.monotonic() < end, self.shown
            assert self._read(), f"ended without {part!r}: {self.shown}"

    def exit_code(self) -> int:
        """Read to the end of the program."""
        while self._read():
            pass
        return self._process.wait(30)

    def _read(self) -> bool:
        """Take what is shown next; False when the program has ended."""
        try:
            text = os.read(self._descriptor, 4096)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return False
        self.shown += text.decode(errors="replace")
        return bool(text)


@contextmanager
def terminal(*args: str) -> Iterator[Terminal]:
    """`llmserve` in a terminal of its own, which its Ctrl-C goes through."""
    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", _LAUNCHER, *LLMSERVE, *args]
    with subprocess.Popen(command, cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs) as process:
        os.close(theirs)
        try:
            yield Terminal(process, ours)
        finally:
            process.kill()
            os.close(ours)


def test_conversation() -> None:
    with terminal("chat", str(default_model()), "--temperature", "0", "--max-tokens", "12") as chat:
        chat.wait_for(">>> ")
        assert "/reset" in chat.shown
        chat.type("Hello\n")
        chat.wait_for("tok/s")
        chat.wait_for(">>> ")
        chat.type("/reset\n")
        chat.wait_for("forgotten")
        chat.wait_for(">>> ")
        chat.type("\x1b[A\x1b[A\n")  # two lines up in the history
        chat.wait_for("Hello")
        chat.wait_for("tok/s")
        chat.wait_for(">>> ")
        chat.type("\x04")  # Ctrl-D
        assert chat.exit_code() == 0


def test_ctrl_c_stops_the_answer_alone() -> None:
    with terminal("chat", str(default_model()), "--temperature", "0.9") as chat:
        chat.wait_for(">>> ")
        chat.type("Write a very long story about a dragon.\n")
        chat.wait_for("dragon.\r\n")
        chat.shown = ""
        chat.wait_for(" ")
        chat.type("\x03")  # Ctrl-C
        chat.wait_for(">>> ")
        assert "tok/s" not in chat.shown
        chat.type("/exit\n")
        assert chat.exit_code() == 0
        assert "Traceback" not in chat.shown
