"""Deadlines, priorities, cache salts and overload over HTTP."""

from __future__ import annotations

import time
from collections.abc import Iterable

from llmserve.errors import Overloaded
from llmserve.types import Output, Request
from tests.service.scripted import Server, events, ids_of, says


def ends(reason_kind: str, message: str = "no place") -> Server:
    def script(request: Request) -> Iterable[Output]:
        return [Output(request_id=request.request_id, finish_reason="error", error=message, error_kind=reason_kind)]

    return Server(script)


def late(num_tokens: int) -> Server:
    """An engine that reaches the deadline after so many tokens."""

    def script(request: Request) -> Iterable[Output]:
        token = Output(request_id=request.request_id, token_ids=tuple(ids_of("a")))
        return [*[token] * num_tokens, Output(request_id=request.request_id, finish_reason="deadline")]

    return Server(script)


def test_urgency_reaches_the_engine() -> None:
    server = Server(says("a"))
    before_s = time.monotonic()
    assert server.complete(priority=-3, cache_salt="tenant", deadline_ms=1500).status_code == 200
    [request] = server.client.requests
    assert (request.priority, request.cache_salt) == (-3, "tenant")
    assert request.deadline_s is not None
    assert before_s + 1.5 <= request.deadline_s <= time.monotonic() + 1.5
    assert server.complete().status_code == 200
    assert server.client.requests[-1].deadline_s is None


def test_bounds_are_named() -> None:
    server = Server(says("a"))
    for body in ({"deadline_ms": 0}, {"deadline_ms": 1.5}, {"cache_salt": ""}, {"priority": 2**31}):
        response = server.chat(**body)
        assert (response.status_code, response.json()["error"]["param"]) == (400, next(iter(body)))


def test_deadline_before_the_first_byte_is_a_408() -> None:
    for stream in (False, True):
        response = late(0).complete(deadline_ms=10, stream=stream)
        assert (response.status_code, response.json()["error"]["code"]) == (408, "deadline_exceeded")
    assert late(2).complete(deadline_ms=10).status_code == 408


def test_deadline_after_the_first_byte_is_an_event() -> None:
    response = late(2).complete(deadline_ms=10, stream=True)
    assert response.status_code == 200
    assert events(response)[-1]["error"]["code"] == "deadline_exceeded"


def test_full_queue_is_a_429_that_says_when_to_come_back() -> None:
    server = Server(says("a"))
    server.client.full = Overloaded("9 requests wait already", retry_after_s=7.0)
    response = server.chat()
    assert (response.status_code, response.headers["retry-after"]) == (429, "7")
    assert response.json()["error"]["code"] == "overloaded"
    assert not server.client.requests


def test_refusals_of_the_engine_keep_their_kind() -> None:
    refused = ends("Overloaded").complete(stream=True)
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    assert ends("InvalidRequest").complete().status_code == 400
    assert ends("").complete().status_code == 500
