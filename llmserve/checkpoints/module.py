"""A quantized linear layer of a Hugging Face folder: its tensors, checked, and the weight they make.

Invariant: opening looks at shapes, types and activation orders; the weight's bytes are made when they are read, each
time, and kept by whoever read them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from llmserve.checkpoints.dequantize import dequantize
from llmserve.checkpoints.dtypes import num_bytes
from llmserve.checkpoints.packing import ROW_STEP, IntegerWeight, pack
from llmserve.checkpoints.safetensors import FLOATS, Located
from llmserve.errors import CheckpointError
from llmserve.types import CheckpointTensor

_NUMPY: Final = {"I8": "<i1", "I32": "<i4", "I64": "<i8"}


class ConvertedTensor(CheckpointTensor):
    """A tensor whose bytes no file holds: reading `data` converts it. A copy made by `replace` holds its bytes.

    In place of bytes it is given what makes those of some rows, the first of which is a multiple of `ROW_STEP`.
    """

    __slots__ = ("_source",)
    _source: memoryview | Callable[[slice], memoryview]

    def __init__(
        self,
        name: str,
        dtype: str,
        shape: tuple[int, ...],
        data: memoryview | Callable[[slice], memoryview],
        order: tuple[int, ...] | None = None,
    ) -> None:
        values = {"name": name, "dtype": dtype, "shape": shape, "_source": data, "order": order}
        for field_, value in values.items():
            object.__setattr__(self, field_, value)

    @property
    def data(self) -> memoryview:
        """The bytes in the form that `dtype` names. Raises `CheckpointError` where it cannot hold the weight."""
        return self.rows(0, self.shape[0])

    def rows(self, first: int, last: int) -> memoryview:
        """The same of the rows from `first` to before `last`."""
        source = self._source
        start = first // ROW_STEP * ROW_STEP
        data = source if isinstance(source, memoryview) else source(slice(start, last))
        row_bytes = num_bytes(self.dtype, (1, self.shape[1]))
        skipped = first if isinstance(source, memoryview) else first - start
        return data[skipped * row_bytes : (skipped + last - first) * row_bytes]


@dataclass(frozen=True, slots=True)
class Module:
    """One linear layer as its file names it, e.g. `model.layers.0.self_attn.q_proj`."""

    name: str
    parts: Mapping[str, Located]
    """What follows the name → the tensor, e.g. `qweight`."""

    def fail(self, part: str, what: str) -> CheckpointError:
        located = self.parts.get(part) or next(iter(self.parts.values()))
        return CheckpointError(f"{located.file.path}: tensor {self.name}.{part} {what}")

    def matrix(self, part: str, dtype: str) -> tuple[int, int]:
        """Shape of a tensor with two axes."""
        located = self._take(part, (dtype,))
        if len(located.shape) != 2:
            raise self.fail(part, f"has shape {list(located.shape)}, expected a matrix")
        return located.shape[0], located.shape[1]

    def integers(self, part: str, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
        """The tensor itself, not copied."""
        located = self._take(part, (dtype,), shape)
        return np.frombuffer(located.data, _NUMPY[dtype]).reshape(shape)

    def floats(self, part: str, shape: tuple[int, ...]) -> Callable[[], NDArray[np.float32]]:
        """What makes its float32 values."""
        located = self._take(part, FLOATS, shape)
        tensor = CheckpointTensor(f"{self.name}.{part}", located.dtype, shape, located.data)
        return lambda: dequantize(tensor)

    def group(self, part: str, columns: int, group_size: int) -> int:
        """Length of the groups of a row of `columns`; -1 is the whole row."""
        group = columns if group_size == -1 else group_size
        if columns % group or group % 32:
            of = "32" if group_size == -1 else f"the group size {group_size}"
            raise self.fail(part, f"is of {columns} inputs, which are not a multiple of {of}")
        return group

    def _take(self, part: str, dtypes: tuple[str, ...], shape: tuple[int, ...] | None = None) -> Located:
        located = self.parts.get(part)
        if located is None:
            raise self.fail(part, "is missing")
        if located.dtype not in dtypes:
            raise self.fail(part, f"is of type {located.dtype}, expected {' or '.join(dtypes)}")
        if shape is not None and located.shape != shape:
            raise self.fail(part, f"has shape {list(located.shape)}, expected {list(shape)}")
        return located


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """What a format makes of a module."""

    dtype: str
    shape: tuple[int, int]
    part: str
    """The tensor that errors name."""
    load: Callable[[], IntegerWeight]
    order: tuple[int, ...] | None = None

    def tensor(self, name: str, module: Module) -> CheckpointTensor:
        def convert(rows: slice) -> memoryview:
            return pack(self.dtype, self.shape[1], rows, self.load(), fail=lambda what: module.fail(self.part, what))

        return ConvertedTensor(name, self.dtype, self.shape, convert, self.order)


class Quantization(Protocol):
    """How one format stores linear layers, as its configuration says."""

    @property
    def parts(self) -> frozenset[str]:
        """Names of the tensors that a quantized layer consists of. `weight` is one of them if it is of integers."""
        ...

    def read(self, module: Module) -> QuantizedWeight:
        """Raises `CheckpointError` naming the tensor that does not fit."""
        ...


@dataclass(slots=True)
class Orders:
    """Activation orders by group index; layers with the same input share one."""

    _known: dict[bytes, tuple[int, ...]] = field(default_factory=dict)

    def of(self, module: Module, part: str, index: NDArray[np.int32], group: int) -> tuple[int, ...] | None:
        """Columns sorted by group; None where they are in that order already. `index` says each column's group."""
        columns = len(index)
        if index.min() < 0 or index.max() >= columns // group:
            raise module.fail(part, f"has groups from {index.min()} to {index.max()}, not 0 to {columns // group - 1}")
        sorted_groups = np.arange(columns, dtype=np.int32) // group
        if np.array_equal(index, sorted_groups):
            return None
        order = np.argsort(index, kind="stable")
        if not np.array_equal(index[order], sorted_groups):
            raise module.fail(part, f"has groups of other lengths than {group}")
        return self._known.setdefault(order.tobytes(), tuple(order.tolist()))
