"""What the engine does, step by step, as a file for a trace viewer (chrome://tracing, Perfetto).

Format: Trace Event Format, JSON array, one event a line. Two tracks: `steps` with a span for each step and in it plan,
build, launch and collect; `nodes` with the time of each kind of node in a launch, laid end to end (how much, not when).
Counters show sequences and blocks, and each request is an asynchronous span with queued, prefill and decode in it.
Times are microseconds of the monotonic clock that all processes of a machine share.

Invariants: the file only grows, by whole steps, so what a killed process leaves is an array that lacks its end, which
viewers read; a trace that cannot be written any more stops, the engine does not. An engine without a trace pays one
comparison a step.
"""

from __future__ import annotations

import contextlib
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from llmserve.engine.plan import Plan
from llmserve.engine.runner import ModelRunner, StepResult
from llmserve.engine.sequence import Sequence
from llmserve.errors import InvalidRequest
from llmserve.ops.protocol import Executor
from llmserve.types import EngineStats, Output

_STEPS, _NODES = 1, 2
_LINE_END = b",\n"
_TAIL_BYTES = 1 << 16
_log = logging.getLogger(__name__)


class TraceFile:
    """A growing array of events. One that an earlier process left is continued."""

    def __init__(self, path: Path) -> None:
        """Raises `InvalidRequest` when the file cannot be written."""
        self._lines: list[bytes] = []
        self._file: int | None = None
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
            self._cut_end(self._file)
        except OSError as error:
            self._close()
            raise InvalidRequest(f"trace {path}: {(error.strerror or str(error)).lower()}", param="trace") from error

    @property
    def is_open(self) -> bool:
        return self._file is not None

    def add(self, event: dict[str, Any]) -> None:
        """Take an event; `flush` writes it."""
        if self._file is not None:
            self._lines.append(msgspec.json.encode(event))

    def flush(self) -> None:
        """Write what was added, in one piece."""
        if self._lines:
            self._write(_LINE_END.join(self._lines) + _LINE_END)
            self._lines.clear()

    def close(self, last: dict[str, Any]) -> None:
        """Write the last event and the end of the array. Harmless when called again."""
        self.flush()
        self._write(msgspec.json.encode(last) + b"\n]\n")
        self._close()

    @staticmethod
    def _cut_end(file: int) -> None:
        """Leave whole lines only, none of them the end of the array."""
        size = os.fstat(file).st_size
        start = max(0, size - _TAIL_BYTES)
        found = os.pread(file, size - start, start).rfind(_LINE_END)
        os.ftruncate(file, 0 if found < 0 else start + found + len(_LINE_END))
        if found < 0:
            os.write(file, b"[\n")

    def _write(self, data: bytes) -> None:
        if self._file is None:
            return
        try:
            written = os.write(self._file, data)
            if written < len(data):
                os.write(self._file, data[written:])
        except OSError as error:
            _log.warning("the trace ends here: %s", error)
            self._close()

    def _close(self) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None


