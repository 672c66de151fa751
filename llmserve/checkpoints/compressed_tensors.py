"""compressed-tensors, as llm-compressor writes it: `pack-quantized` weights of 4 and 8 bits and `int-quantized` W8A8.

For a linear layer of K inputs and N outputs, with B bits, 32 / B codes a word, the lowest bits first and signed values
stored plus 2^(B - 1):

    pack-quantized   weight_packed      int32 [N, K · B / 32]   codes of consecutive inputs
                     weight_scale       float [N, groups]
                     weight_zero_point  int32 [N · B / 32, groups]   of consecutive outputs; older: int8 [N, groups]
                     weight_shape       int64 [2]   N, K
                     weight_g_idx       int32 [K]   the group of each input, or all -1; absent unless `actorder: group`

    int-quantized    weight             int8 [N, K]
                     weight_scale       float [N, 1]
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from llmserve.checkpoints.fields import Fields
from llmserve.checkpoints.gptq import group_size_of
from llmserve.checkpoints.module import Module, Orders, QuantizedWeight
from llmserve.checkpoints.packing import IntegerWeight, form_of, unpack

FORMATS: Final = ("pack-quantized", "int-quantized")
_SUPPORTED: Final = {
    ("int-quantized", 8, True, "channel"),
    *(
        ("pack-quantized", bits, symmetric, strategy)
        for bits, symmetric in ((4, True), (4, False), (8, True))
        for strategy in ("channel", "group")
    ),
}
"""(format, bits, symmetric, what has a scale of its own)"""


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the layers of one `config_groups` entry are stored."""

    format: str
    targets: tuple[str, ...]
    bits: int
    symmetric: bool
    group_size: int
    """-1: one scale for a row."""


