"""The local store of pulled files: content-addressed blobs and views that hard-link them.

    $LLMSERVE_HOME/blobs/sha256/ab/abcd…        one copy of each content, mode 0444
    $LLMSERVE_HOME/views/<model>/<version>/…    the names that loaders want
    $LLMSERVE_HOME/views/<model>/index.json     what was pulled, with hashes and sizes
    $LLMSERVE_HOME/partial/…                    downloads that did not end, to be resumed
    $LLMSERVE_HOME/locks/…                      one empty file for each thing that one process does at a time

Invariants: a blob appears under its name only when it is complete and on disk (written aside, fsync, rename), a view
only with all its files; the index is replaced in one step; nothing in the store changes once it is there.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import IO

import msgspec

from llmserve.errors import CheckpointError

Progress = Callable[[str, int, int], None]
"""Told `(phase, done, total)`; both counts in bytes, total 0 when unknown."""

_CHUNK_BYTES = 4 << 20
_SPARE_BYTES = 64 << 20
_LOCK_POLL_S = 0.1


class StoredFile(msgspec.Struct, frozen=True):
    """A file of a version."""

    sha256: str
    num_bytes: int


class StoredVersion(msgspec.Struct, frozen=True):
    """One pulled version. `entry` is what is opened, relative to the version's folder; empty for the folder itself."""

    source: str
    entry: str
    files: dict[str, StoredFile]
    url: str = ""
    """Where the files came from; of a repository, what a file's name is appended to."""
    commit: str = ""
    """Of a repository: 40 hexadecimal digits."""


class _Index(msgspec.Struct):
    latest: str = ""
    versions: dict[str, StoredVersion] = {}
    references: dict[str, str] = {}
    """What stood for a version when it was pulled, such as a branch."""


