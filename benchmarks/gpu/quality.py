"""SmolLM2 on the GPU: against transformers in float32 on the same dequantized weights, and against our CPU executor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from llmserve import ops
from llmserve.checkpoints import open_checkpoint
from llmserve.config import ExecutorConfig
from llmserve.models.catalog import load_model
from llmserve.ops.protocol import Executor, StepInput

GOLDEN: Final = Path(__file__).resolve().parents[2] / "tests" / "data" / "smollm2_golden.json"
NUM_OUTPUT: Final = 32


def _step(handle: int, token_ids: Sequence[int], first: int) -> StepInput:
    """Greedy; every token's row scores the token after it, the last one's samples."""
    count = len(token_ids)
    positions = np.arange(first, first + count, dtype=np.int32)
    return StepInput(
        token_ids=np.asarray(token_ids, np.int32),
        positions=positions,
        query_start=np.array([0, count], np.int32),
        seq_lens=np.array([first + count], np.int32),
        block_tables=np.array([handle], np.int64),
        logit_rows=np.arange(count, dtype=np.int32),
        targets=np.array([*token_ids[1:], -1], np.int32),
        temperature=np.zeros(count, np.float32),
        top_k=np.zeros(count, np.int32),
        top_p=np.ones(count, np.float32),
        min_p=np.zeros(count, np.float32),
        seed=np.zeros(count, np.uint64),
        sample_position=positions.astype(np.int64) + 1,
        num_logprobs=np.ones(count, np.int32),
    )


def _load(path: Path, device: str) -> Executor:
    checkpoint = open_checkpoint(path)
    config = ExecutorConfig(max_num_tokens=512, max_num_seqs=8, max_logit_rows=512, max_model_len=512)
    executor = ops.load(device).build(
        checkpoint.config, load_model(checkpoint), config, progress=lambda what, done, total: None
    )
    executor.allocate_kv(256)
    return executor


def _generate(executor: Any, token_ids: Sequence[int]) -> list[int]:
    handle = executor.block_pool.create()
    assert executor.block_pool.reserve([handle], [len(token_ids) + NUM_OUTPUT]) == 1
    tokens = list(token_ids)
    executor.launch(_step(handle, tokens, 0))
    for _ in range(NUM_OUTPUT):
        tokens.append(int(executor.collect().token_ids[-1]))
        executor.launch(_step(handle, tokens[-1:], len(tokens) - 1))
    executor.collect()
    executor.block_pool.release(handle)
    return tokens[len(token_ids) :]


def _score(executor: Any, entry: dict[str, Any]) -> tuple[Any, Any]:
    """|Δlogprob| of each following token, and whether the most likely token is transformers' own."""
    handle = executor.block_pool.create()
    assert executor.block_pool.reserve([handle], [len(entry["token_ids"])]) == 1
    executor.launch(_step(handle, entry["token_ids"], 0))
    output = executor.collect()
    executor.block_pool.release(handle)
    return np.abs(output.logprobs[:-1] - entry["logprobs"]), output.top_ids[:, 0] == entry["top_ids"]


def run(path: Path) -> dict[str, Any]:
    """All 20 prompts."""
    prompts = json.loads(GOLDEN.read_text())["prompts"]
    gpu, cpu = _load(path, "cuda"), _load(path, "cpu")
    scores = [_score(gpu, entry) for entry in prompts]
    agreeing = [
        np.mean(np.array(_generate(gpu, entry["token_ids"])) == _generate(cpu, entry["token_ids"])) for entry in prompts
    ]
    return {
        "top1": float(np.concatenate([same for _, same in scores]).mean()),
        "mean_abs_logprob_difference": float(np.concatenate([difference for difference, _ in scores]).mean()),
        "tokens_as_on_cpu": float(np.mean(agreeing)),
        "prompts_as_on_cpu": float(np.mean([share == 1.0 for share in agreeing])),
    }
