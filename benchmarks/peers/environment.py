"""Environments of the peers, each its own, none the project's: `.venv-peers…` beside it, made on first use."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent.parent
_PIP: Final = ("-m", "pip", "--disable-pip-version-check", "--quiet", "install")


def python_of(name: str) -> Path:
    """Of the environment `name`, whether or not it is there."""
    return ROOT / name / "bin" / "python"


def environment(name: str, probe: str, note: str, install: Callable[[Path], None]) -> Path:
    """The Python of an environment in which `probe` runs without error; makes it, and says so, where it does not.

    Raises `subprocess.CalledProcessError` when the installation fails.
    """
    python = python_of(name)
    if not python.exists() or subprocess.run([python, "-c", probe], capture_output=True, check=False).returncode:
        print(f"installing into {name}: {note}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(python.parent.parent)], check=True)
        install(python)
        subprocess.run([python, "-c", probe], check=True, stdout=subprocess.DEVNULL)
    return python


def pip_install(python: Path, *arguments: str, variables: Mapping[str, str] | None = None) -> None:
    """`pip install` in an environment."""
    subprocess.run([python, *_PIP, *arguments], check=True, env=os.environ | dict(variables or {}))


def said(command: Sequence[str | Path], *, may_fail: bool = False) -> str:
    """What a command prints, both streams. Raises `subprocess.CalledProcessError` and prints the end of that."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    if may_fail:
        return done.stdout
    if done.returncode:
        print(done.stdout[-2000:], file=sys.stderr)
    done.check_returncode()
    return done.stdout