class Store:
    """The store under one home folder. Several processes may use it at once."""

    def __init__(self, home: Path | None = None) -> None:
        self.home = home or Path(os.environ.get("LLMSERVE_HOME") or "~/.llmserve").expanduser()

    def find(self, model: str, version: str = "") -> Path | None:
        """Path of a pulled version (the latest one when none is named), or None if it is not there in full."""
        index = self._read_index(model)
        stored = index.versions.get(version or index.latest)
        if stored is None:
            return None
        folder = self._view(model, version or index.latest)
        complete = all(_has_size(folder / name, file.num_bytes) for name, file in stored.files.items())
        return folder / stored.entry if complete else None

    def find_reference(self, model: str, reference: str) -> Path | None:
        """Path of the version that `reference` stood for when it was last pulled, or None."""
        version = self._read_index(model).references.get(reference)
        return self.find(model, version) if version else None

    def sha256_of(self, path: Path, stat: os.stat_result) -> str | None:
        """The digest of a file of a view, of which `stat` was taken; None where the store cannot vouch for it.

        It can while size and time say that nobody wrote to the file after it was pulled.
        """
        try:
            model, version, *rest = path.absolute().relative_to(self.home.absolute() / "views").parts
            pulled = (self.home / "views" / model / "index.json").stat()
        except (ValueError, OSError):
            return None
        stored = self._read_index(model).versions.get(version)
        file = stored.files.get("/".join(rest)) if stored is not None else None
        untouched = file is not None and stat.st_size == file.num_bytes and stat.st_mtime_ns <= pulled.st_mtime_ns
        return file.sha256 if file is not None and untouched else None

    def add_version(self, model: str, version: str, stored: StoredVersion, references: Sequence[str] = ()) -> Path:
        """Link a version's blobs into its view, make it the latest one, return the path to open.

        Each of `references` stands for this version from now on.
        """
        folder = self._view(model, version)
        with self.scratch() as scratch:
            if not folder.exists():
                self._link_files(scratch / "view", stored)
                folder.parent.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(OSError):  # another process has just done it
                    os.rename(scratch / "view", folder)
            self._link_files(folder, stored)  # where a view lost files
            with self.lock(f"index {model}"):
                index = self._read_index(model)
                named = {**index.references, **dict.fromkeys(references, version)}
                index = _Index(version, {**index.versions, version: stored}, named)
                (scratch / "index.json").write_bytes(msgspec.json.format(msgspec.json.encode(index)))
                os.replace(scratch / "index.json", folder.parent / "index.json")
        return folder / stored.entry

    def add_blob(self, stream: IO[bytes], on_bytes: Callable[[int], None], *, sha256: str = "") -> StoredFile:
        """Copy a stream into the store, hashing on the way. `on_bytes` is told the size of each chunk.

        Raises `CheckpointError`, and stores nothing, if `sha256` is given and the stream's is another.
        """
        digest, num_bytes = hashlib.sha256(), 0
        with self.scratch() as scratch:
            with (scratch / "blob").open("wb") as out:
                while chunk := stream.read(_CHUNK_BYTES):
                    digest.update(chunk)
                    out.write(chunk)
                    num_bytes += len(chunk)
                    on_bytes(len(chunk))
            stored = StoredFile(digest.hexdigest(), num_bytes)
            if sha256 and stored.sha256 != sha256:
                raise CheckpointError(f"its sha256 is {stored.sha256}, it should be {sha256}")
            self.publish(scratch / "blob", stored)
        return stored

    def publish(self, path: Path, file: StoredFile) -> None:
        """Make a complete file of this file system, whose hash is known, the blob of its content."""
        target = self._blob(file.sha256)
        if _has_size(target, file.num_bytes):
            path.unlink()
            return
        with path.open("rb") as written:
            os.fsync(written.fileno())
            os.fchmod(written.fileno(), 0o444)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(path, target)
        _sync_folder(target.parent)

    def find_blob(self, sha256: str, num_bytes: int | None) -> StoredFile | None:
        """The blob of a content, if it is there; one of unknown size is read, lest it was shortened."""
        path = self._blob(sha256)
        if num_bytes is not None:
            return StoredFile(sha256, num_bytes) if _has_size(path, num_bytes) else None
        try:
            with path.open("rb") as stream:
                intact = hashlib.file_digest(stream, "sha256").hexdigest() == sha256
                return StoredFile(sha256, os.fstat(stream.fileno()).st_size) if intact else None
        except FileNotFoundError:
            return None

    def partial(self, key: str) -> Path:
        """Where the download `key` (of hexadecimal digits) is written until it is complete."""
        folder = self.home / "partial"
        folder.mkdir(parents=True, exist_ok=True)
        return folder / key

    @contextlib.contextmanager
    def lock(self, what: str, on_wait: Callable[[], None] | None = None) -> Iterator[None]:
        """Let one process at a time do `what`; the system releases the lock of a process that dies.

        `on_wait` is called while another one has it.
        """
        folder = self.home / "locks"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / hashlib.blake2b(what.encode(), digest_size=16).hexdigest()
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            while not _try_lock(descriptor):
                if on_wait is not None:
                    on_wait()
                time.sleep(_LOCK_POLL_S)
            yield
        finally:
            os.close(descriptor)

    def check_space(self, num_bytes: int) -> None:
        """Raise `CheckpointError` if `num_bytes` more would not fit."""
        self.home.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.home).free
        if free < num_bytes + _SPARE_BYTES:
            needed, left = (num_bytes + _SPARE_BYTES) >> 20, free >> 20
            raise CheckpointError(f"{self.home}: {needed} MiB are needed and {left} MiB are free (see LLMSERVE_HOME)")

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A temporary folder on the store's own file system, removed afterwards."""
        (self.home / "tmp").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.home / "tmp") as name:
            yield Path(name)

    def _link_files(self, folder: Path, stored: StoredVersion) -> None:
        for name, file in stored.files.items():
            _link(self._blob(file.sha256), folder / safe_relative(name))

    def _blob(self, sha256: str) -> Path:
        return self.home / "blobs" / "sha256" / sha256[:2] / sha256

    def _view(self, model: str, version: str) -> Path:
        return self.home / "views" / model / version

    def _read_index(self, model: str) -> _Index:
        path = self.home / "views" / model / "index.json"
        try:
            return msgspec.json.decode(path.read_bytes(), type=_Index)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            return _Index()  # never pulled, or a damaged index: pull again


def safe_relative(name: str) -> str:
    """`name` if it is a plain relative path. Raises `CheckpointError` for anything that could leave its folder."""
    path = PurePosixPath(name)
    unsafe = path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name
    if unsafe or not path.parts or str(path) != name:
        raise CheckpointError(f"the file name {name!r} is not a plain relative path")
    return name


def _has_size(path: Path, num_bytes: int) -> bool:
    try:
        return path.stat().st_size == num_bytes
    except OSError:
        return False


def _link(blob: Path, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.samefile(blob):
        return
    path.unlink(missing_ok=True)
    try:
        os.link(blob, path)
    except FileExistsError:
        return  # another process pulls the same content
    except OSError:
        shutil.copyfile(blob, path)  # a file system without hard links


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
