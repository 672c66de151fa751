"""GGUF version 2 and 3: the header of a file, read over a mapping.

Owns the file format alone: key-values and tensor places, with no knowledge of architectures. Format: the GGUF
specification of the ggml project. Invariants: tensor data is never touched; every number that comes from the file is
checked before it is used as a size or an offset; a bad file raises one-line `CheckpointError`s and nothing else.

    magic "GGUF" | u32 version | u64 num_tensors | u64 num_kv | kv … | tensor info … | padding | data
    kv:          string key | u32 type | value               string: u64 length | bytes
    tensor info: string name | u32 rank | u64 dims… (innermost first) | u32 type | u64 offset into data
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from llmserve.checkpoints.dtypes import BLOCKS, num_bytes
from llmserve.checkpoints.mapping import MappedFile
from llmserve.errors import CheckpointError

MAGIC: Final = b"GGUF"
MAX_RANK: Final = 4
MAX_BYTES: Final = 1 << 62
MAX_INLINE: Final = 4096
"""Arrays longer than this are vocabularies; they are skipped unless asked for."""

_STRING: Final = 8
_ARRAY: Final = 9
_BOOL: Final = 7
_SCALARS: Final = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
_TYPES: Final = {
    0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 6: "q5_0", 7: "q5_1", 8: "q8_0", 10: "q2_k", 11: "q3_k", 12: "q4_k",
    13: "q5_k", 14: "q6_k", 20: "iq4_nl", 23: "iq4_xs", 30: "bf16",
}  # fmt: skip
_OTHER_TYPES: Final = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S",
    24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
    40: "NVFP4", 41: "Q1_0",
}  # fmt: skip

_SUPPORTED: Final = ", ".join(dtype for dtype in BLOCKS if dtype in _TYPES.values())

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_unpack_u64 = _U64.unpack_from


@dataclass(frozen=True, slots=True)
class SkippedArray:
    """Stands for a long array that was stepped over."""

    length: int


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where a tensor lies. `start` counts from the beginning of the file, in bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    """Row-major: the reverse of the file's order."""
    start: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Header:
    """All that precedes the tensor data."""

    version: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]


