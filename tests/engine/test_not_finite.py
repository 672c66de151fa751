"""A model that breaks on a request: that request ends with an error, alone, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmserve.config import KVCacheDtype
from llmserve.engine.engine import Engine
from llmserve.types import Output, Request, SamplingParams
from tests.engine.test_determinism import LIMITS, MAX_TOKENS, Recorder, make_engine, make_requests, run, to_bits
from tests.ops.poison import POISON, poisoned_executor
from tests.ops.running import available_isas
from tests.tiny.checkpoints import write
from tests.tiny.models import VOCAB_SIZE, TinyModel

REASON = "the model produced a value that is not a number"


@pytest.fixture(scope="module", params=[(isa, "bf16") for isa in available_isas()] + [("", "int8")])
def executor(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recorder:
    isa, kv = request.param
    return build(tmp_path_factory.mktemp("checkpoint"), isa, kv)


def build(folder: Path, isa: str, kv: KVCacheDtype) -> Recorder:
    path = write(TinyModel(name="tiny", model_type="llama", storage="q4_1"), folder)
    limits: dict[str, Any] = {name: getattr(LIMITS, name) for name in LIMITS.__slots__}
    config = type(LIMITS)(**(limits | {"isa": isa, "kv_cache_dtype": kv}))
    return Recorder(poisoned_executor(path, config, np.nan))


def requests() -> list[Request]:
    """Those of the determinism tests, without the poison."""
    clean = []
    for request in make_requests(VOCAB_SIZE):
        prompt = [token if token != POISON else 0 for token in request.prompt_token_ids]
        # A sampled poison would break a clean request in its next step.
        sampling = SamplingParams(
            **{name: getattr(request.sampling, name) for name in SamplingParams.__struct_fields__}
            | {"bad_words": ((POISON,),)}
        )
        clean.append(Request(request_id=request.request_id, prompt_token_ids=prompt, sampling=sampling))
    return clean


def collect(engine: Engine) -> dict[str, list[Output]]:
    outputs: dict[str, list[Output]] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    return outputs


@pytest.mark.parametrize("policy", [{}, {"max_num_tokens": 64, "max_num_seqs": 40}, {"num_blocks": 60}])
def test_only_the_poisoned_requests_end(executor: Recorder, policy: dict[str, int]) -> None:
    clean = requests()
    expected = run(make_engine(executor, VOCAB_SIZE), clean)
    broken = set(range(4, 40, 5))
    engine = make_engine(executor, VOCAB_SIZE, **policy)
    for number, request in enumerate(clean):
        prompt = list(request.prompt_token_ids)
        if number in broken:
            prompt[number % len(prompt)] = POISON
        engine.submit(Request(request_id=request.request_id, prompt_token_ids=prompt, sampling=request.sampling))
    found = collect(engine)
    for number in range(len(clean)):
        outputs = found[str(number)]
        if number not in broken:
            assert to_bits(outputs) == expected[str(number)], number
            continue
        assert [output.finish_reason for output in outputs] == ["error"], number
        assert (outputs[0].error or "").startswith(REASON)
        assert outputs[0].token_ids == ()
    assert engine.control("check_integrity", {}) == {"num_blocks_used": 0}


def test_poison_that_is_generated_ends_the_request_after_it(executor: Recorder) -> None:
    engine = make_engine(executor, VOCAB_SIZE)
    for name, allowed in (("broken", (POISON,)), ("clean", (1,))):
        sampling = SamplingParams(max_tokens=MAX_TOKENS, allowed_token_ids=allowed)
        engine.submit(Request(request_id=name, prompt_token_ids=[1, 2, 3], sampling=sampling))
    found = collect(engine)
    assert [output.token_ids for output in found["broken"]] == [(POISON,), ()]
    assert found["broken"][-1].finish_reason == "error"
    assert found["clean"][-1].finish_reason == "length"


def test_scored_prompts_are_watched_as_well(executor: Recorder) -> None:
    """A request that generates nothing has no other row in which it could be seen."""
    engine = make_engine(executor, VOCAB_SIZE, max_num_tokens=48, max_num_seqs=4)
    for name, prompt in (("broken", [1, 2, POISON, *[4] * 60]), ("clean", [1, 2, 3, *[4] * 60])):
        sampling = SamplingParams(max_tokens=0, num_prompt_logprobs=0)
        engine.submit(Request(request_id=name, prompt_token_ids=prompt, sampling=sampling))
    found = collect(engine)
    assert [(output.finish_reason, output.prompt_logprobs) for output in found["broken"]] == [("error", None)]
    assert found["clean"][-1].finish_reason == "length"
    assert engine.control("check_integrity", {}) == {"num_blocks_used": 0}


def test_poisoned_blocks_are_not_kept_for_others(executor: Recorder) -> None:
    """Not even those whose own tokens are clean: whatever broke the model may have broken them."""
    engine = make_engine(executor, VOCAB_SIZE, max_num_tokens=32, max_num_seqs=4)
    prompt = [1 + i % 5 for i in range(100)]
    sampling = SamplingParams(max_tokens=1)
    engine.submit(Request(request_id="broken", prompt_token_ids=[*prompt, POISON, 9], sampling=sampling))
    assert collect(engine)["broken"][-1].finish_reason == "error"
    for name, num_cached in (("first", 0), ("second", 96)):
        engine.submit(Request(request_id=name, prompt_token_ids=[*prompt, 8], sampling=sampling))
        outputs = collect(engine)[name]
        assert (outputs[0].num_cached_tokens, outputs[-1].finish_reason) == (num_cached, "length")
