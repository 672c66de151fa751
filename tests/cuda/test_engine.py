"""The engine over the CUDA executor: steps launched ahead, sampling on the device, forks and drafts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import pytest

from llmserve.engine.engine import Engine
from llmserve.engine.kv_cache import PagedExecutor
from llmserve.engine.scheduler import SchedulerConfig
from llmserve.types import EngineInfo, Output, Request, SamplingParams
from tests.cuda.networks import NUM_BLOCKS, load
from tests.ops.golden import tiny_golden
from tests.tiny.models import VOCAB_SIZE

pytest.importorskip("torch", reason="torch is not installed in this environment: make test-cuda")

if TYPE_CHECKING:
    from llmserve.ops.cuda.launchers import Launchers

SAMPLINGS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 0.8, "seed": 7},
    "filtered": {"temperature": 1.2, "top_k": 20, "top_p": 0.8, "min_p": 0.02, "seed": 8, "num_logprobs": 3},
    "penalized": {"temperature": 0.0, "repetition_penalty": 1.3, "frequency_penalty": 0.2, "logit_bias": ((5, 2.0),)},
    "typical": {"temperature": 1.0, "typical_p": 0.7, "seed": 9},
    "scored": {"temperature": 0.0, "num_prompt_logprobs": 2},
}


def generate(
    launchers: Launchers, folder: Path, *, ahead: bool, drafts: int = 0, apart: bool = False
) -> dict[str, Any]:
    """Tokens, log-probabilities and ends of one request for each kind of sampling, together or one after the other."""
    executor = load("llama", launchers, folder, deterministic=True)
    executor.runs_ahead = ahead
    scheduler = SchedulerConfig(max_num_tokens=64, max_num_seqs=8, max_logit_rows=64, max_draft_tokens=drafts)
    info = EngineInfo(
        model_path="", architecture="llama", vocab_size=VOCAB_SIZE, max_model_len=128, max_num_seqs=8,
        num_blocks=NUM_BLOCKS, block_size=16, kv_cache_bytes=0, weight_bytes=0, device="cuda", isa="cuda",
        num_threads=1, load_s=0.0,
    )  # fmt: skip
    engine = Engine(cast(PagedExecutor, executor), scheduler, info)
    outputs: dict[str, list[Output]] = {name: [] for name in SAMPLINGS}
    prompt = tiny_golden("llama").prompt
    for index, (name, options) in enumerate(SAMPLINGS.items()):
        sampling = SamplingParams(max_tokens=10 + index, **options)
        engine.submit(Request(request_id=name, prompt_token_ids=prompt[index : 12 + 3 * index], sampling=sampling))
        if apart:
            _finish(engine, outputs)
    _finish(engine, outputs)
    assert engine.control("check_integrity", {}) == {"num_blocks_used": 0}
    return {name: _summary(parts) for name, parts in outputs.items()}


def _finish(engine: Engine, outputs: dict[str, list[Output]]) -> None:
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output)


def _summary(parts: list[Output]) -> tuple[Any, ...]:
    tokens = [token for part in parts for token in part.token_ids]
    logprobs = [entry for part in parts for entry in part.logprobs or ()]
    scores = [entry for part in parts for entry in part.prompt_logprobs or ()]
    assert parts[-1].error is None
    return tokens, logprobs, scores, parts[-1].finish_reason


def test_steps_ahead_and_batches_change_nothing(kernel_launchers: Launchers, tmp_path: Path) -> None:
    together = generate(kernel_launchers, tmp_path, ahead=False)
    assert [len(tokens) for tokens, *_ in together.values()] == [10, 11, 12, 13, 14, 15]
    assert len(together["filtered"][1]) == 12
    assert len(together["scored"][2]) == 12 + 3 * 5 - 5 - 1
    assert generate(kernel_launchers, tmp_path, ahead=True) == together
    assert generate(kernel_launchers, tmp_path, ahead=True, apart=True) == together


def test_drafts_change_nothing(kernel_launchers: Launchers, tmp_path: Path) -> None:
    plain = generate(kernel_launchers, tmp_path, ahead=False)
    assert generate(kernel_launchers, tmp_path, ahead=True, drafts=4) == plain
