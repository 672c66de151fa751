"""The loop that drives an engine: receive → drain → step → one message for all requests of the step.

It knows an engine only by what it calls on it, so the child process and the in-process thread run the same loop.
Invariant: it blocks in `receive` only while the engine has no work.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from llmserve.client.wire import Abort, Control, ControlReply, FromEngine, Shutdown, StepMessage, Submit, ToEngine
from llmserve.client.wire import error_kind as kind_of
from llmserve.errors import LLMServeError
from llmserve.types import EngineStats, Output, Request

_log = logging.getLogger(__name__)


class DrivenEngine(Protocol):
    """What the loop needs of an engine."""

    @property
    def has_work(self) -> bool: ...

    def submit(self, request: Request) -> None: ...

    def abort(self, request_ids: Iterable[str]) -> None: ...

    def abort_all(self) -> None: ...

    def step(self) -> list[Output]: ...

    def stats(self) -> EngineStats: ...

    def control(self, command: str, args: dict[str, Any]) -> dict[str, Any]: ...


class Receive(Protocol):
    """All messages that have arrived, in order; with `wait`, at least one."""

    def __call__(self, *, wait: bool) -> list[ToEngine]: ...


def drive(
    engine: DrivenEngine,
    receive: Receive,
    send: Callable[[FromEngine], None],
    *,
    on_idle: Callable[[], None],
    on_taken: Callable[[], None] = lambda: None,
) -> None:
    """Serve until a `Shutdown` arrives.

    `on_idle` is called before the loop goes to sleep, `on_taken` once for each request, before a step computes it.
    """
    while True:
        if not engine.has_work:
            on_idle()
        for message in receive(wait=not engine.has_work):
            if isinstance(message, Shutdown):
                engine.abort_all()
                _step(engine, send)
                return
            if isinstance(message, Submit):
                on_taken()
            _handle(engine, message, send)
        _step(engine, send)


def _step(engine: DrivenEngine, send: Callable[[FromEngine], None]) -> None:
    if engine.has_work:
        outputs = engine.step()
        send(StepMessage(outputs, engine.stats()))


def _handle(engine: DrivenEngine, message: Submit | Abort | Control, send: Callable[[FromEngine], None]) -> None:
    if isinstance(message, Submit):
        try:
            engine.submit(message.request)
        except LLMServeError as error:
            _log.warning("request not taken request_id=%s reason=%s", message.request.request_id, error)
    elif isinstance(message, Abort):
        engine.abort(message.request_ids)
    else:
        send(_control(engine, message))


def _control(engine: DrivenEngine, message: Control) -> ControlReply:
    try:
        return ControlReply(message.control_id, engine.control(message.command, message.args))
    except LLMServeError as error:
        return ControlReply(message.control_id, {}, str(error), kind_of(error))
