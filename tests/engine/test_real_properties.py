"""Random adds, aborts, deadlines, forks and block shortages over the compiled executor and a tiny network.

What the fake executor cannot show: the bits. Whatever else happened, each request got a beginning of what it gets
alone, to the last bit of its log-probabilities, and all of it when nobody ended it.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from llmserve.engine.engine import Engine
from llmserve.engine.scheduler import SchedulerConfig
from llmserve.engine.sequence import Sequence
from llmserve.types import Output, Request, SamplingParams
from tests.engine.guesses import speculate
from tests.engine.test_determinism import Bits, Recorder, load, to_bits
from tests.engine.test_determinism import make_engine as make_roomy_engine
from tests.engine.test_engine import Clock
from tests.tiny.checkpoints import write
from tests.tiny.models import VOCAB_SIZE, TinyModel

pytest.importorskip("llmserve._C", reason="the extension is not built")

NUM_KINDS = 16
NUM_STEPS: Counter[str] = Counter()
"""Over all examples: engine steps, and what happened in them."""


@cache
def executor() -> Recorder:
    """One for all examples: each gives it a new cache."""
    with tempfile.TemporaryDirectory() as folder:
        path = write(TinyModel(name="tiny", model_type="llama", storage="q8_0"), Path(folder))
        return load(path, "")[0]


@cache
def kinds() -> list[tuple[list[int], SamplingParams, Bits]]:
    """Prompts with parameters and what they give alone; a third of the prompts begin alike."""
    rng = np.random.default_rng(23)
    prefix = rng.integers(0, VOCAB_SIZE, 40).tolist()
    found = []
    for number in range(NUM_KINDS):
        own = rng.integers(0, VOCAB_SIZE, int(rng.integers(1, 30))).tolist()
        sampling = SamplingParams(
            max_tokens=int(rng.integers(1, 25)),
            temperature=0.0 if number % 3 == 0 else 0.9,
            seed=number,
            num_logprobs=1,
            num_prompt_logprobs=0 if number % 8 == 1 else None,
            repetition_penalty=1.2 if number % 4 == 2 else 1.0,
        )
        prompt = [*prefix, *own] if number % 3 == 0 else own
        engine = make_roomy_engine(executor(), VOCAB_SIZE, enable_prefix_cache=False)
        engine.submit(Request(request_id="alone", prompt_token_ids=prompt, sampling=sampling))
        outputs: list[Output] = []
        while engine.has_work:
            outputs += engine.step()
        found.append((prompt, sampling, to_bits(outputs)))
    return found


class RealEngineMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(6, 16),
        max_num_seqs=st.integers(1, 8),
        extra_tokens=st.integers(0, 40),
        caches=st.booleans(),
        guesses=st.booleans(),
    )
    def start(self, *, num_blocks: int, max_num_seqs: int, extra_tokens: int, caches: bool, guesses: bool) -> None:
        kinds()
        executor().allocate_kv(num_blocks)
        self.clock = Clock()
        budgets = SchedulerConfig(
            max_num_tokens=max_num_seqs + extra_tokens,
            max_num_seqs=max_num_seqs,
            max_logit_rows=max_num_seqs + 4,
            enable_prefix_cache=caches,
            ageing_s=2.0,
        )
        self.engine = Engine(
            executor(), budgets, make_roomy_engine(executor(), VOCAB_SIZE, num_blocks=num_blocks).info, clock=self.clock
        )
        self.kind_of: dict[str, int] = {}
        if guesses:
            speculate(self.engine, self.guess)
        self.outputs: dict[str, list[Output]] = {}

    def guess(self, seq: Sequence, num_tokens: int) -> list[int]:
        """What the request got alone, with a mistake somewhere."""
        first = seq.num_tokens - seq.num_prompt_tokens
        tokens = list(kinds()[self.kind_of[seq.request_id]][2][0][first : first + num_tokens])
        place = (seq.order + seq.num_tokens) % 6
        if place < len(tokens):
            tokens[place] = (tokens[place] + 1) % VOCAB_SIZE
        return tokens

    @rule(
        chosen=st.lists(st.integers(0, NUM_KINDS - 1), min_size=1, max_size=6),
        priority=st.integers(-1, 1),
        tenant=st.sampled_from(["", "a"]),
        lifetime_s=st.none() | st.none() | st.floats(0.1, 10),
        forks=st.booleans(),
    )
    def submit(self, *, chosen: list[int], priority: int, tenant: str, lifetime_s: float | None, forks: bool) -> None:
        for kind in chosen:
            prompt, sampling, _ = kinds()[kind]
            parents = [name for name, number in self.kind_of.items() if number == kind]
            request = Request(
                request_id=str(len(self.kind_of)),
                prompt_token_ids=prompt,
                sampling=sampling,
                priority=priority,
                tenant=tenant,
                parent_id=parents[-1] if forks and parents else None,
                deadline_s=None if lifetime_s is None else self.clock() + lifetime_s,
            )
            self.kind_of[request.request_id] = kind
            self.engine.submit(request)

    @precondition(lambda self: self.kind_of)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.engine.abort([data.draw(st.sampled_from(sorted(self.kind_of)))])

    @rule(count=st.integers(1, 6), seconds=st.floats(0, 1))
    def step(self, count: int, seconds: float) -> None:
        for _ in range(count):
            self.clock.now_s += seconds
            NUM_STEPS["steps"] += self.engine.has_work
            for output in self.engine.step():
                self.outputs.setdefault(output.request_id, []).append(output)

    @invariant()
    def blocks_are_whole(self) -> None:
        if hasattr(self, "engine"):
            assert self.engine.control("check_integrity", {})["num_blocks_used"] <= executor().block_pool.num_blocks

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        for _ in range(5000):
            if not self.engine.has_work:
                break
            self.step(1, 0.01)
        assert not self.engine.has_work
        assert self.engine.control("check_integrity", {}) == {"num_blocks_used": 0}
        assert self.outputs.keys() == self.kind_of.keys()
        NUM_STEPS["preemptions"] += self.engine.stats().num_preemptions
        NUM_STEPS["accepted"] += self.engine.stats().drafts.num_accepted_tokens
        NUM_STEPS["cache hits"] += self.engine.stats().num_cache_hits > 0
        for name, outputs in self.outputs.items():
            self.check(outputs, kinds()[self.kind_of[name]][2])

    def check(self, outputs: list[Output], alone: Bits) -> None:
        reasons = [output.finish_reason for output in outputs]
        assert reasons[:-1] == [None] * (len(reasons) - 1)
        assert reasons[-1] in ("length", "abort", "deadline"), outputs[-1].error
        got = to_bits(outputs)
        for part, whole in zip(got, alone, strict=True):
            assert part == whole[: len(part)]
        assert reasons[-1] != "length" or got == alone
        NUM_STEPS[reasons[-1]] += 1


def test_random_lives_over_the_real_executor() -> None:
    """Runs the machine, and then looks whether enough happened."""
    NUM_STEPS.clear()
    run_state_machine_as_test(
        RealEngineMachine, settings=settings(max_examples=25, stateful_step_count=30, deadline=None)
    )
    assert NUM_STEPS["steps"] >= 300, NUM_STEPS
    assert NUM_STEPS["length"] >= 20, NUM_STEPS
    assert min(NUM_STEPS["accepted"], NUM_STEPS["preemptions"], NUM_STEPS["cache hits"], NUM_STEPS["abort"]) >= 1, (
        NUM_STEPS
    )
