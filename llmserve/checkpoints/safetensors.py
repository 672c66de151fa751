"""Safetensors: the tensors of a Hugging Face folder, over mappings.

Owns the file format and the sharding index. An own parser, because the `safetensors` package copies and cannot give
bf16 to NumPy. Invariants: zero copies; every offset is checked against shape, type and file size; no two tensors
overlap.

    u64 header length | JSON {name: {dtype, shape, data_offsets: [begin, end)}} | data
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Final

import msgspec

from llmserve.checkpoints.dtypes import num_bytes
from llmserve.checkpoints.mapping import MappedFile
from llmserve.errors import CheckpointError

INDEX_NAME: Final = "model.safetensors.index.json"
MAX_HEADER_BYTES: Final = 100_000_000
FLOATS: Final = ("f32", "f16", "bf16")
INTEGERS: Final = ("I8", "I32", "I64")
"""Types that quantized layers consist of, as the format names them."""
_TYPES: Final = {name.upper(): name for name in FLOATS} | {name: name for name in INTEGERS}
_INTEGER_BYTES: Final = {"I8": 1, "I32": 4, "I64": 8}


class _Entry(msgspec.Struct):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


@dataclass(frozen=True, slots=True)
class Located:
    """A tensor of the file it lies in. `start` counts from the beginning of the file, in bytes."""

    file: MappedFile
    dtype: str
    shape: tuple[int, ...]
    start: int
    num_bytes: int

    @property
    def data(self) -> memoryview:
        return self.file.data[self.start : self.start + self.num_bytes]


def decode_json(path: Path, data: bytes | memoryview, kind: Any) -> Any:
    """JSON of a given type. Raises `CheckpointError` with one line."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path}: not usable JSON: {' '.join(str(error).split())}") from error


def unsupported_type(path: Path, name: str, dtype: str) -> CheckpointError:
    """The error of a tensor that is not of floats, though it is not part of a quantized layer either."""
    supported = ", ".join(name.upper() for name in FLOATS)
    return CheckpointError(f"{path}: type {dtype} is not supported yet (tensor {name}); supported: {supported}")


def read_folder(folder: Path, files: list[MappedFile]) -> dict[str, Located]:
    """All tensors of a folder by the names in its files. Opens mappings into `files`, which the caller closes."""
    wanted = _weight_map(folder)
    tensors: dict[str, Located] = {}
    for path in _shards(folder, wanted):
        file = MappedFile(path)
        files.append(file)
        for name, located in _read_file(file).items():
            if wanted is not None and wanted.get(name) != path.name:
                continue
            tensors[name] = located
    if wanted is not None and (missing := sorted(wanted.keys() - tensors.keys())):
        raise CheckpointError(f"{folder / INDEX_NAME}: tensor {missing[0]} is not in {wanted[missing[0]]}")
    return tensors


def _weight_map(folder: Path) -> dict[str, str] | None:
    path = folder / INDEX_NAME
    if not path.exists():
        return None
    weight_map: dict[str, str] = decode_json(path, path.read_bytes(), _Index).weight_map
    for name in weight_map.values():
        if PurePosixPath(name).name != name or "\\" in name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{path}: {name!r} is not the name of a safetensors file in this folder")
    return weight_map


def _shards(folder: Path, weight_map: dict[str, str] | None) -> list[Path]:
    if weight_map is not None:
        return [folder / name for name in sorted(set(weight_map.values()))]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    found = sorted(folder.glob("*.safetensors"))
    if len(found) > 1:
        raise CheckpointError(f"{folder}: several *.safetensors files and no {INDEX_NAME}")
    if not found:
        pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt"))
        hint = "; pickled weights (.bin, .pt) are never loaded" if pickled else ""
        raise CheckpointError(f"{folder}: no *.safetensors file{hint}")
    return found


def _read_file(file: MappedFile) -> dict[str, Located]:
    if file.size < 8:
        raise CheckpointError(f"{file.path}: not a safetensors file: it has {file.size} bytes")
    (length,) = struct.unpack_from("<Q", file.data)
    if length > min(MAX_HEADER_BYTES, file.size - 8):
        raise CheckpointError(f"{file.path}: its header claims {length} bytes, the file has {file.size} (truncated?)")
    raw = decode_json(file.path, file.data[8 : 8 + length], dict[str, msgspec.Raw])
    raw.pop("__metadata__", None)
    tensors = {}
    for name, value in raw.items():
        tensors[name] = _locate(file, name, decode_json(file.path, bytes(value), _Entry), 8 + length)
    _check_overlap(file, tensors)
    return tensors


def _locate(file: MappedFile, name: str, entry: _Entry, base: int) -> Located:
    dtype = _TYPES.get(entry.dtype)
    if dtype is None:
        raise unsupported_type(file.path, name, entry.dtype)
    if any(size < 1 for size in entry.shape):
        raise CheckpointError(f"{file.path}: tensor {name} has the impossible shape {entry.shape}")
    shape, (begin, end) = tuple(entry.shape), entry.data_offsets
    size = math.prod(shape) * _INTEGER_BYTES[dtype] if dtype in INTEGERS else num_bytes(dtype, shape)
    if begin < 0 or end - begin != size:
        raise CheckpointError(
            f"{file.path}: tensor {name} of {entry.dtype} {entry.shape} needs {size} bytes, not [{begin}, {end})"
        )
    if base + end > file.size:
        raise CheckpointError(
            f"{file.path}: tensor {name} ends at byte {base + end}, the file has {file.size} (truncated download?)"
        )
    return Located(file, dtype, shape, base + begin, size)


def _check_overlap(file: MappedFile, tensors: dict[str, Located]) -> None:
    end, last = 0, ""
    for name, located in sorted(tensors.items(), key=lambda item: item[1].start):
        if located.start < end:
            raise CheckpointError(f"{file.path}: tensors {last} and {name} overlap")
        end, last = located.start + located.num_bytes, name
