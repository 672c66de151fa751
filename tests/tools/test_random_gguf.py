"""Files of random weights: what they hold, and that an engine answers from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest

from benchmarks.random_gguf import LLAMA_2_7B, QWEN_05B, Shape, Type, write_random
from llmserve.config import EngineConfig
from llmserve.engine.loader import load_engine
from llmserve.types import Request, SamplingParams
from tests.e2e.real_server import default_model

TINY_LLAMA = replace(LLAMA_2_7B, layers=1, hidden=64, inner=96, heads=2, kv_heads=1, vocab=320)
TINY_QWEN = replace(QWEN_05B, layers=2, hidden=64, inner=96, heads=4, kv_heads=2, vocab=50000)


@pytest.mark.parametrize("shape", [TINY_LLAMA, TINY_QWEN], ids=lambda shape: shape.architecture)
@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q8_0], ids=lambda kind: kind.name)
def test_every_tensor_has_its_shape_and_sane_values(tmp_path: Path, shape: Shape, kind: Type) -> None:
    reader = gguf.GGUFReader(write_random(tmp_path / "a.gguf", shape, kind, Type.Q8_0))
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert {name: tuple(map(int, reversed(one.shape))) for name, one in found.items()} == dict(shape.tensors())
    for name, one in found.items():
        values = gguf.quants.dequantize(one.data, one.tensor_type)
        assert np.isfinite(values).all()
        assert one.tensor_type == (Type.F32 if len(one.shape) == 1 else Type.Q8_0 if "embd" in name else kind)
        if len(one.shape) == 2:
            assert 0.005 < values.std() < 0.05, "as large as weights of a real model"


def test_an_engine_answers_from_a_random_model(tmp_path: Path) -> None:
    path = write_random(tmp_path / "a.gguf", TINY_QWEN, tokenizer=default_model())
    engine = load_engine(EngineConfig(model_path=path, max_model_len=64), progress=lambda *_: None)
    engine.submit(Request(request_id="1", prompt_token_ids=[1, 2], sampling=SamplingParams(max_tokens=4)))
    num_tokens = 0
    while engine.has_work:
        num_tokens += sum(len(output.token_ids) for output in engine.step())
    assert num_tokens == 4
