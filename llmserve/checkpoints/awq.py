"""AWQ: `quant_method: awq`, version `gemm`, of 4 bits with zero points.

For a linear layer of K inputs and N outputs, with the lowest bits of a word first:

    qweight  int32 [K, N / 8]        codes of eight outputs: 0, 2, 4, 6, 1, 3, 5, 7
    qzeros   int32 [groups, N / 8]   their zero points in the same order
    scales   float [groups, N]       in plain order
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from llmserve.checkpoints.fields import Fields
from llmserve.checkpoints.gptq import group_size_of
from llmserve.checkpoints.module import Module, QuantizedWeight
from llmserve.checkpoints.packing import IntegerWeight, form_of, unpack

_PLACES: Final = np.argsort([0, 2, 4, 6, 1, 3, 5, 7])
"""Where in a word each of its eight outputs is."""


@dataclass(frozen=True, slots=True)
class Awq:
    """See `Quantization`."""

    group_size: int
    parts: frozenset[str] = frozenset({"qweight", "qzeros", "scales"})

    def read(self, module: Module) -> QuantizedWeight:
        columns, words = module.matrix("qweight", "I32")
        rows = words * 8
        group = module.group("qweight", columns, self.group_size)
        form = form_of(4, symmetric=False, group=group)
        assert form is not None, "Module.group refuses what has none"
        codes = module.integers("qweight", "I32", (columns, words))
        zeros = module.integers("qzeros", "I32", (columns // group, words))
        scales = module.floats("scales", (columns // group, rows))

        def load() -> IntegerWeight:
            return IntegerWeight(
                scales().T,
                _outputs(zeros),
                lambda piece: _outputs(codes[:, piece.start // 8 : -(-piece.stop // 8)])[: piece.stop - piece.start],
            )

        return QuantizedWeight(form, (rows, columns), "scales", load)


def open_awq(fields: Fields) -> Awq:
    """From a `quantization_config`. Raises `CheckpointError` for what is not supported."""
    if (bits := fields.size("bits", 4)) != 4:
        raise fields.fail(f"AWQ of {bits} bits is not supported; supported: 4 bits")
    version = fields.text("version", fields.text("checkpoint_format", fields.text("format", "gemm"))).lower()
    if version != "gemm":
        raise fields.fail(f"AWQ version {version!r} is not supported; supported: gemm")
    if not fields.flag("zero_point", default=True):
        raise fields.fail("AWQ with zero_point false is not supported")
    return Awq(group_size_of(fields))


def _outputs(words: NDArray[np.int32]) -> NDArray[np.uint8]:
    """[n, N / 8] → [N, n]."""
    fields = unpack(words, 4).reshape(len(words), -1, 8)[..., _PLACES]
    return np.ascontiguousarray(fields.reshape(len(words), -1).T)
