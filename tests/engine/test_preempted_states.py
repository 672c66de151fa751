"""What a sequence's sampling remembers outlives its preemption, bit by bit.

Penalties, `min_tokens`, bad words, bias and seeds in every mixture; too few blocks, no prefix cache: the prompt and
all generated tokens are computed again, and the tokens that follow are those of the same request alone.
"""

from __future__ import annotations

from typing import Any

import msgspec
import numpy as np
import pytest

from llmserve.engine.engine import Engine
from llmserve.types import Output, Request, SamplingParams
from tests.engine.test_determinism import Bits, Recorder, load, make_engine, to_bits
from tests.ops.running import available_isas
from tests.tiny.checkpoints import write
from tests.tiny.models import VOCAB_SIZE, TinyModel

NUM_REQUESTS = 32
MAX_TOKENS = 40
NUM_BLOCKS = 30
OPTIONS = ("penalties", "min_tokens", "bad_words", "logit_bias", "allowed_token_ids")
Result = tuple[str | None, Bits]


@pytest.fixture(scope="module", params=available_isas())
def executor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recorder:
    model = TinyModel(name="tiny", model_type="llama", storage="q4_1")
    return load(write(model, tmp_path_factory.mktemp("checkpoint")), request.param)[0]


def state_options(rng: np.random.Generator, number: int) -> dict[str, Any]:
    """The number's bits say which options it has; all have one. Few words are left, so that they come again."""
    chosen = {name for bit, name in enumerate(OPTIONS) if (number % 31 + 1) >> bit & 1}
    options: dict[str, Any] = {}
    if "penalties" in chosen:
        options |= {"repetition_penalty": 1.3, "frequency_penalty": 0.4, "presence_penalty": -0.5}
    if "min_tokens" in chosen:
        options |= {"min_tokens": 25, "stop_token_ids": tuple(rng.permutation(VOCAB_SIZE)[:60].tolist())}
    if "bad_words" in chosen:
        words = [(token,) for token in rng.permutation(VOCAB_SIZE)[:40].tolist()]
        options["bad_words"] = (*words, *[tuple(rng.integers(0, VOCAB_SIZE, 2).tolist()) for _ in range(500)])
    if "logit_bias" in chosen:
        options["logit_bias"] = tuple((token, 3.0) for token in rng.permutation(VOCAB_SIZE)[:20].tolist())
    if "allowed_token_ids" in chosen:
        options["allowed_token_ids"] = tuple(rng.permutation(VOCAB_SIZE)[:120].tolist())
    return options


def make_requests() -> list[Request]:
    rng = np.random.default_rng(5)
    requests = []
    for number in range(NUM_REQUESTS):
        sampling = SamplingParams(
            max_tokens=MAX_TOKENS,
            temperature=0.0 if number % 3 == 0 else 0.8,
            top_p=0.95,
            seed=number,
            num_logprobs=2,
            **state_options(rng, number),
        )
        prompt = rng.integers(0, VOCAB_SIZE, int(rng.integers(3, 40))).tolist()
        requests.append(Request(request_id=str(number), prompt_token_ids=prompt, sampling=sampling))
    return requests


def run(engine: Engine, requests: list[Request]) -> tuple[dict[str, Result], dict[str, int]]:
    """What each request got, and which were preempted after their first token, how many tokens after it at the most."""
    for request in requests:
        engine.submit(request)
    outputs: dict[str, list[Output]] = {request.request_id: [] for request in requests}
    num_preemptions: dict[str, int] = {}
    preempted_after: dict[str, int] = {}
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output)
        for seq in engine._sequences.values():
            num_generated = seq.num_tokens - seq.num_prompt_tokens
            if seq.num_preemptions > num_preemptions.get(seq.request_id, 0) and num_generated:
                preempted_after[seq.request_id] = num_generated
            num_preemptions[seq.request_id] = seq.num_preemptions
    assert engine.control("check_integrity", {}) == {"num_blocks_used": 0}
    return {name: (found[-1].finish_reason, to_bits(found)) for name, found in outputs.items()}, preempted_after


def run_alone(executor: Recorder, requests: list[Request]) -> dict[str, Result]:
    engine = make_engine(executor, VOCAB_SIZE, enable_prefix_cache=False)
    results: dict[str, Result] = {}
    for request in requests:
        results |= run(engine, [request])[0]
    assert executor.max_seqs == 1
    return results


def test_preempted_sequences_sample_what_they_would_have_alone(executor: Recorder) -> None:
    requests = make_requests()
    alone = run_alone(executor, requests)
    engine = make_engine(executor, VOCAB_SIZE, num_blocks=NUM_BLOCKS, enable_prefix_cache=False)
    together, preempted_after = run(engine, requests)
    assert executor.max_seqs >= 8
    assert len(preempted_after) >= 12
    assert max(preempted_after.values()) >= 15
    for name in OPTIONS:
        bit = OPTIONS.index(name)
        assert any((int(number) % 31 + 1) >> bit & 1 for number in preempted_after), f"none with {name}"
    assert {reason for reason, _ in alone.values()} == {"stop", "length"}
    different = [name for name in alone if together[name] != alone[name]]
    assert not different, f"{len(different)} of {len(alone)} requests differ: {different}"


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option_changes_what_is_sampled(executor: Recorder, name: str) -> None:
    """Or the test above would not notice that one was forgotten."""
    defaults = msgspec.structs.asdict(SamplingParams())
    fields = {
        "penalties": ("repetition_penalty", "frequency_penalty", "presence_penalty"),
        "min_tokens": ("min_tokens",),
    }.get(name, (name,))
    bit = OPTIONS.index(name)
    having = [request for request in make_requests() if (int(request.request_id) % 31 + 1) >> bit & 1]
    without = [
        msgspec.structs.replace(
            request,
            sampling=msgspec.structs.replace(request.sampling, **{field: defaults[field] for field in fields}),
        )
        for request in having
    ]
    found, others = run_alone(executor, having), run_alone(executor, without)
    assert sum(found[name] != others[name] for name in found) >= len(having) // 2
