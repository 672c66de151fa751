"""An image: the packed weights of one network as a file that processes map and share.

    magic | u32 length of the header | blake2b-64 of the header | header as JSON … 2 MiB | matrices, one after the other

Invariants: a file is used only when its header is whole, says what was asked for, its size fits and the checksum of
every matrix holds; an image is never changed once it has its name. The matrices begin at 2 MiB, so that the page cache
can map them by pages of that size.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

MAGIC: Final = b"llmsimg1"
DATA_OFFSET: Final = 2 << 20
_PREFIX: Final = struct.Struct("<8sI8s")


class ImageHeader(msgspec.Struct, frozen=True, kw_only=True):
    """What an image says of itself."""

    layout_version: int
    key: str
    """See `image_key`."""
    num_bytes: int
    """Of all matrices."""
    checksums: tuple[int, ...]
    """One for each matrix."""


class DamagedImage(Exception):
    """The file is not the image it should be; `str()` says why."""


@dataclass(slots=True)
class PackedImage:
    """An open image. While the descriptor is open it holds a shared lock: who makes room leaves the file alone."""

    path: Path
    descriptor: int
    header: ImageHeader

    def close(self) -> None:
        """Give up the lock. Mappings of the file stay valid."""
        if self.descriptor >= 0:
            os.close(self.descriptor)
        self.descriptor = -1

    def __del__(self) -> None:
        self.close()


def image_key(parts: Sequence[object]) -> str:
    """Name of the image that has these properties: the checkpoint, the layout and the plan of matrices."""
    return hashlib.blake2b(msgspec.json.encode(parts), digest_size=20).hexdigest()


def open_image(path: Path, *, key: str, layout_version: int, num_bytes: int) -> PackedImage | None:
    """The image at `path`, locked; None if there is none.

    Raises `DamagedImage` for anything else that lies there, `OSError` for what cannot be read. The matrices themselves
    are for the caller to check.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH)
        header = _read_header(descriptor)
        if (header.layout_version, header.key, header.num_bytes) != (layout_version, key, num_bytes):
            raise DamagedImage("it is of other weights or another layout")
        size = os.fstat(descriptor).st_size
        if size != DATA_OFFSET + num_bytes:
            raise DamagedImage(f"it has {size} bytes instead of {DATA_OFFSET + num_bytes}")
        if os.fstat(descriptor).st_uid not in (0, os.geteuid()):
            raise DamagedImage("it belongs to another user")
    except BaseException:
        os.close(descriptor)
        raise
    return PackedImage(path, descriptor, header)


def write_header(descriptor: int, header: ImageHeader) -> None:
    """Write what precedes the matrices."""
    text = msgspec.json.encode(header)
    block = _PREFIX.pack(MAGIC, len(text), _digest(text)) + text
    assert len(block) <= DATA_OFFSET, "tens of thousands of matrices"
    if os.pwrite(descriptor, block, 0) != len(block):
        raise OSError("the header of an image could not be written in full")


def _read_header(descriptor: int) -> ImageHeader:
    prefix = os.pread(descriptor, _PREFIX.size, 0)
    if len(prefix) < _PREFIX.size or not prefix.startswith(MAGIC):
        raise DamagedImage("it is not an image of packed weights")
    _, length, digest = _PREFIX.unpack(prefix)
    text = os.pread(descriptor, min(length, DATA_OFFSET), _PREFIX.size)
    if len(text) != length or _digest(text) != digest:
        raise DamagedImage("its header is damaged")
    try:
        return msgspec.json.decode(text, type=ImageHeader)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise DamagedImage("its header is of another version") from error


def _digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=8).digest()
