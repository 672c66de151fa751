"""Random adds, aborts, deadlines, failures and block shortages: what must hold whatever happens.

One terminal output per accepted request, the budgets (the fake executor asserts them in every step), the tokens that
the prefix determines (also through cached and forked blocks, and behind drafts, right or wrong), deadlines within one
step, no leaked block.
"""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llmserve.types import Output, Request, SamplingParams
from tests.engine.fake_executor import VOCAB_SIZE
from tests.engine.guesses import Guess, mixed, right, speculate, wrong
from tests.engine.test_engine import Clock, assert_nothing_held, expected_tokens, make_engine, tokens_of

MAX_MODEL_LEN = 40
POISON = 99
"""Seed of requests that make every step fail which samples them."""


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(2, 24),
        block_size=st.sampled_from([1, 4, 16]),
        max_num_seqs=st.integers(1, 6),
        extra_tokens=st.integers(0, 20),
        extra_rows=st.integers(0, 5),
        caches=st.booleans(),
        max_num_waiting=st.sampled_from([0, 0, 3]),
        guess=st.sampled_from([None, right, wrong, mixed]),
        max_draft_tokens=st.integers(1, 6),
    )
    def start(
        self,
        *,
        num_blocks: int,
        block_size: int,
        max_num_seqs: int,
        extra_tokens: int,
        extra_rows: int,
        caches: bool,
        max_num_waiting: int,
        guess: Guess | None,
        max_draft_tokens: int,
    ) -> None:
        self.clock = Clock()
        self.engine, self.executor = make_engine(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_tokens=max_num_seqs + extra_tokens,
            max_logit_rows=max_num_seqs + extra_rows,
            max_model_len=MAX_MODEL_LEN,
            clock=self.clock,
            policy={"enable_prefix_cache": caches, "max_num_waiting": max_num_waiting, "ageing_s": 2.0},
        )
        self.executor.poison = {POISON}
        if guess is not None:
            speculate(self.engine, guess, max_draft_tokens=max_draft_tokens)
        self.accepted: dict[str, Request] = {}
        self.outputs: dict[str, list[Output]] = {}

    @rule(
        length=st.integers(0, MAX_MODEL_LEN + 1),
        token_id=st.integers(0, VOCAB_SIZE),
        sampling=st.builds(
            SamplingParams,
            max_tokens=st.integers(0, 30),
            seed=st.sampled_from([0, 1, 2, 3, POISON]),
            num_logprobs=st.none() | st.integers(0, 2),
            num_prompt_logprobs=st.none() | st.integers(0, 2),
            stop_token_ids=st.sets(st.integers(0, VOCAB_SIZE - 1), max_size=5).map(tuple),
        ),
        priority=st.integers(-2, 2),
        tenant=st.sampled_from(["", "a", "b"]),
        lifetime_s=st.none() | st.floats(-1, 20),
        data=st.data(),
    )
    def submit(
        self,
        *,
        length: int,
        token_id: int,
        sampling: SamplingParams,
        priority: int,
        tenant: str,
        lifetime_s: float | None,
        data: st.DataObject,
    ) -> None:
        prompt = list(range(token_id - length, token_id)) if length <= token_id else [token_id] * length
        parent_id = data.draw(st.none() | st.sampled_from(sorted(self.accepted))) if self.accepted else None
        if parent_id is not None and data.draw(st.booleans()):
            parent = self.accepted[parent_id]
            prompt, tenant = parent.prompt_token_ids, parent.tenant
        request = Request(
            request_id=str(len(self.accepted)),
            prompt_token_ids=prompt,
            sampling=sampling,
            priority=priority,
            tenant=tenant,
            parent_id=parent_id,
            deadline_s=None if lifetime_s is None else self.clock() + lifetime_s,
        )
        self.accepted[request.request_id] = request
        self.engine.submit(request)

    @precondition(lambda self: self.accepted)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.engine.abort(data.draw(st.lists(st.sampled_from(sorted(self.accepted)), max_size=4)))

    @rule()
    def fail_next_step(self) -> None:
        self.executor.fail_next = True

    @rule()
    def abort_next_step(self) -> None:
        self.executor.abort_next = True

    @rule(count=st.integers(1, 8), seconds=st.floats(0, 3))
    def step(self, count: int, seconds: float) -> None:
        for _ in range(count):
            self.clock.now_s += seconds
            num_steps = len(self.executor.steps)
            was_aborted = self.executor.abort_next
            outputs = self.engine.step()
            for output in outputs:
                self.outputs.setdefault(output.request_id, []).append(output)
            living = self.engine._sequences.values()
            assert all(seq.deadline_s is None or seq.deadline_s > self.clock() for seq in living)
            if living and not was_aborted:
                advanced = len(self.executor.steps) > num_steps or any(output.finish_reason for output in outputs)
                assert advanced, "a step with work computes something, or ends what cannot be computed"

    @invariant()
    def blocks_are_whole(self) -> None:
        if hasattr(self, "engine"):
            self.executor.block_pool.check_integrity()
            scheduler = self.engine._scheduler
            assert self.executor.block_pool.num_tables == len(scheduler.running)
            assert len(self.engine._sequences) == len(scheduler.running) + scheduler.num_waiting
            assert len(scheduler.waiting) == len(list(scheduler.waiting))
            assert all(seq.num_computed_tokens < seq.num_tokens for seq in self.engine._sequences.values())
            assert sum(len(step.seq_lens) for step in self.executor.steps[-1:]) <= self.executor.config.max_num_seqs

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.executor.fail_next = self.executor.abort_next = False
        for _ in range(5000):
            if not self.engine.has_work:
                break
            self.step(1, 0.1)
        assert not self.engine.has_work
        assert_nothing_held(self.engine, self.executor)
        assert self.outputs.keys() == self.accepted.keys()
        assert len(self.engine._scheduler.fair_share) == 0
        for request_id, request in self.accepted.items():
            check_outputs(self.outputs[request_id], request)


def check_outputs(outputs: list[Output], request: Request) -> None:
    """One terminal output, the last; and the tokens of this prefix, whatever else ran."""
    prompt, sampling = request.prompt_token_ids, request.sampling
    reasons: list[Any] = [output.finish_reason for output in outputs]
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    assert reasons[-1] is not None
    tokens = tokens_of(outputs)
    if tokens:
        assert tokens == expected_tokens(prompt, len(tokens), sampling.seed)
    assert len(tokens) <= sampling.max_tokens
    if reasons[-1] == "error":  # what the fake executor asserts would also come out here
        assert any(cause in (outputs[-1].error or "") for cause in ("the prompt", "are waiting", "made to fail"))
    assert outputs[0].num_cached_tokens < max(1, len(prompt))
    assert all(output.num_cached_tokens == 0 for output in outputs[1:])
    if reasons[-1] == "stop":
        assert tokens[-1] in sampling.stop_token_ids
    assert not set(tokens[:-1]) & set(sampling.stop_token_ids)
    if sampling.num_prompt_logprobs is not None and reasons[-1] in ("stop", "length"):
        scores = [output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None]
        assert [entry.token_id for entry in scores[0]] == prompt[1:]
        assert len(scores) == 1


EngineMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestEngineMachine = EngineMachine.TestCase
