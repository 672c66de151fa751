"""Networks of quantized safetensors in every executor, against the reference on the plain weights they stand for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from numpy.typing import NDArray

from llmserve import ops
from llmserve.checkpoints import Checkpoint, open_checkpoint
from llmserve.config import ExecutorConfig, ImageConfig
from llmserve.errors import CheckpointError
from llmserve.models import llama
from llmserve.models.catalog import load_model
from llmserve.ops import nodes as n
from llmserve.types import CheckpointTensor
from tests.ops.bounds import TINY, Bound, precision
from tests.ops.running import build_executor, errors, prompt_logprobs
from tests.tiny.models import VOCAB_SIZE, TinyModel, prompt_ids
from tests.tiny.quantized import BF16, FORMATS, QUANTIZED_MODELS, Options, QuantizedFolder, quantize

CASES: Final = {
    "gptq": ("gptq", Options(group_size=128)),
    "gptq-v1": ("gptq", Options(group_size=64, symmetric=False, version=1)),
    "gptq-ordered": ("gptq", Options(group_size=32, symmetric=False, ordered=True)),
    "gptq-8-ordered": ("gptq", Options(bits=8, ordered=True, version=1)),
    "awq": ("awq", Options(group_size=64, symmetric=False)),
    "pack-quantized": ("pack-quantized", Options(group_size=-1, scales=BF16)),
    "pack-quantized-ordered": ("pack-quantized", Options(group_size=64, symmetric=False, ordered=True)),
    "int-quantized": ("int-quantized", Options(scales=BF16)),
}
ARMS: Final = ("reference", "cpu-best", "cpu-best-exact")
MINIMUMS: Final = Bound(mean=2e-3, max=2e-2)
"""Of rounding minimums to float16, in standard deviations of the log-probabilities (measured: 9e-4, 7e-3)."""


class Case:
    """A quantized network and what its plain weights yield."""

    def __init__(self, model: TinyModel, case: str, folder: Path) -> None:
        name, self.options = CASES[case]
        self.prompt = prompt_ids(model)
        self.quantized: QuantizedFolder = quantize(model, FORMATS[name], self.options)
        plain = {key: value for key, value in self.quantized.config.items() if key != "quantization_config"}
        weights = QuantizedFolder(plain, dict[str, NDArray[Any]](self.quantized.plain()), {})
        self.expected = self.logprobs("reference", open_checkpoint(weights.write(folder / "plain")))
        self.spread = float(self.expected.std())
        self.checkpoint = open_checkpoint(self.quantized.write(folder / "quantized"))

    def logprobs(self, arm: str, checkpoint: Checkpoint) -> NDArray[np.float32]:
        forward = load_model(checkpoint)
        executor = build_executor(arm, checkpoint.config, forward, num_tokens=64, num_blocks=64)
        return prompt_logprobs(executor, self.prompt, chunks=(1, 17, 23), vocab_size=VOCAB_SIZE)

    def bound(self, arm: str) -> Bound:
        bound = TINY[precision(arm, quantized=True)]
        if not self.options.symmetric:
            bound = Bound(mean=bound.mean + MINIMUMS.mean, max=bound.max + MINIMUMS.max)
        return bound.times(self.spread)


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("model", QUANTIZED_MODELS)
@pytest.mark.parametrize("case", CASES)
def test_logprobs_are_those_of_the_plain_weights(case: str, model: str, arm: str, tmp_path: Path) -> None:
    prepared = Case(QUANTIZED_MODELS[model], case, tmp_path)
    found = errors(prepared.logprobs(arm, prepared.checkpoint), prepared.expected)
    assert prepared.bound(arm).holds(found), f"{found} exceeds {prepared.bound(arm)}"


def _unordered(tensors: Mapping[str, CheckpointTensor]) -> dict[str, CheckpointTensor]:
    return {name: replace(tensor, order=None) if tensor.order else tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("gptq-v1", {"checkpoint_format": "gptq_v2"}),
        ("gptq-ordered", {"checkpoint_format": "gptq"}),
        ("gptq-8-ordered", {}),
        ("pack-quantized-ordered", {}),
        ("gptq-ordered", {}),
    ],
)
def test_the_bounds_reject_mistakes(case: str, change: dict[str, str], tmp_path: Path) -> None:
    """Versions mixed up, so that zero points are off by one; or the activation order ignored."""
    prepared = Case(QUANTIZED_MODELS["quantized_llama"], case, tmp_path)
    prepared.quantized.config["quantization_config"] |= change
    checkpoint = open_checkpoint(prepared.quantized.write(tmp_path / "mistaken"))
    tensors = checkpoint.tensors if change else _unordered(checkpoint.tensors)
    forward = llama.build(checkpoint.config, tensors)
    executor = build_executor("reference", checkpoint.config, forward, num_tokens=64, num_blocks=64)
    measured = prompt_logprobs(executor, prepared.prompt, chunks=(41,), vocab_size=VOCAB_SIZE)
    for arm in ARMS:
        assert not prepared.bound(arm).holds(errors(measured, prepared.expected)), arm


@pytest.mark.parametrize("case", ["gptq-ordered", "int-quantized"])
def test_packed_weights_are_kept_and_mapped(case: str, tmp_path: Path) -> None:
    pytest.importorskip("llmserve._C", reason="the extension is not built")
    prepared = Case(QUANTIZED_MODELS["quantized_llama"], case, tmp_path)
    images = ImageConfig(folder=tmp_path / "packed", checkpoint_id="one", max_bytes=1 << 30)
    bits = []
    for origin, kept in (("memory", None), ("written", images), ("mapped", images)):
        config = ExecutorConfig(max_num_tokens=64, max_num_seqs=2, max_logit_rows=64, max_model_len=128,
                                num_threads=2, images=kept)  # fmt: skip
        checkpoint = open_checkpoint(tmp_path / "quantized")
        executor = ops.load("cpu").build(
            checkpoint.config, load_model(checkpoint), config, progress=lambda what, done, total: None
        )
        executor.allocate_kv(8)
        assert executor.weights_origin == origin
        table = prompt_logprobs(executor, prepared.prompt, chunks=(41,), vocab_size=VOCAB_SIZE)
        bits.append(table.tobytes())
    assert bits[0] == bits[1] == bits[2]


def test_converted_bytes_are_there_only_while_a_matrix_is_packed(tmp_path: Path) -> None:
    sources = pytest.importorskip("llmserve.ops.sources", reason="the extension is not built")
    prepared = Case(QUANTIZED_MODELS["quantized_llama"], "gptq", tmp_path)
    tensor = prepared.checkpoint.tensors["layers.0.q"]
    matrix = n.Matrix("q4_g128", tensors=[prepared.checkpoint.tensors["layers.0.k"], tensor])
    matrix.add_rows(tensor, 0, 128)
    matrix.sources.insert(0, (1, 13, 6))
    found = sources.MatrixSources.of(matrix)
    room, data = found._rooms[1], bytes(tensor.data)
    assert not any(room[:])
    with found.filled(sample=False):
        assert room[:] == data
    assert not any(room[:])
    with found.filled(sample=True):  # of rows 13 to 18 and 64 to 127
        size = len(data) // 128
        assert room[13 * size : 19 * size] == data[13 * size : 19 * size]
        assert room[64 * size :] == data[64 * size :]
        assert not any(room[: 13 * size] + room[19 * size : 64 * size] + found._rooms[0][:])
    assert not any(room[:])


def test_a_weight_that_cannot_be_converted_ends_the_load(tmp_path: Path) -> None:
    prepared = Case(QUANTIZED_MODELS["quantized_llama"], "gptq", tmp_path)
    prepared.quantized.arrays["model.layers.1.mlp.down_proj.scales"][0, 5] = np.inf
    checkpoint = open_checkpoint(prepared.quantized.write(tmp_path / "broken"))
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.down_proj\.scales has a scale that is not a"):
        prepared.logprobs("cpu-best", checkpoint)
