"""Every executor against transformers in float32, on tiny networks of each architecture, feature and storage type."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from llmserve.checkpoints import open_checkpoint
from llmserve.models.catalog import load_model
from tests.ops.bounds import tiny_bound
from tests.ops.golden import tiny_golden
from tests.ops.running import ARMS, Piece, build_executor, errors, make_step, prompt_logprobs
from tests.tiny import checkpoints
from tests.tiny.models import MODELS, VOCAB_SIZE, digest


@pytest.mark.parametrize("name", MODELS)
def test_weights_are_those_the_golden_values_are_for(name: str) -> None:
    assert digest(checkpoints.stored_tensors(MODELS[name])) == tiny_golden(name).sha256


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("name", MODELS)
def test_logprobs_agree_with_transformers(name: str, arm: str, tmp_path: Path) -> None:
    golden = tiny_golden(name)
    checkpoint = open_checkpoint(checkpoints.write(MODELS[name], tmp_path))
    executor = build_executor(arm, checkpoint.config, load_model(checkpoint), num_tokens=64, num_blocks=64)
    measured = prompt_logprobs(executor, golden.prompt, chunks=(1, 17, 23), vocab_size=VOCAB_SIZE)
    bound = tiny_bound(MODELS[name], arm, spread=golden.spread)
    found = errors(measured[:, golden.ids], golden.logprobs)
    assert bound.holds(found), f"{found} exceeds {bound}"


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_reference_sequences_of_one_step_do_not_mix(name: str, tmp_path: Path) -> None:
    prompts = [tiny_golden(name).prompt, tiny_golden(name).prompt[7:30], tiny_golden("qwen2").prompt[:19]]
    checkpoint = open_checkpoint(checkpoints.write(MODELS[name], tmp_path))
    executor = build_executor("reference", checkpoint.config, load_model(checkpoint), num_tokens=128, num_blocks=64)
    pieces = [Piece(index, prompt, 0) for index, prompt in enumerate(prompts)]
    executor.launch(make_step(pieces, num_logprobs=1))
    together = executor.collect().top_logprobs[:, 0]
    alone = []
    for index, prompt in enumerate(prompts):
        executor.launch(make_step([Piece(index + 3, prompt, 0)], num_logprobs=1))
        alone.append(executor.collect().top_logprobs[:, 0])
    np.testing.assert_allclose(together, np.concatenate(alone), atol=1e-5)
