"""Who goes first, who shares blocks, who is refused: the scheduler's policies, one by one."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve.engine.fair_share import MAX_ABSENT, FairShare
from llmserve.engine.waiting_queue import MAX_PASSES, PATIENCE_S
from llmserve.types import Output
from tests.engine.test_engine import (
    Clock,
    assert_nothing_held,
    expected_tokens,
    make_engine,
    make_request,
    run,
    tokens_of,
)

PREFIX = [7] * 20


def order_of_ends(engine: Any, clock: Clock | None = None, *, step_s: float = 0.0) -> list[str]:
    order: list[str] = []
    while engine.has_work:
        order += [output.request_id for output in engine.step() if output.finish_reason]
        if clock is not None:
            clock.now_s += step_s
    return order


def test_urgent_requests_go_first_then_arrival() -> None:
    engine, _ = make_engine(max_num_seqs=1)
    for number, priority in enumerate([0, 3, -1, 3, 0, -1]):
        engine.submit(make_request(f"{number}", [number], max_tokens=2, priority=priority))
    assert order_of_ends(engine) == ["2", "5", "0", "4", "1", "3"]


def test_waiting_counts_as_priority() -> None:
    clock = Clock()
    engine, _ = make_engine(max_num_seqs=1, clock=clock, policy={"ageing_s": 10.0})
    engine.submit(make_request("patient", [1], max_tokens=1, priority=3))
    order: list[str] = []
    for number in range(100):
        engine.submit(make_request(str(number), [2], max_tokens=1, priority=0))
        order += [output.request_id for output in engine.step()]
        clock.now_s += 1
    assert 29 <= order.index("patient") <= 32


def test_age_does_not_outrank_a_share() -> None:
    clock = Clock()
    engine, _ = make_engine(max_num_seqs=1, clock=clock, policy={"ageing_s": 1.0})
    for number in range(50):
        engine.submit(make_request(f"flood {number}", [1], max_tokens=4, tenant="flood"))
    for _ in range(10):
        engine.step()
        clock.now_s += 1
    engine.submit(make_request("guest", [2], max_tokens=4, tenant="guest"))
    order = order_of_ends(engine, clock, step_s=0.001)
    assert order.index("guest") <= 1


@pytest.mark.parametrize("num_tenants", [2, 5])
@pytest.mark.parametrize("max_num_seqs", [1, 4])
def test_saturating_tenants_get_equal_shares(num_tenants: int, max_num_seqs: int) -> None:
    """However long their requests are, within five per cent of each other."""
    clock = Clock()
    engine, _ = make_engine(max_num_seqs=max_num_seqs, num_blocks=256, clock=clock)
    served: Counter[str] = Counter()
    numbers: Counter[str] = Counter()
    for step in range(4000 * num_tenants // max_num_seqs):
        for tenant in range(num_tenants):
            while numbers[f"{tenant}"] - served[f"ended {tenant}"] < 3 * max_num_seqs:
                number = numbers[f"{tenant}"] = numbers[f"{tenant}"] + 1
                prompt = [tenant, number % 97, number // 97 % 97] + [tenant] * (tenant * 5)
                request_id = f"{tenant}/{number}"
                engine.submit(make_request(request_id, prompt, max_tokens=2 + tenant * 3, tenant=f"{tenant}"))
        for output in engine.step():
            tenant_name = output.request_id.split("/")[0]
            served[tenant_name] += len(output.token_ids)
            if output.finish_reason:
                served[tenant_name] += 3 + int(tenant_name) * 5
                served[f"ended {tenant_name}"] += 1
        clock.now_s += 0.001 * (step % 3)
    shares = [served[f"{tenant}"] for tenant in range(num_tenants)]
    assert max(shares) <= 1.05 * min(shares), shares


@settings(max_examples=4, deadline=None)
@given(data=st.data(), max_num_seqs=st.integers(1, 4), ageing_s=st.sampled_from([0.5, 5.0]))
def test_nobody_starves(data: st.DataObject, max_num_seqs: int, ageing_s: float) -> None:
    """Under endless arrivals of random priorities and tenants, new ones every time, all are served in bounded time."""
    clock = Clock()
    engine, executor = make_engine(max_num_seqs=max_num_seqs, clock=clock, policy={"ageing_s": ageing_s})
    random = data.draw(st.randoms(use_true_random=False))
    arrived: dict[str, int] = {}
    longest = 0
    for step in range(1000):
        if engine.stats().num_waiting < 20:
            request_id = str(step)
            tenant = random.choice(["", "a", f"new {step}"])
            arrived[request_id] = step
            request = make_request(
                request_id,
                [step % 97] * random.randint(1, 9),
                max_tokens=3,
                priority=random.randint(-3, 3),
                tenant=tenant,
            )
            engine.submit(request)
        for output in engine.step():
            if output.finish_reason:
                longest = max(longest, step - arrived.pop(output.request_id))
        clock.now_s += 0.1
    longest = max([longest, *(1000 - step for step in arrived.values())])
    # Up to six priorities of age, the patience of a tenant, and then whoever is no less entitled.
    assert longest * 0.1 <= 6 * ageing_s + 2 * PATIENCE_S
    engine.abort_all()
    engine.step()
    assert_nothing_held(engine, executor)


def test_counters_of_absent_tenants_are_bounded_and_forgotten_when_idle() -> None:
    shares = FairShare()
    resident = shares.enter("resident")
    debtor = shares.enter("debtor")
    debtor.num_tokens = 500
    shares.leave(debtor)
    assert shares.enter("debtor").num_tokens == 500
    shares.leave(shares._present["debtor"])
    for number in range(MAX_ABSENT + 10):
        shares.leave(shares.enter(f"guest {number}"))
    assert len(shares._absent) == MAX_ABSENT
    resident.num_tokens = 70
    assert shares.enter("newcomer").num_tokens == 70
    shares.leave(shares._present["newcomer"])
    shares.leave(resident)
    assert (len(shares), len(shares._absent)) == (0, 0)


def test_deadline_in_queue_prefill_and_decode() -> None:
    clock = Clock()
    engine, executor = make_engine(max_num_seqs=2, max_num_tokens=8, clock=clock)
    engine.submit(make_request("decodes", [1], max_tokens=100, deadline_s=clock() + 5))
    engine.submit(make_request("prefills", [2] * 100, max_tokens=2, deadline_s=clock() + 5))
    engine.submit(make_request("waits", [3], max_tokens=2, deadline_s=clock() + 5))
    engine.submit(make_request("late", [3], max_tokens=2, deadline_s=clock() - 1))
    assert {(output.request_id, output.finish_reason) for output in engine.step()} == {
        ("late", "deadline"),
        ("decodes", None),
    }
    clock.now_s += 4.999
    assert {output.finish_reason for output in engine.step()} == {None}
    clock.now_s += 0.001
    assert {(output.request_id, output.finish_reason, output.token_ids) for output in engine.step()} == {
        (name, "deadline", ()) for name in ("decodes", "prefills", "waits")
    }
    assert_nothing_held(engine, executor)


def test_full_queue_refuses_at_once() -> None:
    engine, executor = make_engine(max_num_seqs=1, policy={"max_num_waiting": 2})
    engine.submit(make_request("0", [1], max_tokens=2))
    engine.step()
    for number in range(1, 4):
        engine.submit(make_request(str(number), [1], max_tokens=2))
    refused = [output for output in engine.step() if output.error]
    assert [(output.request_id, output.finish_reason, output.error_kind) for output in refused] == [
        ("3", "error", "Overloaded")
    ]
    assert [outputs[-1].finish_reason for outputs in run(engine).values()] == ["length"] * 2
    assert_nothing_held(engine, executor)


def test_shared_prefix_is_computed_once() -> None:
    engine, executor = make_engine(block_size=4)
    engine.submit(make_request("first", [*PREFIX, 1, 2], max_tokens=3))
    first = run(engine)["first"]
    num_steps = len(executor.steps)
    engine.submit(make_request("second", [*PREFIX, 3, 4], max_tokens=3))
    second = run(engine)["second"]
    assert [output.num_cached_tokens for output in first] == [0, 0, 0]
    assert [output.num_cached_tokens for output in second] == [20, 0, 0]
    assert len(executor.steps[num_steps].token_ids) == 2
    assert tokens_of(second) == expected_tokens([*PREFIX, 3, 4], 3)
    assert (engine.stats().num_cache_queries, engine.stats().num_cache_hits) == (44, 20)
    assert_nothing_held(engine, executor)


def test_full_hit_computes_one_token_and_answers_are_cached_too() -> None:
    engine, executor = make_engine(block_size=4)
    engine.submit(make_request("first", PREFIX, max_tokens=9))
    answer = tokens_of(run(engine)["first"])
    engine.submit(make_request("again", PREFIX, max_tokens=9))
    engine.submit(make_request("turn", [*PREFIX, *answer, 5], max_tokens=1))
    outputs = run(engine)
    assert tokens_of(outputs["again"]) == answer
    assert outputs["again"][0].num_cached_tokens == 16
    assert outputs["turn"][0].num_cached_tokens == 28
    assert_nothing_held(engine, executor)


@pytest.mark.parametrize(
    "other", [{"tenant": "b"}, {"cache_salt": "s"}, {"tenant": "ab", "cache_salt": ""}, {"num_prompt_logprobs": 0}]
)
def test_prefixes_are_not_shared(other: dict[str, Any]) -> None:
    engine, _ = make_engine()
    engine.submit(make_request("first", PREFIX, max_tokens=2, tenant="a", cache_salt="b"))
    run(engine)
    engine.submit(make_request("second", PREFIX, max_tokens=2, **({"tenant": "a", "cache_salt": "b"} | other)))
    [output, _] = run(engine)["second"]
    assert output.num_cached_tokens == 0
    if "num_prompt_logprobs" in other:
        assert len(output.prompt_logprobs or ()) == len(PREFIX) - 1


def test_cache_can_be_turned_off() -> None:
    engine, _ = make_engine(policy={"enable_prefix_cache": False})
    for request_id in ("first", "second"):
        engine.submit(make_request(request_id, PREFIX, max_tokens=2))
        assert run(engine)[request_id][0].num_cached_tokens == 0
    assert engine.stats().num_cache_queries == 0


def test_cached_ones_go_before_but_not_for_ever() -> None:
    engine, _ = make_engine(max_num_seqs=1, num_blocks=200)
    engine.submit(make_request("warm", PREFIX, max_tokens=1))
    run(engine)
    engine.submit(make_request("busy", [50], max_tokens=1))
    engine.submit(make_request("cold", [51] * 20, max_tokens=1))
    for number in range(20):
        engine.submit(make_request(f"hit {number}", [*PREFIX, number], max_tokens=1))
    order = order_of_ends(engine)
    assert order.index("cold") in (MAX_PASSES, MAX_PASSES + 1)
    assert [name for name in order if name.startswith("hit")] == [f"hit {number}" for number in range(20)]


@pytest.mark.parametrize("length", [1, 5, 16, 17, 32])
def test_children_fork_their_parents_prompt(length: int) -> None:
    engine, executor = make_engine(num_blocks=200)
    prompt = list(range(length))
    engine.submit(make_request("parent", prompt, max_tokens=6, seed=1))
    for number in range(3):
        engine.submit(make_request(f"child {number}", prompt, max_tokens=6, seed=2 + number, parent_id="parent"))
    outputs = run(engine)
    for seed, name in enumerate(["parent", "child 0", "child 1", "child 2"], start=1):
        assert tokens_of(outputs[name]) == expected_tokens(prompt, 6, seed)
        assert outputs[name][0].num_cached_tokens == (0 if name == "parent" else length - 1)
    num_computed = sum(len(step.token_ids) for step in executor.steps)
    assert num_computed == length + 3 + 4 * 5, "the prompt once, and its last token for each child"
    assert_nothing_held(engine, executor)


@pytest.mark.parametrize("change", ["abort", "other prompt", "other tenant", "scores", "one place"])
def test_child_that_cannot_fork_is_computed(change: str) -> None:
    engine, executor = make_engine(max_num_seqs=1 if change == "one place" else 8, max_num_tokens=8)
    child: dict[str, Any] = {"num_prompt_logprobs": 0} if change == "scores" else {}
    child["tenant"] = "x" if change == "other tenant" else ""
    prompt = [*PREFIX, 9] if change == "other prompt" else PREFIX
    engine.submit(make_request("parent", PREFIX, max_tokens=6, seed=1))
    engine.submit(make_request("child", prompt, max_tokens=6, seed=2, parent_id="parent", **child))
    engine.step()
    if change == "abort":
        engine.abort(["parent"])
    outputs = run(engine)["child"]
    assert tokens_of(outputs) == expected_tokens(prompt, 6, 2)
    assert_nothing_held(engine, executor)


def test_lowest_priority_then_newest_is_preempted() -> None:
    engine, executor = make_engine(num_blocks=12, max_model_len=48, block_size=4)
    for name, priority in [("low", 1), ("old", 0), ("new", 0)]:
        engine.submit(make_request(name, [1] * 7, max_tokens=30, priority=priority, tenant=name))
    gone: list[str] = []
    known = {"low", "old", "new"}
    outputs: dict[str, list[Output]] = {}
    while engine.has_work:
        for output in engine.step():
            outputs.setdefault(output.request_id, []).append(output)
        running = {seq.request_id for seq in engine._scheduler.running}
        gone += [seq.request_id for seq in engine._scheduler.waiting if seq.request_id not in gone]
        known &= running | {"low", "old", "new"}
    assert gone[:2] == ["low", "new"]
    assert all(tokens_of(found) == expected_tokens([1] * 7, 30) for found in outputs.values())
    assert_nothing_held(engine, executor)


def test_free_places_count_before_the_queue_is_full() -> None:
    engine, executor = make_engine(max_num_seqs=2, policy={"max_num_waiting": 1})
    for number in range(4):
        engine.submit(make_request(str(number), [1], max_tokens=2))
    outputs = run(engine)
    refused = [name for name, own in outputs.items() if own[-1].error_kind == "Overloaded"]
    assert refused == ["3"]
    assert_nothing_held(engine, executor)
