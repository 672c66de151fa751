"""When a sequence got on, as the engine tells it; and the steps that a client is told of."""

from __future__ import annotations

import msgspec

from llmserve.client.exchange import Exchange
from llmserve.client.wire import StepMessage
from llmserve.engine.engine import Engine
from llmserve.types import EngineStats, Output, RequestTiming
from tests.engine.test_engine import Clock, make_engine, make_request


def run(engine: Engine, clock: Clock) -> list[Output]:
    """Step to the end; each step takes a second, for it reads the clock when it begins and when it has collected."""
    outputs: list[Output] = []
    while engine.has_work:
        outputs += engine.step()
        clock.now_s += 1
    return outputs


def test_first_and_last_output_tell_the_times() -> None:
    clock = Clock()
    engine, _ = make_engine(clock=clock, max_num_tokens=8)
    engine.submit(make_request("a", [1] * 20, max_tokens=3, arrival_s=990.0))
    outputs = run(engine, clock)
    assert [output.timing for output in outputs] == [
        RequestTiming(990.0, 1000.0, 1002.0),  # the prompt takes three steps
        None,
        RequestTiming(990.0, 1000.0, 1002.0, 1004.0),
    ]


def test_an_answer_of_one_token_and_a_scored_prompt() -> None:
    clock = Clock()
    engine, _ = make_engine(clock=clock)
    engine.submit(make_request("one", [1, 2], max_tokens=1))
    engine.submit(make_request("scored", [1, 2], max_tokens=0, num_prompt_logprobs=0))
    timings = {output.request_id: output.timing for output in run(engine, clock)}
    assert timings["one"] == RequestTiming(1000.0, 1000.0, 1000.0, 1000.0)
    assert timings["scored"] == RequestTiming(1000.0, 1000.0, 0.0, 1000.0)


def test_what_ended_in_the_queue_was_never_scheduled() -> None:
    clock = Clock()
    engine, _ = make_engine(clock=clock, max_num_seqs=1)
    engine.submit(make_request("runs", [1], max_tokens=5))
    engine.submit(make_request("late", [1], max_tokens=5, deadline_s=1001.5))
    engine.submit(make_request("left", [1], max_tokens=5))
    engine.step()
    clock.now_s += 1
    engine.abort(["left"])
    ends = {output.request_id: output for output in run(engine, clock) if output.finish_reason is not None}
    assert (ends["left"].finish_reason, ends["left"].timing) == ("abort", RequestTiming(1000.0, 0.0, 0.0, 1001.0))
    assert (ends["late"].finish_reason, ends["late"].timing) == ("deadline", RequestTiming(1000.0, 0.0, 0.0, 1002.0))


def test_a_preemption_does_not_change_when_it_began() -> None:
    clock = Clock()
    engine, _ = make_engine(clock=clock, num_blocks=6)
    for name in "ab":
        engine.submit(make_request(name, [1, 2, 3], max_tokens=14))
    ends = [output for output in run(engine, clock) if output.finish_reason is not None]
    assert engine.stats().num_preemptions > 0
    assert [output.timing.scheduled_s for output in ends if output.timing is not None] == [1000.0, 1000.0]


def test_refused_requests_have_no_times() -> None:
    engine, _ = make_engine()
    engine.submit(make_request("a", []))
    [output] = engine.step()
    assert output.timing is None


def test_most_outputs_stay_small() -> None:
    assert len(msgspec.msgpack.encode(Output(request_id="a", token_ids=(1,)))) < 32


def test_each_step_is_told_once() -> None:
    told: list[int] = []
    exchange = Exchange(lambda message: None)
    exchange.on_step = lambda stats: told.append(stats.last_step_tokens)
    for num_steps, tokens in ((1, 10), (1, 10), (2, 5)):  # the second message brings outputs and no step
        exchange.receive(StepMessage([], EngineStats(num_steps=num_steps, last_step_tokens=tokens)))
    assert told == [10, 5]
