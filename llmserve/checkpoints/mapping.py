"""A file mapped read-only. Owns the mapping; views of it keep it alive after `close`.

Invariant: nothing is copied and nothing is written; pages are read from disk when they are first touched.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from pathlib import Path

from llmserve.errors import CheckpointError, ModelNotFound


class MappedFile:
    """The bytes of one file. `data` may be sliced without copying; `stat` is of the file that is mapped."""

    __slots__ = ("data", "map", "path", "size", "stat")

    def __init__(self, path: Path) -> None:
        """Map `path`. Raises `ModelNotFound` if it is missing, `CheckpointError` if it cannot be mapped."""
        self.path = path
        try:
            with path.open("rb") as file:
                self.stat = os.fstat(file.fileno())
                self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise ModelNotFound(f"{path}: no such file") from error
        except ValueError as error:  # mmap's way to say that the length is zero
            raise CheckpointError(f"{path}: the file is empty") from error
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
        self.data = memoryview(self.map)
        self.size = len(self.map)

    def release_pages(self) -> None:
        """Give the pages read so far back to the system; they are read again when touched."""
        self.map.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Let the mapping go. Tensors that are still referenced keep it until they are dropped."""
        self.data.release()
        with contextlib.suppress(BufferError):
            self.map.close()
