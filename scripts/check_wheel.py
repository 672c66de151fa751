"""Checks a built wheel: its size, what it holds, and that its extension imports on an old CPU under qemu-user.

    python scripts/check_wheel.py WHEEL PYTHON

PYTHON is the interpreter to import with. Without qemu-x86_64 the import is checked on this CPU alone and the reason
is printed; CI installs qemu.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

MAX_BYTES = 10 * 1000 * 1000
OLD_CPU = "core2duo"  # SSSE3 without SSE4, AVX or FMA
IMPORT = "import sys; sys.path.insert(0, sys.argv[1]); import llmserve._C as c; print('imported', c.__name__)"


def content_errors(wheel: Path) -> list[str]:
    """What is wrong with the size and the file list of a wheel."""
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    tops = {name.split("/")[0] for name in names}
    foreign = sorted(top for top in tops if top != "llmserve" and not top.endswith(".dist-info"))
    errors = [f"{name} does not belong in the wheel" for name in foreign]
    if not any(name.startswith("llmserve/_C.") and name.endswith(".so") for name in names):
        errors.append("the extension is missing")
    if wheel.stat().st_size > MAX_BYTES:
        errors.append(f"{wheel.stat().st_size} bytes, limit {MAX_BYTES}")
    return errors


def import_error(wheel: Path, launcher: list[str], python: str) -> str | None:
    """Imports the unpacked wheel with `launcher` before the interpreter; the last line of the failure, or None."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
        command = [*launcher, python, "-I", "-c", IMPORT, folder]
        result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    if result.returncode == 0:
        return None
    return (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]


def launchers() -> dict[str, list[str]]:
    """The CPUs to import on: this one, and an old one where it can be emulated."""
    found: dict[str, list[str]] = {"this CPU": []}
    qemu = shutil.which("qemu-x86_64") or shutil.which("qemu-x86_64-static")
    if platform.machine() != "x86_64":
        print("skipped: import on an old CPU (not an x86-64 machine)")
    elif qemu is None:
        print("skipped: import on an old CPU (qemu-x86_64 is not installed; Debian package qemu-user)")
    else:
        found[OLD_CPU] = [qemu, "-cpu", OLD_CPU]
    return found


def main() -> int:
    """1 if any check fails."""
    wheel, python = Path(sys.argv[1]), str(Path(sys.argv[2]).absolute())
    failures = content_errors(wheel)
    for cpu, launcher in launchers().items():
        error = import_error(wheel, launcher, python)
        print(f"wheel import on {cpu}: {error or 'ok'}")
        failures += [f"import on {cpu}: {error}"] if error else []
    for failure in failures:
        print(f"error: {wheel.name}: {failure}")
    print(f"wheel: {wheel.name}, {wheel.stat().st_size / 1e6:.2f} MB, {len(failures)} errors")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
