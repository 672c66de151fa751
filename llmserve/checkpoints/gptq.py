"""GPTQ: `quant_method: gptq`, as AutoGPTQ and GPTQModel write it, of 4 bits, and of 8 where it is symmetric.

For a linear layer of K inputs and N outputs, with B bits, 32 / B codes a word and the lowest bits first:

    qweight  int32 [K · B / 32, N]   codes of consecutive inputs
    qzeros   int32 [groups, N · B / 32]   zero points of consecutive outputs; format `gptq` stores them minus one
    scales   float [groups, N]
    g_idx    int32 [K]   the group of each input; sorted unless activations were ordered (`desc_act`)

Format `gptq` takes the ones off whole words, so that a zero point of 0 borrows from the next: they are added likewise.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from llmserve.checkpoints.fields import Fields
from llmserve.checkpoints.module import Module, Orders, QuantizedWeight
from llmserve.checkpoints.packing import GROUPS_SAID, IntegerWeight, form_of, unpack

FORMATS: Final = ("gptq", "gptq_v2")
_ONES: Final = {4: 0x11111111, 8: 0x01010101}


@dataclass(frozen=True, slots=True)
class Gptq:
    """See `Quantization`."""

    bits: int
    group_size: int
    symmetric: bool
    ordered: bool
    zeros_are_less_one: bool
    parts: frozenset[str] = frozenset({"qweight", "qzeros", "scales", "g_idx"})
    _orders: Orders = field(default_factory=Orders)

    def read(self, module: Module) -> QuantizedWeight:
        in_word = 32 // self.bits
        words, rows = module.matrix("qweight", "I32")
        columns = words * in_word
        group = module.group("qweight", columns, self.group_size)
        if rows % in_word:
            raise module.fail("qweight", f"is of {rows} outputs, which are not a multiple of {in_word}")
        form = form_of(self.bits, symmetric=self.symmetric, group=group)
        assert form is not None, "open_gptq and Module.group refuse what has none"
        codes = module.integers("qweight", "I32", (words, rows))
        zeros = module.integers("qzeros", "I32", (columns // group, rows // in_word))
        scales = module.floats("scales", (columns // group, rows))
        order = self._order(module, columns, group)
        permutation = None if order is None else np.array(order)
        ones = np.uint32(_ONES[self.bits] if self.zeros_are_less_one else 0)

        def rows_of_codes(piece: slice) -> NDArray[np.uint8]:
            found = unpack(codes[:, piece].T, self.bits)
            return found if permutation is None else found[:, permutation]

        def load() -> IntegerWeight:
            stored = (zeros.view("<u4") + ones).view("<i4")  # wraps
            return IntegerWeight(scales().T, unpack(stored, self.bits).T, rows_of_codes)

        return QuantizedWeight(form, (rows, columns), "scales", load, order)

    def _order(self, module: Module, columns: int, group: int) -> tuple[int, ...] | None:
        if "g_idx" not in module.parts and not self.ordered:
            return None
        return self._orders.of(module, "g_idx", module.integers("g_idx", "I32", (columns,)), group)


def open_gptq(fields: Fields) -> Gptq:
    """From a `quantization_config`. Raises `CheckpointError` for what is not supported."""
    bits, symmetric = fields.size("bits"), fields.flag("sym", default=True)
    if bits not in (4, 8) or (bits == 8 and not symmetric):
        kind = "" if symmetric else " with sym false"
        raise fields.fail(f"GPTQ of {bits} bits{kind} is not supported; supported: 4 bits, and 8 bits with sym true")
    group_size = group_size_of(fields)
    format_ = fields.text("checkpoint_format", fields.text("format", "gptq"))
    if format_ not in FORMATS or fields.flag("is_marlin_format", default=False):
        name = format_ if format_ not in FORMATS else "marlin"
        raise fields.fail(f"checkpoint_format {name!r} is not supported; supported: {', '.join(FORMATS)}")
    if (words := fields.text("pack_dtype", "int32")) != "int32":
        raise fields.fail(f"pack_dtype {words!r} is not supported; supported: int32")
    dynamic = fields.values.get("dynamic") or {}
    if not isinstance(dynamic, dict) or any(not str(rule).startswith("-:") for rule in dynamic):
        raise fields.fail("dynamic gives modules settings of their own, which is not supported")
    for key in ("rotation", "adapter"):
        if fields.values.get(key):
            raise fields.fail(f"{key} is not supported")
    ordered = fields.flag("desc_act", default=False)
    return Gptq(bits, group_size, symmetric, ordered, zeros_are_less_one=format_ == "gptq")


def group_size_of(fields: Fields) -> int:
    """`group_size`: a multiple of 32, or -1."""
    size = fields.values.get("group_size")
    if not isinstance(size, int) or isinstance(size, bool) or (size != -1 and (size <= 0 or size % 32)):
        raise fields.fail(f"group_size {size!r:.80} is not supported; supported: {GROUPS_SAID}")
    return size
