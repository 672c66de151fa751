"""The folder of images: one writer of an image at a time, and room for a new one by removing what was used longest ago.

    <folder>/<key>.image      complete, on disk; its modification time is when it was last used
    <folder>/<key>.<pid>.tmp  being written, locked by its writer
    <folder>/<key>.lock       held by whoever writes that image

Invariants: a name appears when all of its file is on disk (fsync, rename); a file whose lock is held is never removed.
Locks are the kernel's: they end with the process that held them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

_SPARE_BYTES: Final = 64 << 20
_POLL_S: Final = 0.05
_PATIENCE_S: Final = 300.0


class ImageFolder:
    """Images under one folder, `max_bytes` at most. Several processes may use it at once."""

    def __init__(self, path: Path, max_bytes: int) -> None:
        self.path = path
        self.max_bytes = max_bytes

    def place_of(self, key: str) -> Path:
        """Where the image of that name is, or would be."""
        return self.path / f"{key}.image"

    def images(self) -> dict[Path, os.stat_result]:
        """All complete images, the one used longest ago first."""
        found = {}
        for path in self.path.glob("*.image"):
            with contextlib.suppress(FileNotFoundError):
                found[path] = path.stat()
        return dict(sorted(found.items(), key=lambda item: item[1].st_mtime_ns))

    def note_use(self, key: str) -> None:
        """It was used now. Nothing happens where the folder cannot be written."""
        with contextlib.suppress(OSError):
            os.utime(self.place_of(key))

    @contextlib.contextmanager
    def writing(self, key: str, *, on_wait: Callable[[], None]) -> Iterator[None]:
        """Be the only writer of that image; `on_wait` is called while another one is.

        After five minutes of waiting it goes on all the same: two writers cost time, not truth. Raises `OSError`.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = self.path / f"{key}.lock"
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            deadline_s = time.monotonic() + _PATIENCE_S
            while not _try_lock(descriptor) and time.monotonic() < deadline_s:
                on_wait()
                time.sleep(_POLL_S)
            yield
            lock.unlink(missing_ok=True)
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def new_file(self, key: str, num_bytes: int) -> Iterator[int]:
        """The descriptor of a file with that much room, which gets its name when the body ends without an exception.

        Raises `OSError`, also for what does not fit.
        """
        self._make_room(num_bytes, but_for=self.place_of(key))
        path = self.path / f"{key}.{os.getpid()}.tmp"
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            os.posix_fallocate(descriptor, 0, num_bytes)
            yield descriptor
            os.fsync(descriptor)
            os.replace(path, self.place_of(key))
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            os.close(descriptor)
        folder = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _make_room(self, num_bytes: int, *, but_for: Path) -> None:
        """Remove what writers left that died, then images nobody maps, the one used longest ago first."""
        if num_bytes > self.max_bytes:
            raise OSError(errno.EFBIG, f"{num_bytes >> 20} MiB are more than all images may have")
        for path in self.path.glob("*.tmp"):
            _remove_unlocked(path)
        images = self.images()
        replaced = images.pop(but_for, None)
        total = num_bytes + sum(stat.st_size for stat in images.values())
        lacking = num_bytes + _SPARE_BYTES - shutil.disk_usage(self.path).free - (replaced.st_size if replaced else 0)
        for path, stat in images.items():
            if total <= self.max_bytes and lacking <= 0:
                break
            if _remove_unlocked(path):
                total -= stat.st_size
                lacking -= stat.st_size
        if lacking > 0:
            raise OSError(errno.ENOSPC, f"{lacking >> 20} MiB more would be needed on the disk")


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _remove_unlocked(path: Path) -> bool:
    """Remove a file unless somebody holds a lock on it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        if not _try_lock(descriptor):
            return False
        path.unlink(missing_ok=True)
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
