"""The folder of this user's running processes: sockets of each frontend, and what engines share.

Invariants: it belongs to this user and nobody else may enter; a frontend's folder is locked while its process lives,
so what a killed frontend left behind is found and removed by the next one that starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

_MAX_CHARS = 64  # a Unix socket's path has 107 at most
_FRONTEND = "frontend-"


def runtime_dir() -> Path:
    """The folder, made when absent: `$XDG_RUNTIME_DIR/llmserve`, else one under the temporary folder.

    Raises OSError when somebody else owns what lies in its place.
    """
    given = os.environ.get("XDG_RUNTIME_DIR", "")
    temporary = tempfile.gettempdir()
    if given and len(given) <= _MAX_CHARS - 16 and os.access(given, os.W_OK):
        path = Path(given) / "llmserve"
    else:
        path = Path(temporary if len(temporary) <= _MAX_CHARS - 24 else "/tmp") / f"llmserve-{os.getuid()}"
    with contextlib.suppress(FileExistsError):
        path.mkdir(mode=0o700)
    found = path.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) != 0o700:
        raise PermissionError(f"{path} must be a folder of this user alone (mode 0700)")
    return path


class FrontendFolder:
    """A private folder that lives as long as this process at most. Raises OSError."""

    def __init__(self) -> None:
        base = runtime_dir()
        with _locked(base):
            for stale in base.glob(f"{_FRONTEND}*"):
                _remove_if_stale(stale)
            self.path = Path(tempfile.mkdtemp(prefix=_FRONTEND, dir=base))
            self._fd = _open(self.path)
            fcntl.flock(self._fd, fcntl.LOCK_EX)

    def close(self) -> None:
        """Remove the folder and all in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._fd)


def _open(path: Path) -> int:
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    fd = _open(path)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _remove_if_stale(path: Path) -> None:
    with contextlib.suppress(OSError):
        fd = _open(path)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        else:
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(fd)
