"""Whole networks on the CUDA executor against transformers in float32, or against the reference executor."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from numpy.typing import NDArray

from llmserve.checkpoints import open_checkpoint
from llmserve.errors import InvalidRequest
from llmserve.models.catalog import load_model
from llmserve.ops.protocol import StepInput
from tests.cuda.networks import load
from tests.ops.bounds import CUDA_TINY
from tests.ops.golden import tiny_golden
from tests.ops.running import Piece, build_executor, errors, make_step, new_sequence, prompt_logprobs
from tests.tiny import checkpoints
from tests.tiny.models import BLOCK_MODELS, MODELS, VOCAB_SIZE

pytest.importorskip("torch", reason="torch is not installed in this environment: make test-cuda")

if TYPE_CHECKING:
    from torch import Tensor

    from llmserve.ops.cuda.executor import CudaExecutor
    from llmserve.ops.cuda.launchers import Launchers

CHUNKS = (1, 17, 23)


def logprobs(executor: CudaExecutor, prompt: list[int], chunks: tuple[int, ...] = CHUNKS) -> NDArray[np.float32]:
    return prompt_logprobs(executor, prompt, chunks=chunks, vocab_size=VOCAB_SIZE)


@pytest.mark.parametrize("name", MODELS)
def test_logprobs_agree_with_transformers(name: str, launchers: Launchers, tmp_path: Path) -> None:
    golden = tiny_golden(name)
    measured = logprobs(load(name, launchers, tmp_path), golden.prompt)
    found, bound = errors(measured[:, golden.ids], golden.logprobs), CUDA_TINY.times(golden.spread)
    assert bound.holds(found), f"{found} exceeds {bound}"


@pytest.mark.parametrize("name", BLOCK_MODELS)
def test_every_block_type_agrees_with_the_reference(name: str, launchers: Launchers, tmp_path: Path) -> None:
    checkpoint = open_checkpoint(checkpoints.write(BLOCK_MODELS[name], tmp_path))
    prompt = tiny_golden("llama").prompt
    reference = build_executor("reference", checkpoint.config, load_model(checkpoint), num_tokens=64, num_blocks=32)
    expected = prompt_logprobs(reference, prompt, chunks=(41,), vocab_size=VOCAB_SIZE)
    found = errors(logprobs(load(name, launchers, tmp_path), prompt), expected)
    assert CUDA_TINY.times(float(expected.std())).holds(found), found


@pytest.mark.parametrize("dtype", ["fp16", "fp8", "int8"])
def test_every_type_of_cache_agrees_with_transformers(dtype: str, launchers: Launchers, tmp_path: Path) -> None:
    golden = tiny_golden("qwen2_d64")
    measured = logprobs(load("qwen2_d64", launchers, tmp_path, kv_cache_dtype=dtype), golden.prompt)
    found = errors(measured[:, golden.ids], golden.logprobs)
    # fp8 has 4 significant bits: an error of 2^-4 / sqrt(12) of each key and value, four times that of int8 at most.
    wider = {"fp16": 1.0, "int8": 1.5, "fp8": 5.0}[dtype]
    assert CUDA_TINY.times(golden.spread * wider).holds(found), found


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3", "qwen2_q4_0"])
def test_sequences_of_one_step_do_not_mix(name: str, launchers: Launchers, tmp_path: Path) -> None:
    together, alone = _together_and_alone(load(name, launchers, tmp_path), tiny_golden(name).prompt)
    found = errors(together, alone)
    assert CUDA_TINY.times(tiny_golden(name).spread / 4).holds(found), found


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2_q4_0"])
def test_deterministic_results_do_not_depend_on_the_batch(
    name: str, kernel_launchers: Launchers, tmp_path: Path
) -> None:
    executor, prompt = load(name, kernel_launchers, tmp_path, deterministic=True), tiny_golden(name).prompt
    together, alone = _together_and_alone(executor, prompt)
    assert np.array_equal(together, alone)
    assert np.array_equal(logprobs(executor, prompt), logprobs(executor, prompt, (41,)))


def _together_and_alone(executor: CudaExecutor, prompt: list[int]) -> tuple[NDArray[Any], NDArray[Any]]:
    prompts = [prompt, prompt[:11]]
    pieces = [Piece(new_sequence(executor, len(part)), part, 0) for part in prompts]
    executor.launch(make_step(pieces, num_logprobs=VOCAB_SIZE))
    output = executor.collect()
    together = np.take_along_axis(output.top_logprobs, np.argsort(output.top_ids, axis=1), axis=1)
    return together, np.concatenate([logprobs(executor, part, (len(part),)) for part in prompts])


def test_decodes_beside_chunks_are_as_alone(launchers: Launchers, tmp_path: Path) -> None:
    executor, prompt = load("qwen3", launchers, tmp_path), tiny_golden("qwen3").prompt
    expected = logprobs(executor, prompt, (41,))
    first, second = (new_sequence(executor, 41) for _ in range(2))
    executor.launch(make_step([Piece(first, prompt[:40], 0)], num_logprobs=0))
    executor.collect()
    executor.launch(make_step([Piece(first, prompt[40:], 40), Piece(second, prompt[:20], 0)], num_logprobs=VOCAB_SIZE))
    output = executor.collect()
    measured = np.take_along_axis(output.top_logprobs, np.argsort(output.top_ids, axis=1), axis=1)
    found = errors(measured, np.concatenate((expected[40:], expected[:20])))
    assert CUDA_TINY.times(tiny_golden("qwen3").spread / 4).holds(found), found


def test_padded_steps_compute_the_same(launchers: Launchers, tmp_path: Path) -> None:
    import torch

    executor, prompt = load("llama", launchers, tmp_path), tiny_golden("llama").prompt
    handles = [new_sequence(executor, 20 + index) for index in range(3)]
    executor.launch(make_step([Piece(h, prompt[: 19 + i], 0) for i, h in enumerate(handles)], num_logprobs=0))
    executor.collect()
    step = make_step([Piece(h, prompt[19 + i : 20 + i], 19 + i) for i, h in enumerate(handles)], num_logprobs=0)
    with torch.inference_mode():
        plain = executor.program.run(executor.builder.build(step)).clone()
        padded = executor.program.run(executor.builder.build(step, pad_to=8))
    assert padded.shape == (8, VOCAB_SIZE)
    assert torch.allclose(plain, padded[:3], atol=1e-2 * float(plain.std()))
    assert padded.isfinite().all()


def greedy(executor: CudaExecutor, prompt: list[int], count: int, *, ahead: bool) -> list[int]:
    """Tokens generated one by one; ahead: each step launched before the one before it is collected."""
    handle = new_sequence(executor, len(prompt) + count)
    executor.launch(_last_row(make_step([Piece(handle, prompt, 0)], num_logprobs=-1)))
    tokens = []
    for index in range(count):
        position = len(prompt) + index
        if ahead:
            step = make_step([Piece(handle, [0], position)], num_logprobs=-1)
            step.previous_rows = np.zeros(1, np.int32)
            executor.launch(step)
            tokens.append(int(executor.collect().token_ids[0]))
        else:
            tokens.append(int(executor.collect().token_ids[0]))
            executor.launch(make_step([Piece(handle, tokens[-1:], position)], num_logprobs=-1))
    executor.collect()
    return tokens


def _last_row(step: StepInput) -> StepInput:
    """Logits of the last row alone."""
    names = (
        "logit_rows",
        "targets",
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "seed",
        "sample_position",
        "num_logprobs",
    )
    return replace(step, **{name: getattr(step, name)[-1:] for name in names})


def test_steps_launched_ahead_yield_the_same_tokens(launchers: Launchers, tmp_path: Path) -> None:
    executor, prompt = load("llama", launchers, tmp_path), tiny_golden("llama").prompt[:9]
    assert greedy(executor, prompt, 12, ahead=True) == greedy(executor, prompt, 12, ahead=False)


def test_every_step_is_progress(fast_launchers: Launchers, tmp_path: Path) -> None:
    from llmserve import _C

    executor, cell = load("llama", fast_launchers, tmp_path), _C.ProgressCell("", True)
    executor.attach_progress(cell)
    executor.launch(make_step([Piece(new_sequence(executor, 3), [1, 2, 3], 0)], num_logprobs=-1))
    launched = cell.value
    executor.collect()
    assert cell.value > launched > 0


def test_copied_blocks_hold_what_their_sources_did(launchers: Launchers, tmp_path: Path) -> None:
    executor, prompt = load("llama", launchers, tmp_path), tiny_golden("llama").prompt
    expected = logprobs(executor, prompt, (41,))
    pool = executor.block_pool
    assert pool is not None
    parent = new_sequence(executor, 30)
    executor.launch(make_step([Piece(parent, prompt[:30], 0)], num_logprobs=0))
    executor.collect()
    children = [pool.fork(parent, 25) for _ in range(2)]
    assert pool.reserve(children, [41, 41]) == 2
    pieces = [Piece(child, prompt[25:], 25) for child in children]
    executor.launch(make_step(pieces, num_logprobs=VOCAB_SIZE))
    output = executor.collect()
    measured = np.take_along_axis(output.top_logprobs, np.argsort(output.top_ids, axis=1), axis=1)
    found = errors(measured, np.concatenate([expected[25:]] * 2))
    assert CUDA_TINY.times(tiny_golden("llama").spread / 4).holds(found), found


@pytest.mark.parametrize(("option", "value"), [("exact", True), ("block_size", 24)])
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

    def wrong(x: Tensor, weight: Tensor, out: Tensor, *, eps: float, **others: Any) -> None:
        weight = torch.ones_like(weight) if mistake == "weight" else weight
        right.rms_norm(x, weight, out, eps=0.5 if mistake == "eps" else eps, **others)
        if mistake == "row" and len(out) > 1:
            out[-1] = out[-2]

    golden = tiny_golden("llama")
    measured = logprobs(load("llama", replace(right, rms_norm=wrong), tmp_path), golden.prompt)
    found = errors(measured[:, golden.ids], golden.logprobs)
    assert not CUDA_TINY.times(golden.spread).holds(found), found
