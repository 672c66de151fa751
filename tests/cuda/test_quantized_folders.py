"""GPTQ, AWQ and compressed-tensors folders on the CUDA executor, against the reference on the same folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from llmserve.checkpoints import open_checkpoint
from llmserve.config import ExecutorConfig
from llmserve.models.catalog import load_model
from tests.ops.bounds import CUDA_TINY, TINY
from tests.ops.running import build_executor, errors, prompt_logprobs
from tests.ops.test_quantized_folders import CASES
from tests.tiny.models import VOCAB_SIZE, prompt_ids
from tests.tiny.quantized import FORMATS, QUANTIZED_MODELS, quantize

pytest.importorskip("torch", reason="torch is not installed in this environment: make test-cuda")

if TYPE_CHECKING:
    from llmserve.ops.cuda.launchers import Launchers


@pytest.mark.parametrize("case", CASES)
def test_logprobs_agree_with_the_reference(case: str, launchers: Launchers, tmp_path: Path) -> None:
    from llmserve.ops.cuda.executor import build

    model = next(iter(QUANTIZED_MODELS.values()))
    name, options = CASES[case]
    checkpoint = open_checkpoint(quantize(model, FORMATS[name], options).write(tmp_path))
    prompt = prompt_ids(model)
    reference = build_executor("reference", checkpoint.config, load_model(checkpoint), num_tokens=64, num_blocks=64)
    expected = prompt_logprobs(reference, prompt, chunks=(len(prompt),), vocab_size=VOCAB_SIZE)
    config = ExecutorConfig(max_num_tokens=64, max_num_seqs=8, max_logit_rows=64, max_model_len=128)
    executor = build(
        checkpoint.config, load_model(checkpoint), config, progress=lambda what, done, total: None, launchers=launchers
    )
    executor.allocate_kv(64)
    chunks = (1, 17, len(prompt) - 18)
    found = errors(prompt_logprobs(executor, prompt, chunks=chunks, vocab_size=VOCAB_SIZE), expected)
    bound = TINY["int8"] if name == "int-quantized" else CUDA_TINY  # there activations are int8
    assert bound.times(float(expected.std())).holds(found), f"{found} exceeds {bound}"
