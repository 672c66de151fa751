"""The engine over an executor that computes hashes: results, budgets, refusals, failures."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from llmserve.config import ExecutorConfig
from llmserve.engine.engine import Engine
from llmserve.engine.scheduler import SchedulerConfig
from llmserve.errors import InvalidRequest
from llmserve.types import Output, Request, SamplingParams
from tests.engine.fake_executor import FakeExecutor, fake_info, next_token, score


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def make_engine(
    *,
    num_blocks: int = 64,
    num_host_blocks: int = 0,
    policy: dict[str, Any] | None = None,
    clock: Callable[[], float] = time.monotonic,
    **limits: Any,
) -> tuple[Engine, FakeExecutor]:
    """An engine over a fake executor; limits are fields of `ExecutorConfig`, `policy` is more of `SchedulerConfig`."""
    defaults = {"max_num_tokens": 32, "max_num_seqs": 8, "max_logit_rows": 8, "max_model_len": 128, "block_size": 4}
    config = replace(ExecutorConfig(), **(defaults | limits))
    executor = FakeExecutor(config, num_blocks, num_host_blocks)
    scheduler = SchedulerConfig(
        max_num_tokens=config.max_num_tokens,
        max_num_seqs=config.max_num_seqs,
        max_logit_rows=config.max_logit_rows,
        **(policy or {}),
    )
    return Engine(executor, scheduler, fake_info(config, num_blocks), clock=clock), executor


def make_request(request_id: str, prompt: list[int], **options: Any) -> Request:
    """A request; options are fields of `Request`, and of `SamplingParams` else."""
    own = {name: options.pop(name) for name in Request.__struct_fields__ if name in options}
    return Request(request_id=request_id, prompt_token_ids=prompt, sampling=SamplingParams(**options), **own)


def run(engine: Engine) -> dict[str, list[Output]]:
    """Step until there is no work; outputs by request."""
    outputs: dict[str, list[Output]] = {}
    for _ in range(10_000):
        if not engine.has_work:
            return outputs
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
    raise AssertionError("the engine does not come to an end")


def tokens_of(outputs: list[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def expected_tokens(prompt: list[int], count: int, seed: int = 0) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(next_token(tokens, seed))
    return tokens[len(prompt) :]


def assert_nothing_held(engine: Engine, executor: FakeExecutor) -> None:
    executor.block_pool.check_integrity()
    assert executor.block_pool.num_tables == 0
    assert engine.stats().num_blocks_used == 0
    assert engine.stats().num_running == engine.stats().num_waiting == 0


def test_generates_until_length() -> None:
    engine, executor = make_engine()
    engine.submit(make_request("a", [1, 2, 3], max_tokens=5, seed=7))
    outputs = run(engine)["a"]
    assert tokens_of(outputs) == expected_tokens([1, 2, 3], 5, seed=7)
    assert [output.finish_reason for output in outputs] == [None] * 4 + ["length"]
    assert_nothing_held(engine, executor)
    assert engine.stats().num_prompt_tokens == 3
    assert engine.stats().num_generation_tokens == 5


def test_stop_token_is_included_and_named() -> None:
    engine, _ = make_engine()
    expected = expected_tokens([5], 10)
    engine.submit(make_request("a", [5], max_tokens=10, stop_token_ids=(expected[3],)))
    outputs = run(engine)["a"]
    cut = expected.index(expected[3]) + 1
    assert tokens_of(outputs) == expected[:cut]
    assert (outputs[-1].finish_reason, outputs[-1].stop_token_id) == ("stop", expected[3])


def test_ends_at_max_model_len() -> None:
    engine, _ = make_engine(max_model_len=10)
    engine.submit(make_request("a", [1] * 8, max_tokens=100))
    outputs = run(engine)["a"]
    assert len(tokens_of(outputs)) == 2
    assert outputs[-1].finish_reason == "length"


@pytest.mark.parametrize("max_num_tokens", [8, 9, 13, 32])
def test_chunked_prefill_changes_nothing(max_num_tokens: int) -> None:
    engine, executor = make_engine(max_num_tokens=max_num_tokens)
    prompts = {str(i): [i] * (20 + i) for i in range(5)}
    for request_id, prompt in prompts.items():
        engine.submit(make_request(request_id, prompt, max_tokens=6))
    outputs = run(engine)
    assert {i: tokens_of(outputs[i]) for i in prompts} == {i: expected_tokens(p, 6) for i, p in prompts.items()}
    assert_nothing_held(engine, executor)


def test_running_sequences_advance_in_every_step_beside_a_long_prompt() -> None:
    engine, executor = make_engine(max_num_tokens=16)
    for i in range(4):
        engine.submit(make_request(str(i), [i], max_tokens=30))
    engine.step()
    engine.submit(make_request("long", [9] * 100, max_tokens=1, num_prompt_logprobs=0))
    for _ in range(10):
        assert {output.request_id for output in engine.step()} == {"0", "1", "2", "3"}
        assert len(executor.steps[-1].token_ids) > 4


@pytest.mark.parametrize("caches", [True, False])
def test_preemption_gives_the_same_tokens(caches: bool) -> None:
    policy = {"enable_prefix_cache": caches}
    engine, executor = make_engine(num_blocks=10, max_model_len=40, policy=policy)
    for i in range(6):
        engine.submit(make_request(str(i), [i] * 5, max_tokens=20, num_logprobs=0, num_prompt_logprobs=0))
    outputs = run(engine)
    assert engine.stats().num_preemptions > 0
    for i in range(6):
        assert tokens_of(outputs[str(i)]) == expected_tokens([i] * 5, 20)
        assert outputs[str(i)][-1].finish_reason == "length"
        prompt_logprobs = outputs[str(i)][0].prompt_logprobs
        assert prompt_logprobs is not None
        assert [entry.logprob for entry in prompt_logprobs] == [score([i] * n, i) for n in range(1, 5)]
    assert_nothing_held(engine, executor)


@pytest.mark.parametrize("max_tokens", [0, 2])
def test_prompt_logprobs_in_chunks_of_logit_rows(max_tokens: int) -> None:
    engine, executor = make_engine(max_logit_rows=8)
    prompt = list(range(30))
    engine.submit(make_request("a", prompt, max_tokens=max_tokens, num_prompt_logprobs=2))
    outputs = run(engine)["a"]
    prompt_logprobs = outputs[0].prompt_logprobs
    assert prompt_logprobs is not None
    assert [entry.token_id for entry in prompt_logprobs] == prompt[1:]
    assert [entry.logprob for entry in prompt_logprobs] == [score(prompt[:n], n) for n in range(1, 30)]
    assert all(len(entry.top_ids) == 2 for entry in prompt_logprobs)
    assert all(output.prompt_logprobs is None for output in outputs[1:])
    assert outputs[-1].finish_reason == "length"
    assert tokens_of(outputs) == expected_tokens(prompt, max_tokens)
    assert_nothing_held(engine, executor)


def test_logprobs_come_only_to_those_who_asked() -> None:
    engine, _ = make_engine()
    engine.submit(make_request("with", [1, 2], max_tokens=3, num_logprobs=0))
    engine.submit(make_request("without", [3, 4], max_tokens=3))
    outputs = run(engine)
    tokens = [1, 2]
    for output in outputs["with"]:
        assert output.logprobs is not None
        assert output.logprobs[0].logprob == score(tokens, output.token_ids[0])
        tokens += output.token_ids
    assert all(output.logprobs is None for output in outputs["without"])


def test_first_come_first_served() -> None:
    engine, _ = make_engine(max_num_seqs=2)
    for i in range(6):
        engine.submit(make_request(str(i), [i], max_tokens=3))
    order: list[str] = []
    while engine.has_work:
        order += [output.request_id for output in engine.step() if output.finish_reason]
    assert order == ["0", "1", "2", "3", "4", "5"]


@pytest.mark.parametrize(
    ("prompt", "sampling", "word"),
    [
        ([], {}, "no tokens"),
        ([1] * 41, {}, "sequences of 40"),
        ([1] * 40, {}, "sequences of 40"),
        ([97], {}, "outside"),
        ([-1], {}, "outside"),
        ([1], {"seed": 2**64}, "seed"),
        ([1], {"temperature": float("nan")}, "temperature"),
        ([1], {"top_k": 2**31}, "top_k"),
        ([1], {"num_logprobs": 1000}, "num_logprobs"),
    ],
)
def test_what_can_never_be_served_is_refused(prompt: list[int], sampling: dict[str, Any], word: str) -> None:
    engine, executor = make_engine(num_blocks=10, max_model_len=64)  # ten blocks of four tokens hold 40
    engine.submit(make_request("bad", prompt, **sampling))
    engine.submit(make_request("good", [1], max_tokens=2))
    outputs = run(engine)
    assert outputs["bad"][0].finish_reason == "error"
    assert word in (outputs["bad"][0].error or "")
    assert outputs["good"][-1].finish_reason == "length"
    assert_nothing_held(engine, executor)


def test_prompt_that_fills_the_model_can_be_scored() -> None:
    engine, _ = make_engine(max_model_len=40)
    engine.submit(make_request("a", [1] * 40, max_tokens=0, num_prompt_logprobs=0))
    [output] = run(engine)["a"]
    assert output.finish_reason == "length"
    assert len(output.prompt_logprobs or ()) == 39


def test_id_in_use_is_not_taken() -> None:
    engine, _ = make_engine()
    engine.submit(make_request("a", [1], max_tokens=2))
    with pytest.raises(InvalidRequest, match="in use"):
        engine.submit(make_request("a", [1], max_tokens=2))
    assert len(run(engine)["a"]) == 2


def test_step_that_fails_once_costs_nobody_a_token() -> None:
    engine, executor = make_engine(max_num_seqs=2)
    for i in range(3):
        engine.submit(make_request(str(i), [i], max_tokens=4))
    engine.step()
    executor.fail_next = True
    outputs = run(engine)
    for i in range(3):
        tokens = tokens_of(outputs[str(i)])
        assert tokens == expected_tokens([i], 4)[-len(tokens) :]
        assert outputs[str(i)][-1].finish_reason == "length"
    assert_nothing_held(engine, executor)


@pytest.mark.parametrize("num_others", [0, 1, 6])
def test_request_that_makes_the_step_fail_fails_alone(num_others: int) -> None:
    engine, executor = make_engine()
    executor.poison = {99}
    for i in range(num_others):
        engine.submit(make_request(str(i), [i] * (i + 1), max_tokens=6))
    engine.step()
    engine.submit(make_request("bad", [50, 51], max_tokens=6, seed=99))
    engine.submit(make_request("late", [60, 61], max_tokens=6))
    outputs = run(engine)
    [bad] = outputs["bad"]
    assert bad.finish_reason == "error"
    assert "made to fail" in (bad.error or "")
    assert tokens_of(outputs["late"]) == expected_tokens([60, 61], 6)
    assert all(outputs[str(i)][-1].finish_reason == "length" for i in range(num_others))
    assert_nothing_held(engine, executor)


def test_two_bad_requests_and_a_bad_decode() -> None:
    engine, executor = make_engine()
    for i in range(8):
        engine.submit(make_request(str(i), [i], max_tokens=6, seed=i))
    first = {output.request_id: list(output.token_ids) for output in engine.step()}
    executor.poison = {3, 4}
    outputs = run(engine)
    for i in range(8):
        if i in executor.poison:
            assert [output.finish_reason for output in outputs[str(i)]] == ["error"]
        else:
            assert first[str(i)] + tokens_of(outputs[str(i)]) == expected_tokens([i], 6, seed=i)
    assert_nothing_held(engine, executor)


def test_aborted_step_is_planned_again() -> None:
    engine, executor = make_engine()
    for i in range(4):
        engine.submit(make_request(str(i), [i] * 5, max_tokens=6))
    engine.step()
    executor.abort_next = True
    engine.abort(["1"])
    assert [(output.request_id, output.finish_reason) for output in engine.step()] == [("1", "abort")]
    outputs = run(engine)
    assert {i: tokens_of(outputs[str(i)]) for i in (0, 2, 3)} == {i: expected_tokens([i] * 5, 6)[1:] for i in (0, 2, 3)}
    assert_nothing_held(engine, executor)


def test_abort_ends_running_and_waiting_once() -> None:
    engine, executor = make_engine(max_num_seqs=1)
    engine.submit(make_request("running", [1], max_tokens=50))
    engine.submit(make_request("waiting", [1], max_tokens=50))
    engine.step()
    engine.abort(["running", "waiting", "running", "unknown"])
    assert [(o.request_id, o.finish_reason) for o in engine.step()] == [("running", "abort"), ("waiting", "abort")]
    engine.abort(["running"])
    assert not engine.has_work
    assert_nothing_held(engine, executor)


def test_control() -> None:
    engine, executor = make_engine()
    assert engine.control("check_integrity", {}) == {"num_blocks_used": 0}
    assert engine.control("info", {})["vocab_size"] == 97
    assert engine.control("stats", {})["num_blocks"] == 64
    with pytest.raises(InvalidRequest, match="unknown engine command"):
        engine.control("dance", {})
    executor.block_pool._free.pop()
    with pytest.raises(Exception, match="lost"):
        engine.control("check_integrity", {})
