"""From a reply's bytes to what one request's user saw: tokens and times.

Definitions (docs/benchmarks.md has them for readers): TTFT is from before the connection to the first event with
text; ITL is each gap between events with text; TPOT is (E2E − TTFT) / (tokens − 1); E2E is to the end of the answer.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec

from llmserve.tools.bench_http import Reply


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    """One request. `failure` is None exactly when the answer was complete."""

    failure: str | None = None
    ttft_s: float = 0.0
    e2e_s: float = 0.0
    gaps_s: list[float] = field(default_factory=list)
    num_prompt_tokens: int = 0
    num_output_tokens: int = 0

    @property
    def tpot_s(self) -> float:
        """Time for each output token after the first."""
        return (self.e2e_s - self.ttft_s) / max(1, self.num_output_tokens - 1)


def read_trace(reply: Reply, *, expected_tokens: int | None) -> Trace:
    """Judge a streamed answer. With `expected_tokens` any other number of tokens is a failure."""
    if reply.failure is not None:
        return Trace(failure=reply.failure)
    times_s: list[float] = []
    usage: dict[str, Any] = {}
    finished = done = False
    try:
        for at_s, event in _events(reply):
            if event is None:
                done = True
                continue
            if "error" in event:
                return Trace(failure=f"error event: {_message(event)}")
            usage = event.get("usage") or usage
            for choice in event.get("choices") or ():
                finished = finished or choice.get("finish_reason") is not None
                if _text(choice):
                    times_s.append(at_s)
    except (msgspec.DecodeError, AttributeError, TypeError) as error:
        return Trace(failure=f"an event that is none: {error}")
    failure = _incomplete(times_s, usage, finished and done, expected_tokens)
    if failure is not None:
        return Trace(failure=failure)
    return Trace(
        ttft_s=times_s[0] - reply.started_s,
        e2e_s=reply.ended_s - reply.started_s,
        gaps_s=[after - before for before, after in itertools.pairwise(times_s)],
        num_prompt_tokens=int(usage.get("prompt_tokens") or 0),
        num_output_tokens=int(usage.get("completion_tokens") or len(times_s)),
    )


def _incomplete(times_s: list[float], usage: dict[str, Any], ended: bool, expected_tokens: int | None) -> str | None:
    if not ended:
        return "the stream ended without a finish reason and [DONE]"
    if not times_s:
        return "no text"
    num_tokens = usage.get("completion_tokens", len(times_s))
    if expected_tokens is not None and num_tokens != expected_tokens:
        return f"{num_tokens} tokens instead of {expected_tokens}"
    return None


def _events(reply: Reply) -> Iterator[tuple[float, dict[str, Any] | None]]:
    """Each event's time and JSON; None for the end mark."""
    for at_s, piece in reply.events:
        for line in piece.splitlines():
            if not line.startswith(b"data:"):
                continue  # a comment, an event name, the empty line
            data = line[5:].strip()
            yield at_s, None if data == b"[DONE]" else msgspec.json.decode(data)


def _text(choice: dict[str, Any]) -> Any:
    delta = choice.get("delta")
    return choice.get("text") if delta is None else delta.get("content") or delta.get("reasoning_content")


def _message(event: dict[str, Any]) -> str:
    error = event["error"]
    return str(error.get("message") if isinstance(error, dict) else error)