@dataclass(frozen=True, slots=True)
class CompressedTensors:
    """See `Quantization`."""

    schemes: tuple[Scheme, ...]
    ignore: tuple[str, ...]
    parts: frozenset[str] = frozenset(
        {"weight", "weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"}
    )
    _orders: Orders = field(default_factory=Orders)

    def read(self, module: Module) -> QuantizedWeight:
        scheme = self._scheme(module.name)
        if scheme is None:
            part = "weight" if "weight" in module.parts else "weight_packed"
            raise module.fail(part, "is of a layer that quantization_config leaves unquantized")
        return self._read_packed(module, scheme) if scheme.format == "pack-quantized" else _read_int8(module)

    def _scheme(self, name: str) -> Scheme | None:
        """Names go before patterns, and these before the class."""
        if any(_matches(name, pattern) for pattern in self.ignore):
            return None
        found = [
            (_rank(target), scheme) for scheme in self.schemes for target in scheme.targets if _matches(name, target)
        ]
        return min(found, key=lambda ranked: ranked[0])[1] if found else None

    def _read_packed(self, module: Module, scheme: Scheme) -> QuantizedWeight:
        bits, in_word = scheme.bits, 32 // scheme.bits
        rows, words = module.matrix("weight_packed", "I32")
        columns = words * in_word
        group = module.group("weight_packed", columns, scheme.group_size)
        form = form_of(bits, symmetric=scheme.symmetric, group=group)
        assert form is not None, "_scheme_of and Module.group refuse what has none"
        shape = module.integers("weight_shape", "I64", (2,)).tolist()
        if shape != [rows, columns]:
            raise module.fail("weight_shape", f"is {shape}, but weight_packed is of {[rows, columns]}")
        codes = module.integers("weight_packed", "I32", (rows, words))
        scales = module.floats("weight_scale", (rows, columns // group))
        zeros = self._zeros(module, scheme, rows, columns // group)
        order = self._order(module, columns, group)
        permutation = None if order is None else np.array(order)

        def rows_of_codes(piece: slice) -> NDArray[np.uint8]:
            found = unpack(codes[piece], bits)
            return found if permutation is None else found[:, permutation]

        def load() -> IntegerWeight:
            return IntegerWeight(scales(), zeros, rows_of_codes)

        return QuantizedWeight(form, (rows, columns), "weight_scale", load, order)

    def _zeros(self, module: Module, scheme: Scheme, rows: int, groups: int) -> NDArray[np.uint8] | None:
        """Zero points as codes, [N, groups]. Those of a symmetric layer are looked at where it has them."""
        part, middle = "weight_zero_point", 1 << (scheme.bits - 1)
        if part not in module.parts and scheme.symmetric:
            return None
        if part in module.parts and module.parts[part].dtype == "I8":
            signed: NDArray[np.int8] = module.integers(part, "I8", (rows, groups))
            return signed.view(np.uint8) + np.uint8(middle)  # wraps
        in_word = 32 // scheme.bits
        packed = module.integers(part, "I32", (-(-rows // in_word), groups))
        return unpack(packed.T, scheme.bits)[:, :rows].T

    def _order(self, module: Module, columns: int, group: int) -> tuple[int, ...] | None:
        part = "weight_g_idx"
        if part not in module.parts:
            return None
        index = module.integers(part, "I32", (columns,))
        return None if (index == -1).all() else self._orders.of(module, part, index, group)


def _read_int8(module: Module) -> QuantizedWeight:
    rows, columns = module.matrix("weight", "I8")
    codes = module.integers("weight", "I8", (rows, columns)).view(np.uint8)
    scales = module.floats("weight_scale", (rows, 1))
    zeros = None
    if "weight_zero_point" in module.parts:
        zeros = module.integers("weight_zero_point", "I8", (rows, 1)).view(np.uint8)

    def load() -> IntegerWeight:
        return IntegerWeight(scales(), zeros, lambda piece: codes[piece])

    return QuantizedWeight("i8", (rows, columns), "weight_scale", load)


def open_compressed_tensors(fields: Fields) -> CompressedTensors:
    """From a `quantization_config`. Raises `CheckpointError` for what is not supported, by its name."""
    for key in ("kv_cache_scheme", "transform_config", "moe_sparsity_config"):
        if fields.values.get(key):
            raise fields.fail(f"{key} is not supported")
    sparsity = fields.values.get("sparsity_config")
    if sparsity and (not isinstance(sparsity, Mapping) or sparsity.get("format", "dense") != "dense"):
        raise fields.fail("sparsity_config is not supported")
    if (status := fields.text("quantization_status", "compressed")) != "compressed":
        raise fields.fail(f"quantization_status {status!r} is not supported; supported: compressed")
    groups = fields.values.get("config_groups")
    if not isinstance(groups, Mapping) or not groups:
        raise fields.fail("config_groups is not an object with entries")
    schemes = tuple(_scheme_of(fields, name, group) for name, group in groups.items())
    return CompressedTensors(schemes, _patterns(fields, "ignore"))


def _scheme_of(fields: Fields, name: str, values: Any) -> Scheme:
    group = _part(fields, name, values)
    format_ = group.text("format", fields.values.get("format"))
    if format_ not in FORMATS:
        raise group.fail(f"format {format_!r} is not supported; supported: {', '.join(FORMATS)}")
    if group.values.get("output_activations"):
        raise group.fail("output_activations are not supported")
    weights = _part(group, "weights", group.values.get("weights"))
    bits, symmetric, size = _weights(weights, format_)
    inputs = group.values.get("input_activations")
    if format_ == "int-quantized":
        _check_inputs(_part(group, "input_activations", inputs))
    elif inputs:
        raise group.fail("input_activations are not supported for pack-quantized weights")
    targets = _patterns(group, "targets")
    for target in targets:
        if not target.startswith("re:") and "." not in target and target not in ("Linear", "lm_head"):
            raise group.fail(f"target {target!r} is not supported; supported: Linear, names and patterns of modules")
    return Scheme(format_, targets, bits, symmetric, size)


def _weights(fields: Fields, format_: str) -> tuple[int, bool, int]:
    """Bits, whether symmetric, and the group size."""
    bits, symmetric = fields.size("num_bits", 8), fields.flag("symmetric", default=True)
    kind = fields.text("type", "int")
    size = fields.values.get("group_size")
    strategy = fields.text("strategy", "tensor" if size is None else "channel" if size == -1 else "group")
    said = f"{kind} weights of {bits} bits, {'' if symmetric else 'a'}symmetric, a scale per {strategy}"
    if kind != "int" or (format_, bits, symmetric, strategy) not in _SUPPORTED:
        raise fields.fail(
            f"{said}: not supported in format {format_}; supported: pack-quantized int weights of 4 bits, or of 8 bits "
            "and symmetric, with a scale per channel or group; int-quantized ones of 8 bits, symmetric, per channel"
        )
    if fields.values.get("dynamic"):
        raise fields.fail("dynamic weights are not supported")
    return bits, symmetric, group_size_of(fields) if strategy == "group" else -1


def _check_inputs(fields: Fields) -> None:
    """Executors scale the activations of INT8 weights by the largest value of each token, as such checkpoints want."""
    wanted = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    assumed = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": False}
    for key, value in wanted.items():
        found = fields.values.get(key, assumed.get(key))
        if found != value:
            raise fields.fail(f"{key} {found!r:.80} is not supported; supported: {value!r}")


def _part(fields: Fields, key: str, values: Any) -> Fields:
    if not isinstance(values, Mapping):
        raise fields.fail(f"{key} is {values!r:.80}, not an object")
    return Fields(values, f"{fields.where}: {key}")


def _patterns(fields: Fields, key: str) -> tuple[str, ...]:
    patterns: Sequence[Any] = fields.array(key, str)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise fields.fail(f"{key} is not a list of str")
        try:
            re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
        except re.error as error:
            raise fields.fail(f"{key} has the pattern {pattern!r:.80}: {error}") from error
    return tuple(patterns)


def _rank(target: str) -> int:
    return 2 if target == "Linear" else 1 if target.startswith("re:") else 0


def _matches(name: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    return pattern in (name, "Linear")
