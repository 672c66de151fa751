"""The trace of the engine: an array that viewers load, spans that nest, requests whose spans all end."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest

from llmserve.config import ExecutorConfig
from llmserve.engine.engine import Engine
from llmserve.engine.scheduler import SchedulerConfig
from llmserve.engine.trace import StepTrace
from llmserve.errors import InvalidRequest
from tests.engine.fake_executor import FakeExecutor, fake_info
from tests.engine.test_engine import make_engine, make_request, run

Event = dict[str, Any]
CONFIG = ExecutorConfig(max_num_tokens=16, max_num_seqs=4, max_logit_rows=8, max_model_len=128, block_size=4)


class Program:
    """Tells the same times for every step."""

    def take_times(self) -> dict[str, tuple[float, int]]:
        return {"Gemm": (2e-6, 1), "Attention": (1e-6, 1)}


def traced(path: Path, *, num_blocks: int = 64) -> tuple[Engine, FakeExecutor]:
    executor = FakeExecutor(CONFIG, num_blocks)
    scheduler = SchedulerConfig(max_num_tokens=16, max_num_seqs=4, max_logit_rows=8)
    return Engine(executor, scheduler, fake_info(CONFIG, num_blocks), trace=StepTrace(path)), executor


def load(path: Path) -> list[Event]:
    """As a viewer does: the end of the array may be missing."""
    text = path.read_text().rstrip()
    events: list[Event] = json.loads(text if text.endswith("]") else text.rstrip(",") + "]")
    return events


def spans(events: list[Event], name: str) -> list[Event]:
    return [event for event in events if event["ph"] == "X" and event["name"] == name]


def inside(part: Event, whole: Event) -> bool:
    return bool(whole["ts"] <= part["ts"] and part["ts"] + part["dur"] <= whole["ts"] + whole["dur"])


def assert_requests_end(events: list[Event]) -> None:
    """Every span that a request opened is closed, the inner ones before the outer one, never backwards in time."""
    opened: dict[str, list[str]] = {}
    clock: dict[str, int] = {}
    for event in events:
        if event["ph"] not in "be":
            continue
        name, request_id = event["name"], event["id"]
        assert event["ts"] >= clock.get(request_id, 0)
        clock[request_id] = event["ts"]
        if event["ph"] == "b":
            opened.setdefault(request_id, []).append(name)
        else:
            assert opened[request_id].pop() == name
    assert not any(opened.values())


def test_steps_and_their_parts_nest(tmp_path: Path) -> None:
    engine, _ = traced(tmp_path / "trace.json")
    for name in "abc":
        engine.submit(make_request(name, [1, 2, 3, 4, 5, 6, 7, 8], max_tokens=4))
    run(engine)
    engine.close()
    events = json.loads((tmp_path / "trace.json").read_text())
    steps = spans(events, "step")
    assert [step["args"]["step"] for step in steps] == list(range(1, engine.stats().num_steps + 1))
    assert steps[0]["args"] | {"num_blocks": 0} == {"step": 1, "num_tokens": 16, "num_seqs": 2, "num_blocks": 0}
    for step in steps:
        parts = [event for event in events if event["ph"] == "X" and event["tid"] == step["tid"] and event is not step]
        own = [part for part in parts if inside(part, step) and part["name"] != "step"]
        assert [part["name"] for part in own] == ["plan", "build", "launch", "collect"]
        assert all(first["ts"] + first["dur"] <= after["ts"] for first, after in itertools.pairwise(own))
    assert {event["name"] for event in events if event["ph"] == "C"} == {"sequences", "blocks"}


def test_phases_of_requests(tmp_path: Path) -> None:
    engine, _ = traced(tmp_path / "trace.json")
    for index in range(6):
        engine.submit(make_request(str(index), [index + 1] * 12, max_tokens=3))
    engine.submit(make_request("left", [1, 2], max_tokens=3))
    engine.submit(make_request("refused", []))
    engine.step()
    engine.abort(["left"])
    run(engine)
    events = load(tmp_path / "trace.json")
    assert_requests_end(events)
    phases = [event["name"] for event in events if event["ph"] == "b" and event["id"] == "0"]
    assert phases == ["request", "queued", "prefill", "decode"]
    ends = {event["id"]: event["args"]["finish_reason"] for event in events if event["ph"] == "e" and "args" in event}
    assert ends == {str(index): "length" for index in range(6)} | {"left": "abort"}


def test_preempted_aborted_and_failed_steps(tmp_path: Path) -> None:
    engine, executor = traced(tmp_path / "trace.json", num_blocks=8)
    executor.poison = {7}
    for index in range(4):
        engine.submit(make_request(str(index), [1, 2, 3], max_tokens=16, seed=7 if index == 2 else index))
    executor.abort_next = True
    run(engine)
    assert engine.stats().num_preemptions > 0
    events = load(tmp_path / "trace.json")
    assert_requests_end(events)
    [failed] = [event for event in events if event.get("args", {}).get("finish_reason") == "error"]
    assert failed["id"] == "2"
    assert "made to fail" in failed["args"]["error"]
    steps = spans(events, "step")
    assert all(any(inside(launch, step) for step in steps) for launch in spans(events, "launch"))


def test_times_of_nodes(tmp_path: Path) -> None:
    executor = FakeExecutor(CONFIG, 64)
    executor.program = Program()  # type: ignore[attr-defined]
    scheduler = SchedulerConfig(max_num_tokens=16, max_num_seqs=4, max_logit_rows=8)
    engine = Engine(executor, scheduler, fake_info(CONFIG, 64), trace=StepTrace(tmp_path / "trace.json"))
    engine.submit(make_request("a", [1], max_tokens=2))
    run(engine)
    events = load(tmp_path / "trace.json")
    gemms, attentions = spans(events, "Gemm"), spans(events, "Attention")
    assert len(gemms) == len(attentions) == 2
    assert all(gemm["ts"] + gemm["dur"] == other["ts"] for gemm, other in zip(gemms, attentions, strict=True))


def test_an_engine_that_is_started_again_continues_the_file(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    for name in ("a", "b", "c"):
        engine, _ = traced(path)
        engine.submit(make_request(name, [1], max_tokens=2))
        run(engine)
        if name == "a":
            engine.close()  # ends the array
        elif name == "b":
            path.write_bytes(path.read_bytes() + b'{"name": "ste')  # killed while it wrote
    engine.close()
    engine.close()
    events = json.loads(path.read_text())
    assert [event["id"] for event in events if event["ph"] == "b" and event["name"] == "request"] == ["a", "b", "c"]
    assert_requests_end(events)


def test_a_trace_that_cannot_be_written_is_refused_or_ends(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no such file"):
        StepTrace(tmp_path / "missing" / "trace.json")
    if not os.path.exists("/dev/full"):
        return
    with pytest.raises(InvalidRequest, match="trace /dev/full"):
        StepTrace(Path("/dev/full"))


def test_a_full_disk_ends_the_trace_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, _ = traced(tmp_path / "trace.json")
    engine.submit(make_request("a", [1], max_tokens=4))
    engine.step()

    def full(file: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llmserve.engine.trace.os.write", full)
    assert run(engine)["a"][-1].finish_reason == "length"
    engine.close()
    assert len(spans(load(tmp_path / "trace.json"), "step")) == 1


def test_no_trace_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    engine, _ = make_engine()
    engine.submit(make_request("a", [1], max_tokens=2))
    run(engine)
    engine.close()
    assert list(tmp_path.iterdir()) == []
