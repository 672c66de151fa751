"""`open_checkpoint`: a GGUF file or a Hugging Face folder as configuration plus tensors by canonical name.

Invariants: opening reads headers only, and activation orders; tensor bytes stay in the mapped files, those of quantized
layers in safetensors are made of them when they are read; a checkpoint that opens has consistent shapes and no tensor
whose meaning is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from llmserve.checkpoints import gguf, gguf_config, hf_config, names, safetensors
from llmserve.checkpoints.dtypes import num_bytes
from llmserve.checkpoints.identity import checkpoint_id
from llmserve.checkpoints.mapping import MappedFile
from llmserve.checkpoints.shapes import check_biases, check_shapes
from llmserve.config import ModelConfig
from llmserve.errors import CheckpointError, ModelNotFound
from llmserve.types import CheckpointTensor

if TYPE_CHECKING:
    from llmserve.checkpoints.quantized import QuantizedLayers


class Checkpoint(Protocol):
    """An opened checkpoint. Tensors are views of mapped files, or made of such views when they are read."""

    @property
    def config(self) -> ModelConfig: ...

    @property
    def tensors(self) -> Mapping[str, CheckpointTensor]:
        """By canonical name (see `checkpoints.names`)."""
        ...

    @property
    def path(self) -> Path: ...

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors in the forms they are read in."""
        ...

    @property
    def identity(self) -> str:
        """Changes with the content of its files."""
        ...

    def release_pages(self) -> None:
        """Give the pages of the files back to the system, once weights are packed; tensors stay readable."""
        ...

    def close(self) -> None:
        """Forget the tensors. A mapping goes when the last tensor taken from it does."""
        ...


@dataclass(slots=True)
class FileCheckpoint:
    """The one implementation: any number of mapped files."""

    path: Path
    config: ModelConfig
    tensors: dict[str, CheckpointTensor]
    files: list[MappedFile] = field(repr=False)

    @property
    def total_bytes(self) -> int:
        return sum(num_bytes(tensor.dtype, tensor.shape) for tensor in self.tensors.values())

    @property
    def identity(self) -> str:
        return checkpoint_id(self.files)

    def release_pages(self) -> None:
        for file in self.files:
            file.release_pages()

    def close(self) -> None:
        self.tensors = {}
        for file in self.files:
            file.close()
        self.files = []


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a GGUF file, or a folder with `config.json` and `*.safetensors`.

    Raises `ModelNotFound` if there is nothing at `path`, `CheckpointError` if it is broken or not supported.
    """
    if not path.exists():
        raise ModelNotFound(f"{path}: no such file or folder")
    files: list[MappedFile] = []
    try:
        return _open_folder(path, files) if path.is_dir() else _open_gguf(path, files)
    except BaseException:
        for file in files:
            file.close()
        raise


def _open_gguf(path: Path, files: list[MappedFile]) -> FileCheckpoint:
    file = MappedFile(path)
    files.append(file)
    header = gguf.read_header(file, vocabulary=False)
    config = gguf_config.model_config(file, header)
    tensors: dict[str, CheckpointTensor] = {}
    for info in header.tensors.values():
        name = names.from_gguf(info.name)
        if name is None:
            raise CheckpointError(f"{path}: tensor {info.name} is not known to architecture {config.architecture}")
        data = file.data[info.start : info.start + info.num_bytes]
        tensors[name] = CheckpointTensor(name, info.dtype, info.shape, data)
    check_shapes(path, config, tensors)
    check_biases(path, config, tensors)
    return FileCheckpoint(path, config, tensors, files)


def _open_folder(path: Path, files: list[MappedFile]) -> FileCheckpoint:
    values = read_config(path)
    config = hf_config.model_config(values, path / "config.json")
    quantized = _quantized_layers(values, path / "config.json")
    stored = safetensors.read_folder(path, files)
    tensors = {} if quantized is None else quantized.take(stored)
    for source, located in stored.items():
        name = names.from_hf(source)
        if name is None and names.is_ignored_hf(source):
            continue
        if name is None:
            raise CheckpointError(f"{path}: tensor {source} is not known to architecture {config.architecture}")
        if located.dtype not in safetensors.FLOATS:
            raise safetensors.unsupported_type(located.file.path, source, located.dtype)
        tensors[name] = CheckpointTensor(name, located.dtype, located.shape, located.data)
    if config.tie_word_embeddings:
        tensors.pop("head", None)  # some exporters store the shared matrix twice
    check_shapes(path, config, tensors)
    biases = hf_config.bias_parts(values, path / "config.json")
    if quantized is not None:
        quantized.drop_idle_biases(tensors, biases)
    check_biases(path, config, tensors, biases)
    return FileCheckpoint(path, config, tensors, files)


def _quantized_layers(values: Mapping[str, Any], path: Path) -> QuantizedLayers | None:
    found = values.get("quantization_config")
    if found is None:
        return None
    from llmserve.checkpoints.quantized import open_quantization  # brings NumPy, which a frontend does without

    return open_quantization(found, path)


def read_config(folder: Path) -> dict[str, Any]:
    """`config.json` of a folder."""
    path = folder / "config.json"
    if not path.exists():
        found = sorted(folder.glob("*.gguf"))
        hint = f"; did you mean {found[0]}?" if found else ""
        raise CheckpointError(f"{folder}: no config.json in this folder{hint}")
    values: dict[str, Any] = safetensors.decode_json(path, path.read_bytes(), dict[str, Any])
    return values
