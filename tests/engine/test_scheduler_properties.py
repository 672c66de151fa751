"""Random adds, aborts, failures and block shortages: what must hold whatever happens.

One terminal output per accepted request, the budgets (the fake executor asserts them in every step), the tokens that
the prefix determines, no leaked block.
"""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from llmserve.types import Output, SamplingParams
from tests.engine.fake_executor import VOCAB_SIZE
from tests.engine.test_engine import assert_nothing_held, expected_tokens, make_engine, make_request, tokens_of

MAX_MODEL_LEN = 40


class EngineMachine(RuleBasedStateMachine):
    @initialize(
        num_blocks=st.integers(2, 24),
        block_size=st.sampled_from([1, 4, 16]),
        max_num_seqs=st.integers(1, 6),
        extra_tokens=st.integers(0, 20),
        extra_rows=st.integers(0, 5),
    )
    def start(self, *, num_blocks: int, block_size: int, max_num_seqs: int, extra_tokens: int, extra_rows: int) -> None:
        self.engine, self.executor = make_engine(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=max_num_seqs,
            max_num_tokens=max_num_seqs + extra_tokens,
            max_logit_rows=max_num_seqs + extra_rows,
            max_model_len=MAX_MODEL_LEN,
        )
        self.accepted: dict[str, tuple[list[int], SamplingParams]] = {}
        self.outputs: dict[str, list[Output]] = {}
        self.failed = False

    @rule(
        length=st.integers(0, MAX_MODEL_LEN + 1),
        token_id=st.integers(0, VOCAB_SIZE),
        sampling=st.builds(
            SamplingParams,
            max_tokens=st.integers(0, 30),
            seed=st.integers(0, 3),
            num_logprobs=st.none() | st.integers(0, 2),
            num_prompt_logprobs=st.none() | st.integers(0, 2),
            stop_token_ids=st.sets(st.integers(0, VOCAB_SIZE - 1), max_size=5).map(tuple),
        ),
    )
    def submit(self, length: int, token_id: int, sampling: SamplingParams) -> None:
        prompt = list(range(token_id - length, token_id)) if length <= token_id else [token_id] * length
        request_id = str(len(self.accepted))
        self.accepted[request_id] = prompt, sampling
        request = make_request(request_id, prompt)
        self.engine.submit(type(request)(request_id=request_id, prompt_token_ids=prompt, sampling=sampling))

    @precondition(lambda self: self.accepted)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        self.engine.abort(data.draw(st.lists(st.sampled_from(sorted(self.accepted)), max_size=4)))

    @rule()
    def fail_next_step(self) -> None:
        self.executor.fail_next = True

    @rule(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        for _ in range(count):
            num_steps = len(self.executor.steps)
            computes = self.engine._scheduler.has_work
            fails = self.executor.fail_next
            for output in self.engine.step():
                self.outputs.setdefault(output.request_id, []).append(output)
            if computes and not fails:
                assert len(self.executor.steps) == num_steps + 1, "a step with work computes something"

    @invariant()
    def blocks_are_whole(self) -> None:
        if hasattr(self, "engine"):
            self.executor.block_pool.check_integrity()
            scheduler = self.engine._scheduler
            assert self.executor.block_pool.num_tables == len(scheduler.running)
            assert len(self.engine._sequences) == len(scheduler.running) + len(scheduler.waiting)

    def teardown(self) -> None:
        if not hasattr(self, "engine"):
            return
        self.executor.fail_next = False
        for _ in range(5000):
            if not self.engine.has_work:
                break
            self.step(1)
        assert not self.engine.has_work
        assert_nothing_held(self.engine, self.executor)
        assert self.outputs.keys() == self.accepted.keys()
        for request_id, (prompt, sampling) in self.accepted.items():
            check_outputs(self.outputs[request_id], prompt, sampling)


def check_outputs(outputs: list[Output], prompt: list[int], sampling: SamplingParams) -> None:
    """One terminal output, the last; and the tokens of this prefix, whatever else ran."""
    reasons: list[Any] = [output.finish_reason for output in outputs]
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    assert reasons[-1] is not None
    tokens = tokens_of(outputs)
    if tokens:
        assert tokens == expected_tokens(prompt, len(tokens), sampling.seed)
    assert len(tokens) <= sampling.max_tokens
    if reasons[-1] == "error":  # what the fake executor asserts would also come out here
        assert any(cause in (outputs[-1].error or "") for cause in ("made to fail", "the prompt"))
    if reasons[-1] == "stop":
        assert tokens[-1] in sampling.stop_token_ids
    assert not set(tokens[:-1]) & set(sampling.stop_token_ids)
    if sampling.num_prompt_logprobs is not None and reasons[-1] in ("stop", "length"):
        scores = [output.prompt_logprobs for output in outputs if output.prompt_logprobs is not None]
        assert [entry.token_id for entry in scores[0]] == prompt[1:]
        assert len(scores) == 1


EngineMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestEngineMachine = EngineMachine.TestCase
