"""Steps launched before the one before them is collected: the same results, and nothing lost or left behind."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.config import ExecutorConfig
from llmserve.engine.engine import Engine
from llmserve.engine.scheduler import SchedulerConfig
from llmserve.ops.protocol import StepInput, StepOutput
from llmserve.types import Output
from tests.engine.fake_executor import FakeExecutor, fake_info
from tests.engine.test_engine import (
    Clock,
    assert_nothing_held,
    expected_tokens,
    make_request,
    run,
    tokens_of,
)

CONFIG = ExecutorConfig(max_num_tokens=32, max_num_seqs=8, max_logit_rows=8, max_model_len=128, block_size=4)


class AheadExecutor(FakeExecutor):
    """Takes one more step before the last is collected, and tokens of steps that nobody has seen."""

    runs_ahead = True

    def __init__(self, config: ExecutorConfig, num_blocks: int) -> None:
        super().__init__(config, num_blocks)
        self.outputs: deque[StepOutput | Exception] = deque()
        self.num_ahead = 0
        self.fail_ahead = False
        self.fail_collect = 0
        """Collects from now on until one fails; 0: none does."""

    def launch(self, step: StepInput) -> None:
        assert len(self.outputs) < 2, "more than one step ahead"
        if len(step.previous_rows):
            assert len(self.outputs) == 1, "there is no step that it could follow"
            if self.fail_ahead:
                raise RuntimeError("made to fail")
            self.num_ahead += 1
            before = self.outputs[-1]
            assert isinstance(before, StepOutput)
            step = replace(step, token_ids=before.token_ids[step.previous_rows])
        super().launch(step)
        self.outputs.append(self._output)

    def collect(self) -> StepOutput:
        if self.fail_collect:
            self.fail_collect -= 1
            if not self.fail_collect:
                self.outputs.popleft()
                raise RuntimeError("made to fail")
        output = self.outputs.popleft()
        assert isinstance(output, StepOutput)
        return output


def make_engine(num_blocks: int = 64, **policy: Any) -> tuple[Engine, AheadExecutor]:
    executor = AheadExecutor(CONFIG, num_blocks)
    limits = {name: getattr(CONFIG, name) for name in ("max_num_tokens", "max_num_seqs", "max_logit_rows")}
    return Engine(executor, SchedulerConfig(**limits, **policy), fake_info(CONFIG, num_blocks), clock=Clock()), executor


def test_decodes_run_ahead_and_say_the_same() -> None:
    engine, executor = make_engine()
    prompts = {str(index): [index, 5, 6, 7][: 2 + index % 3] for index in range(5)}
    for name, prompt in prompts.items():
        engine.submit(make_request(name, prompt, max_tokens=20, seed=int(name), num_logprobs=2))
    outputs = run(engine)
    for name, prompt in prompts.items():
        assert tokens_of(outputs[name]) == expected_tokens(prompt, 20, int(name))
    assert executor.num_ahead >= 17
    assert_nothing_held(engine, executor)


def test_a_sequence_that_stops_is_left_out_of_the_step_behind() -> None:
    engine, executor = make_engine()
    stop = expected_tokens([1, 2], 8)[5]
    engine.submit(make_request("stops", [1, 2], max_tokens=30, stop_token_ids=(stop,)))
    engine.submit(make_request("goes on", [3, 4, 5], max_tokens=30))
    outputs = run(engine)
    tokens = expected_tokens([1, 2], 8)
    assert tokens_of(outputs["stops"]) == tokens[: tokens.index(stop) + 1]
    assert outputs["stops"][-1].finish_reason == "stop"
    assert tokens_of(outputs["goes on"]) == expected_tokens([3, 4, 5], 30)
    assert executor.num_ahead > 20
    assert_nothing_held(engine, executor)


def test_new_requests_and_aborts_meet_a_step_in_flight() -> None:
    engine, executor = make_engine()
    engine.submit(make_request("first", [1, 2], max_tokens=40))
    seen: list[Output] = []
    for _ in range(6):
        seen += engine.step()
    assert executor.num_ahead
    engine.submit(make_request("second", [9, 8, 7], max_tokens=10))
    engine.abort(["first"])
    outputs = run(engine)
    assert outputs["first"][-1].finish_reason == "abort"
    assert tokens_of(outputs["second"]) == expected_tokens([9, 8, 7], 10)
    assert_nothing_held(engine, executor)


def test_an_abort_of_everything_leaves_nothing_behind() -> None:
    engine, executor = make_engine()
    engine.submit(make_request("first", [1, 2], max_tokens=40))
    for _ in range(6):
        engine.step()
    engine.abort_all()
    run(engine)
    engine.submit(make_request("next", [5, 5], max_tokens=6))
    assert tokens_of(run(engine)["next"]) == expected_tokens([5, 5], 6)
    assert_nothing_held(engine, executor)


@pytest.mark.parametrize("failure", ["launch", "collect", "collect ahead"])
def test_a_failure_ahead_loses_nothing(failure: str) -> None:
    engine, executor = make_engine()
    for name in ("a", "b"):
        engine.submit(make_request(name, [ord(name) - 90, 2], max_tokens=20))
    outputs: dict[str, list[Output]] = {"a": [], "b": []}
    for index in range(100):
        if index == 5:
            executor.fail_ahead = failure == "launch"
            executor.fail_collect = {"launch": 0, "collect": 1, "collect ahead": 2}[failure]
        for output in engine.step():
            outputs[output.request_id].append(output)
        if not engine.has_work:
            break
    for name in ("a", "b"):
        assert tokens_of(outputs[name]) == expected_tokens([ord(name) - 90, 2], 20)
    assert_nothing_held(engine, executor)


@pytest.mark.parametrize("option", [{"frequency_penalty": 0.5}, {"logit_bias": ((3, 1.0),)}])
def test_a_sequence_whose_sampling_needs_its_tokens_is_not_run_ahead(option: dict[str, Any]) -> None:
    engine, executor = make_engine()
    engine.submit(make_request("a", [1, 2], max_tokens=10, **option))
    run(engine)
    assert executor.num_ahead == 0


def test_beside_drafts_every_second_step_is_planned() -> None:
    engine, executor = make_engine(max_draft_tokens=4)
    engine.submit(make_request("a", [1, 2, 3], max_tokens=40))
    assert tokens_of(run(engine)["a"]) == expected_tokens([1, 2, 3], 40)
    assert 0 < executor.num_ahead <= 20


@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_blocks=st.integers(12, 40))
def test_random_work_ends_as_it_would_step_by_step(data: st.DataObject, num_blocks: int) -> None:
    engine, executor = make_engine(num_blocks)
    living: dict[str, list[int]] = {}
    outputs: dict[str, list[Output]] = {}
    for index in range(data.draw(st.integers(1, 12))):
        prompt = data.draw(st.lists(st.integers(0, 96), min_size=1, max_size=12))
        max_tokens = data.draw(st.integers(1, 20))
        stops = (expected_tokens(prompt, max_tokens, index)[-1],) if data.draw(st.booleans()) else ()
        engine.submit(make_request(str(index), prompt, max_tokens=max_tokens, seed=index, stop_token_ids=stops))
        living[str(index)] = prompt
        for _ in range(data.draw(st.integers(0, 6))):
            for output in engine.step():
                outputs.setdefault(output.request_id, []).append(output)
        if data.draw(st.integers(0, 5)) == 0:
            engine.abort([data.draw(st.sampled_from(sorted(living)))])
    for name, more in run(engine).items():
        outputs.setdefault(name, []).extend(more)
    for name, prompt in living.items():
        found = tokens_of(outputs[name])
        assert found == expected_tokens(prompt, len(found), int(name))
        assert [output.finish_reason for output in outputs[name]].count(None) == len(outputs[name]) - 1
    assert_nothing_held(engine, executor)
