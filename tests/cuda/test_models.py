"""Whole networks on the CUDA executor against transformers in float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from llmserve.checkpoints import open_checkpoint
from llmserve.config import ExecutorConfig
from llmserve.errors import InvalidRequest
from llmserve.models.catalog import load_model
from tests.ops.bounds import CUDA_TINY
from tests.ops.golden import tiny_golden
from tests.ops.running import Piece, errors, make_step, new_sequence, prompt_logprobs
from tests.tiny import checkpoints
from tests.tiny.models import MODELS, VOCAB_SIZE

pytest.importorskip("torch", reason="torch is not installed in this environment: make test-cuda")

if TYPE_CHECKING:
    from torch import Tensor

    from llmserve.ops.cuda.executor import CudaExecutor
    from llmserve.ops.cuda.launchers import Launchers


def load(name: str, launchers: Launchers, folder: Path, **options: object) -> CudaExecutor:
    from llmserve.ops.cuda import build

    checkpoint = open_checkpoint(checkpoints.write(MODELS[name], folder))
    limits = {"max_num_tokens": 64, "max_num_seqs": 8, "max_logit_rows": 64, "max_model_len": 128}
    config = ExecutorConfig(**{**limits, **options})  # type: ignore[arg-type]
    executor = build(
        checkpoint.config, load_model(checkpoint), config, progress=lambda what, done, total: None, launchers=launchers
    )
    executor.allocate_kv(64)
    return executor


@pytest.mark.parametrize("name", MODELS)
def test_logprobs_agree_with_transformers(name: str, launchers: Launchers, tmp_path: Path) -> None:
    golden = tiny_golden(name)
    executor = load(name, launchers, tmp_path)
    measured = prompt_logprobs(executor, golden.prompt, chunks=(1, 17, 23), vocab_size=VOCAB_SIZE)
    found, bound = errors(measured[:, golden.ids], golden.logprobs), CUDA_TINY.times(golden.spread)
    assert bound.holds(found), f"{found} exceeds {bound}"


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_sequences_of_one_step_do_not_mix(name: str, launchers: Launchers, tmp_path: Path) -> None:
    prompts = [tiny_golden(name).prompt, tiny_golden(name).prompt[:11]]
    executor = load(name, launchers, tmp_path)
    pieces = [Piece(new_sequence(executor, len(prompt)), prompt, 0) for prompt in prompts]
    executor.launch(make_step(pieces, num_logprobs=VOCAB_SIZE))
    together = np.take_along_axis(
        executor.collect().top_logprobs, np.argsort(executor.collect().top_ids, axis=1), axis=1
    )
    alone = np.concatenate(
        [prompt_logprobs(executor, prompt, chunks=(len(prompt),), vocab_size=VOCAB_SIZE) for prompt in prompts]
    )
    found = errors(together, alone)
    assert CUDA_TINY.times(tiny_golden(name).spread / 4).holds(found), found


@pytest.mark.parametrize(("option", "value"), [("exact", True), ("kv_cache_dtype", "int8")])
def test_an_option_that_cuda_does_not_have_is_refused(
    option: str, value: object, launchers: Launchers, tmp_path: Path
) -> None:
    with pytest.raises(InvalidRequest, match=f"^{option}: "):
        load("llama", launchers, tmp_path, **{option: value})


@pytest.mark.parametrize("mistake", ["weight", "eps", "row"])
def test_a_wrong_kernel_is_outside_the_bound(mistake: str, tmp_path: Path) -> None:
    import torch

    from tests.cuda.emulation import torch_launchers

    right = torch_launchers()

    def wrong(
        x: Tensor,
        weight: Tensor,
        out: Tensor,
        *,
        eps: float,
        residual: Tensor | None = None,
        scales: Tensor | None = None,
    ) -> None:
        weight = torch.ones_like(weight) if mistake == "weight" else weight
        right.rms_norm(x, weight, out, eps=0.5 if mistake == "eps" else eps, residual=residual, scales=scales)
        if mistake == "row" and len(out) > 1:
            out[-1] = out[-2]

    golden = tiny_golden("llama")
    executor = load("llama", replace(right, rms_norm=wrong), tmp_path)
    measured = prompt_logprobs(executor, golden.prompt, chunks=(1, 17, 23), vocab_size=VOCAB_SIZE)
    found = errors(measured[:, golden.ids], golden.logprobs)
    assert not CUDA_TINY.times(golden.spread).holds(found), found
