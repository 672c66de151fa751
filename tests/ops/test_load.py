"""Executors and models are found by name; what a checkpoint lacks is said by name."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from llmserve import ops
from llmserve.checkpoints import Checkpoint, open_checkpoint
from llmserve.config import RopeConfig
from llmserve.errors import CheckpointError, ExtensionNotBuilt, InvalidRequest
from llmserve.models import llama
from llmserve.models.catalog import MODELS as CATALOG
from llmserve.models.catalog import load_model
from llmserve.ops.rope import rope_spec
from tests.tiny import checkpoints
from tests.tiny.models import MODELS


@pytest.fixture
def qwen3(tmp_path: Path) -> Checkpoint:
    return open_checkpoint(checkpoints.write(MODELS["qwen3"], tmp_path))


@pytest.mark.skipif(find_spec("torch") is not None, reason="torch is installed in this environment")
def test_cuda_without_torch_says_what_is_missing() -> None:
    with pytest.raises(ExtensionNotBuilt, match="device cuda needs PyTorch"):
        ops.load("cuda")


def test_an_unknown_executor_is_named_with_those_there_are() -> None:
    with pytest.raises(InvalidRequest, match="'abacus'; there are: cpu, cuda, reference"):
        ops.load("abacus")


def test_the_reference_executor_loads_neither_the_extension_nor_torch() -> None:
    load = "import sys; from llmserve import ops; ops.load('reference')"
    code = f"{load}; print({{'torch', 'llmserve._C'}} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


@pytest.mark.parametrize("part", ["embed", "head", "final_norm", "layers.1.q", "layers.0.q_norm", "layers.1.down"])
def test_a_missing_tensor_is_named_with_its_shape(part: str, qwen3: Checkpoint) -> None:
    shape = list(qwen3.tensors[part].shape)
    tensors = {name: tensor for name, tensor in qwen3.tensors.items() if name != part}
    with pytest.raises(CheckpointError) as caught:
        llama.build(qwen3.config, tensors)
    assert str(caught.value) == f"tensor {part} is missing; expected shape {shape}"


def test_a_tensor_of_another_shape_is_named_with_both(qwen3: Checkpoint) -> None:
    tensors = dict(qwen3.tensors)
    tensors["layers.0.k"] = replace(tensors["layers.0.k"], shape=(88, 256))
    with pytest.raises(CheckpointError, match=r"layers\.0\.k has shape \[88, 256\]; expected \[256, 88\]"):
        llama.build(qwen3.config, tensors)


def test_a_tensor_without_use_is_refused(qwen3: Checkpoint) -> None:
    with pytest.raises(CheckpointError, match=r"no use for tensor layers\.0\.k_norm, .* and 1 more"):
        llama.build(replace(qwen3.config, architecture="llama"), qwen3.tensors)


def test_biases_that_an_architecture_demands(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(checkpoints.write(MODELS["qwen2"], tmp_path))
    tensors = {name: tensor for name, tensor in checkpoint.tensors.items() if not name.endswith("k_bias")}
    with pytest.raises(CheckpointError, match=r"layers\.0\.k_bias is missing"):
        llama.build(checkpoint.config, tensors)


def test_an_unknown_architecture_is_named(qwen3: Checkpoint) -> None:
    class Other:
        config = replace(qwen3.config, architecture="perceptron")
        tensors, path, total_bytes, identity = qwen3.tensors, qwen3.path, 0, ""

        def release_pages(self) -> None: ...

        def close(self) -> None: ...

    with pytest.raises(CheckpointError, match=f"'perceptron' is not supported; supported: {', '.join(CATALOG)}"):
        load_model(Other())


def test_rope_factors_must_fit_the_heads() -> None:
    with pytest.raises(CheckpointError, match="3 rope factors for 8 frequencies"):
        rope_spec(RopeConfig(scaling="factors", factors=(1.0, 2.0, 3.0)), head_dim=16)
