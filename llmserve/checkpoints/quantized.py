"""Quantized layers of a Hugging Face folder: the format they are in, and their weights in forms that executors read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from llmserve.checkpoints import names
from llmserve.checkpoints.awq import open_awq
from llmserve.checkpoints.compressed_tensors import open_compressed_tensors
from llmserve.checkpoints.dequantize import dequantize
from llmserve.checkpoints.fields import Fields
from llmserve.checkpoints.gptq import open_gptq
from llmserve.checkpoints.module import ConvertedTensor, Module, Quantization
from llmserve.checkpoints.safetensors import Located
from llmserve.errors import CheckpointError
from llmserve.types import CheckpointTensor

METHODS: Final[Mapping[str, Callable[[Fields], Quantization]]] = {
    "gptq": open_gptq,
    "awq": open_awq,
    "compressed-tensors": open_compressed_tensors,
}


def open_quantization(values: Mapping[str, Any], path: Path) -> Quantization | None:
    """What the `quantization_config` of a `config.json` says; None if it has none. Raises `CheckpointError`."""
    found = values.get("quantization_config")
    if found is None:
        return None
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path}: quantization_config is {found!r:.80}, not an object")
    method = found.get("quant_method")
    if not isinstance(method, str) or method not in METHODS:
        raise CheckpointError(
            f"{path}: quantization method {method!r:.80} is not supported; supported: {', '.join(METHODS)}"
        )
    return METHODS[method](Fields(found, f"{path}: quantization_config"))


def take_modules(quantization: Quantization, tensors: dict[str, Located]) -> dict[str, CheckpointTensor]:
    """Weights of quantized layers by canonical name. Their tensors are taken out of `tensors`."""
    parts: dict[str, dict[str, Located]] = {}
    for source, located in list(tensors.items()):
        module, _, part = source.rpartition(".")
        if part in quantization.parts and (part != "weight" or located.dtype == "I8"):
            parts.setdefault(module, {})[part] = tensors.pop(source)
    weights: dict[str, CheckpointTensor] = {}
    for source, found in parts.items():
        module_, name = Module(source, found), names.from_hf(f"{source}.weight")
        if name is None or not names.is_linear(name):
            raise module_.fail(next(iter(found)), "is of a quantized layer that is not known to this architecture")
        if f"{source}.weight" in tensors:
            raise module_.fail(next(iter(found)), f"is there beside {source}.weight")
        weights[name] = quantization.read(module_).tensor(name, module_)
    return weights


def drop_idle_biases(tensors: dict[str, CheckpointTensor], expected: frozenset[str]) -> None:
    """Old GPTQ writers gave each quantized layer a bias of zeros: it goes unless the configuration has it."""
    for name, tensor in list(tensors.items()):
        weight, is_bias = name.removesuffix("_bias"), name.endswith("_bias")
        if (
            not is_bias
            or names.split_layer(name)[1] in expected
            or not isinstance(tensors.get(weight), ConvertedTensor)
        ):
            continue
        if not dequantize(tensor).any():
            del tensors[name]
