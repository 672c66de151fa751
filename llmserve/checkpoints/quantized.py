"""Quantized layers of a Hugging Face folder: the format they are in, and their weights in forms that executors read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class QuantizedLayers:
    """The quantized layers of one folder."""

    quantization: Quantization

    def take(self, tensors: dict[str, Located]) -> dict[str, CheckpointTensor]:
        """Weights by canonical name. The tensors they consist of are taken out of `tensors`."""
        parts: dict[str, dict[str, Located]] = {}
        for source, located in list(tensors.items()):
            layer, _, part = source.rpartition(".")
            if part in self.quantization.parts and (part != "weight" or located.dtype == "I8"):
                parts.setdefault(layer, {})[part] = tensors.pop(source)
        weights: dict[str, CheckpointTensor] = {}
        for layer, found in parts.items():
            module, name = Module(layer, found), names.from_hf(f"{layer}.weight")
            if name is None or not names.is_linear(name):
                raise module.fail(next(iter(found)), "is of a quantized layer that is not known to this architecture")
            if f"{layer}.weight" in tensors:
                raise module.fail(next(iter(found)), f"is there beside {layer}.weight")
            weights[name] = self.quantization.read(module).tensor(name, module)
        return weights

    def drop_idle_biases(self, tensors: dict[str, CheckpointTensor], expected: frozenset[str]) -> None:
        """Old GPTQ writers gave each quantized layer a bias of zeros: it goes unless the configuration has it."""
        for name, tensor in list(tensors.items()):
            if not name.endswith("_bias") or names.split_layer(name)[1] in expected:
                continue
            weight = tensors.get(name.removesuffix("_bias"))
            if isinstance(weight, ConvertedTensor) and not dequantize(tensor).any():
                del tensors[name]


def open_quantization(found: Any, path: Path) -> QuantizedLayers:
    """What the `quantization_config` of a `config.json` says. Raises `CheckpointError`."""
    if not isinstance(found, Mapping):
        raise CheckpointError(f"{path}: quantization_config is {found!r:.80}, not an object")
    method = found.get("quant_method")
    if not isinstance(method, str) or method not in METHODS:
        raise CheckpointError(
            f"{path}: quantization method {method!r:.80} is not supported; supported: {', '.join(METHODS)}"
        )
    return QuantizedLayers(METHODS[method](Fields(found, f"{path}: quantization_config")))