class StepTrace:
    """Turns what the engine does into events. The engine calls it in this order: `accept` any time, then for a step
    `begin_step`, the runner's spans, `end_step`; for a step without a plan only `end_step`.
    """

    def __init__(self, path: Path, *, name: str = "engine") -> None:
        """Raises `InvalidRequest` when the file cannot be written."""
        self._file = TraceFile(path)
        self._pid = os.getpid()
        self._phases: dict[str, str] = {}
        self._plan: Plan | None = None
        self._started_s = 0.0
        self._num_accepted = 0
        self._announce("process_name", 0, f"llmserve {name}")
        self._announce("thread_name", _STEPS, "steps")
        self._announce("thread_name", _NODES, "nodes")

    def accept(self, seq: Sequence) -> None:
        """A request became a sequence."""
        self._phases[seq.request_id] = "queued"
        args = {"num_prompt_tokens": seq.num_prompt_tokens, "priority": seq.priority}
        self._async("b", "request", seq.request_id, seq.arrival_s, args)
        self._async("b", "queued", seq.request_id, seq.arrival_s)

    def begin_step(self, plan: Plan, started_s: float) -> None:
        """A plan is ready; planning began at `started_s`."""
        self._plan, self._started_s = plan, started_s
        self._complete("plan", _STEPS, started_s, time.monotonic())
        for chunk in plan.chunks:
            request_id, scheduled_s = chunk.seq.request_id, chunk.seq.scheduled_s
            if self._phases.get(request_id) == "queued":
                self._enter(request_id, "prefill", scheduled_s)

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """A part of the step that runs in the body."""
        started_s = time.monotonic()
        try:
            yield
        finally:
            self._complete(name, _STEPS, started_s, time.monotonic())

    def add_nodes(self, started_s: float, times: dict[str, tuple[float, int]]) -> None:
        """Seconds and number of steps by kind of node, of the run that began at `started_s`."""
        for kind, (seconds, _) in times.items():
            self._complete(kind, _NODES, started_s, started_s + seconds)
            started_s += seconds

    def end_step(self, outputs: list[Output], stats: EngineStats) -> None:
        """The outputs of a step are known; everything so far is written."""
        now_s = time.monotonic()
        if self._plan is not None:
            args = {
                "step": stats.num_steps,
                "num_tokens": self._plan.num_tokens,
                "num_seqs": self._plan.num_sequences,
                "num_blocks": stats.num_blocks_used,
            }
            if self._plan.verifications:
                args["num_draft_tokens"] = self._plan.num_draft_tokens
                args["num_accepted_tokens"] = stats.drafts.num_accepted_tokens - self._num_accepted
                self._num_accepted = stats.drafts.num_accepted_tokens
            self._complete("step", _STEPS, self._started_s, now_s, args)
            self._plan = None
        for output in outputs:
            if output.timing is not None:
                self._advance(output)
        self._counter("sequences", now_s, {"running": stats.num_running, "waiting": stats.num_waiting})
        self._counter("blocks", now_s, {"used": stats.num_blocks_used})
        self._file.flush()

    def close(self) -> None:
        """End the file. Harmless when called again."""
        ts = _microseconds(time.monotonic())
        self._file.close({"name": "end", "ph": "i", "s": "p", "ts": ts, "pid": self._pid, "tid": _STEPS})

    def _advance(self, output: Output) -> None:
        """Follow a request into its next phase, or out of the last."""
        timing, request_id = output.timing, output.request_id
        if timing is None or request_id not in self._phases:
            return
        if timing.first_token_s and self._phases[request_id] != "decode":
            self._enter(request_id, "decode", timing.first_token_s)
        if output.finish_reason is not None:
            self._async("e", self._phases.pop(request_id), request_id, timing.end_s)
            args = {"finish_reason": output.finish_reason} | ({"error": output.error} if output.error else {})
            self._async("e", "request", request_id, timing.end_s, args)

    def _enter(self, request_id: str, phase: str, at_s: float) -> None:
        self._async("e", self._phases[request_id], request_id, at_s)
        self._async("b", phase, request_id, at_s)
        self._phases[request_id] = phase

    def _complete(
        self, name: str, track: int, started_s: float, ended_s: float, args: dict[str, Any] | None = None
    ) -> None:
        ts = _microseconds(started_s)  # both ends are rounded down: a part never ends after the whole
        event = {"name": name, "ph": "X", "ts": ts, "dur": _microseconds(ended_s) - ts, "pid": self._pid, "tid": track}
        self._file.add(event | ({"args": args} if args else {}))

    def _async(self, kind: str, name: str, request_id: str, at_s: float, args: dict[str, Any] | None = None) -> None:
        event = {"name": name, "cat": "request", "ph": kind, "id": request_id, "ts": _microseconds(at_s)}
        event |= {"pid": self._pid, "tid": _STEPS}
        self._file.add(event | ({"args": args} if args else {}))

    def _counter(self, name: str, at_s: float, values: dict[str, int]) -> None:
        self._file.add({"name": name, "ph": "C", "ts": _microseconds(at_s), "pid": self._pid, "args": values})

    def _announce(self, what: str, track: int, name: str) -> None:
        self._file.add({"name": what, "ph": "M", "pid": self._pid, "tid": track, "args": {"name": name}})


class TracedRunner(ModelRunner):
    """Runs plans as its base does, and writes spans of it."""

    def __init__(self, executor: Executor, trace: StepTrace) -> None:
        super().__init__(executor)
        self._trace = trace
        self._program: Any = getattr(executor, "program", None)
        self._take_times = getattr(self._program, "take_times", dict)

    def launch(self, plan: Plan) -> None:
        """Start the step; the time of its nodes is known afterwards, for this executor runs in line."""
        with self._trace.span("build"):
            step = self._builder.build(plan)
        started_s = time.monotonic()
        self._take_times()
        try:
            with self._trace.span("launch"):
                self._executor.launch(step)
        finally:
            # A launch may wait for its turn before it runs.
            self._trace.add_nodes(getattr(self._program, "last_start_s", started_s), self._take_times())

    def collect(self) -> StepResult:
        """Wait for the step launched last."""
        with self._trace.span("collect"):
            return super().collect()


def _microseconds(at_s: float) -> int:
    return int(at_s * 1e6)