class _Cursor:
    """A bounded read position in the mapping. Every step checks that the bytes are there."""

    __slots__ = ("map", "path", "position", "size")

    def __init__(self, file: MappedFile) -> None:
        self.map: mmap.mmap = file.map
        self.path: Path = file.path
        self.size: int = file.size
        self.position: int = 0

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: not a usable GGUF file: {what}")

    def take(self, length: int, what: str) -> int:
        """Step over `length` bytes and return where they start."""
        start = self.position
        if length > self.size - start:
            raise self.fail(f"{what} at byte {start} runs past the end of the file ({self.size} bytes)")
        self.position = start + length
        return start

    def u32(self, what: str) -> int:
        return int(_U32.unpack_from(self.map, self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(_U64.unpack_from(self.map, self.take(8, what))[0])

    def string(self, what: str) -> str:
        length = self.u64(f"the length of {what}")
        start = self.take(length, what)
        try:
            return str(self.map[start : start + length], "utf-8")
        except UnicodeDecodeError as error:
            raise self.fail(f"{what} at byte {start} is not UTF-8") from error

    def count(self, number: int, min_bytes: int, what: str) -> int:
        """Refuse a count of items that could not fit into the rest of the file, before looping over them."""
        if number * min_bytes > self.size - self.position:
            raise self.fail(f"it claims {number} {what}, more than its {self.size} bytes can hold")
        return number


def read_header(file: MappedFile, *, vocabulary: bool, tensors: bool = True) -> Header:
    """Read the header of a mapped GGUF file.

    `vocabulary`: decode long arrays (as lists) instead of leaving a `SkippedArray`. `tensors`: read the tensor places
    too. Raises `CheckpointError` for whatever is wrong with the file.
    """
    cursor = _Cursor(file)
    version, num_tensors, num_kv = _read_prefix(cursor)
    metadata: dict[str, Any] = {}
    for _ in range(num_kv):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise cursor.fail(f"metadata key {key!r} appears twice")
        metadata[key] = _read_value(cursor, key, cursor.u32(f"the type of {key!r}"), vocabulary=vocabulary)
    if not tensors:
        return Header(version, metadata, {})
    return Header(version, metadata, _read_tensors(cursor, num_tensors, _alignment(cursor, metadata)))


def _read_prefix(cursor: _Cursor) -> tuple[int, int, int]:
    start = cursor.take(4, "the magic number")
    if cursor.map[start : start + 4] != MAGIC:
        raise CheckpointError(f"{cursor.path}: not a GGUF file (its first bytes are not 'GGUF')")
    version = cursor.u32("the version")
    if version not in (2, 3):
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        kind = "a big-endian file" if swapped in (2, 3) else f"version {version}"
        raise cursor.fail(f"{kind} is not supported; supported: little-endian versions 2 and 3")
    num_tensors, num_kv = cursor.u64("the number of tensors"), cursor.u64("the number of metadata entries")
    cursor.count(num_kv, 13, "metadata entries")
    cursor.count(num_tensors, 32, "tensors")
    return version, num_tensors, num_kv


def _read_value(cursor: _Cursor, key: str, kind: int, *, vocabulary: bool) -> Any:
    if kind == _STRING:
        return cursor.string(f"the value of {key!r}")
    if kind == _ARRAY:
        return _read_array(cursor, key, vocabulary=vocabulary)
    code = _SCALARS.get(kind)
    if code is None:
        raise cursor.fail(f"metadata {key!r} has the unknown type {kind}")
    (value,) = struct.unpack_from("<" + code, cursor.map, cursor.take(struct.calcsize(code), f"the value of {key!r}"))
    return bool(value) if kind == _BOOL else value


def _read_array(cursor: _Cursor, key: str, *, vocabulary: bool) -> Any:
    kind, length = cursor.u32(f"the type of {key!r}"), cursor.u64(f"the length of {key!r}")
    wanted = vocabulary or length <= MAX_INLINE
    if kind == _STRING:
        cursor.count(length, 8, f"strings in {key!r}")
        return _read_strings(cursor, key, length) if wanted else _skip_strings(cursor, key, length)
    code = _SCALARS.get(kind)
    if code is None:
        raise cursor.fail(f"array {key!r} has elements of type {kind}, which are not supported")
    cursor.count(length, struct.calcsize(code), f"numbers in {key!r}")
    start = cursor.take(length * struct.calcsize(code), f"array {key!r}")
    if not wanted:
        return SkippedArray(length)
    values = list(struct.unpack_from(f"<{length}{code}", cursor.map, start))
    return [bool(value) for value in values] if kind == _BOOL else values


def _skip_strings(cursor: _Cursor, key: str, length: int) -> SkippedArray:
    # The hot loop of the engine's start: one addition per vocabulary entry, the bounds are checked by unpack_from.
    data, position = cursor.map, cursor.position
    try:
        for _ in range(length):
            position += 8 + _unpack_u64(data, position)[0]
    except (struct.error, OverflowError) as error:
        raise cursor.fail(f"array {key!r} runs past the end of the file ({cursor.size} bytes)") from error
    cursor.take(position - cursor.position, f"array {key!r}")
    return SkippedArray(length)


def _read_strings(cursor: _Cursor, key: str, length: int) -> list[str]:
    data, position, values = cursor.map, cursor.position, []
    try:
        for _ in range(length):
            start = position + 8
            position = start + _unpack_u64(data, position)[0]
            values.append(str(data[start:position], "utf-8"))
    except UnicodeDecodeError as error:
        raise cursor.fail(f"entry {len(values)} of {key!r} is not UTF-8") from error
    except (struct.error, OverflowError, IndexError) as error:
        raise cursor.fail(f"array {key!r} runs past the end of the file ({cursor.size} bytes)") from error
    cursor.take(position - cursor.position, f"array {key!r}")
    return values


def _alignment(cursor: _Cursor, metadata: dict[str, Any]) -> int:
    value = metadata.get("general.alignment", 32)
    if not isinstance(value, int) or value < 1 or value > 1 << 20 or value & (value - 1):
        raise cursor.fail(f"general.alignment is {value!r}, not a power of two")
    return value


def _read_tensors(cursor: _Cursor, num_tensors: int, alignment: int) -> dict[str, TensorInfo]:
    raw: dict[str, tuple[str, tuple[int, ...], int]] = {}
    cursor.count(num_tensors, 32, "tensors")
    for _ in range(num_tensors):
        name = cursor.string("a tensor name")
        if name in raw:
            raise cursor.fail(f"tensor {name} appears twice")
        raw[name] = _read_tensor_info(cursor, name)
    base = -(-cursor.position // alignment) * alignment
    return {name: _place(cursor, name, info, base=base, alignment=alignment) for name, info in raw.items()}


def _read_tensor_info(cursor: _Cursor, name: str) -> tuple[str, tuple[int, ...], int]:
    rank = cursor.u32(f"the rank of tensor {name}")
    if not 1 <= rank <= MAX_RANK:
        raise cursor.fail(f"tensor {name} has {rank} dimensions (1 to {MAX_RANK} are possible)")
    dims = struct.unpack_from(f"<{rank}Q", cursor.map, cursor.take(8 * rank, f"the shape of tensor {name}"))
    kind = cursor.u32(f"the type of tensor {name}")
    offset = cursor.u64(f"the offset of tensor {name}")
    dtype = _TYPES.get(kind)
    if dtype is None:
        label = f"type {_OTHER_TYPES.get(kind, f'number {kind}')}"
        raise CheckpointError(f"{cursor.path}: {label} is not supported yet (tensor {name}); supported: {_SUPPORTED}")
    return dtype, dims[::-1], offset


def _place(
    cursor: _Cursor, name: str, info: tuple[str, tuple[int, ...], int], *, base: int, alignment: int
) -> TensorInfo:
    dtype, shape, offset = info
    size = num_bytes(dtype, shape)
    if min(shape) < 1 or size > MAX_BYTES:
        raise cursor.fail(f"tensor {name} has the impossible shape {list(shape)}")
    if shape[-1] % BLOCKS[dtype][0]:
        raise cursor.fail(f"tensor {name}: rows of {shape[-1]} are not whole blocks of {dtype}")
    if offset % alignment:
        raise cursor.fail(f"tensor {name}: its offset {offset} is not a multiple of {alignment}")
    if base + offset + size > cursor.size:
        raise cursor.fail(
            f"tensor {name} ends at byte {base + offset + size}, the file has {cursor.size} (truncated download?)"
        )
    return TensorInfo(name, dtype, shape, base + offset, size)
