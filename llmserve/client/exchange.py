"""The frontend's half of the talk with one engine: open streams, unanswered commands, last statistics.

Invariants: a request has an entry from `submit` until its terminal output or `fail_all`, also when its reader has
left or its deadline has passed; every stream ends once, at its deadline at the latest, whatever the engine does. When
no open request has a reader left, the engine is told to leave the step that it computes. All methods run on one event
loop; timers exist only while requests with deadlines do.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from typing import Any, Self

from llmserve.client.load import QueueLoad
from llmserve.client.wire import Abort, Control, ControlReply, StepMessage, Submit, ToEngine, restore_error
from llmserve.errors import InvalidRequest, LLMServeError
from llmserve.types import EngineInfo, EngineStats, Output, Request


class RequestStream:
    """The outputs of one request, as `client.protocol.OutputStream` says."""

    __slots__ = (
        "_abort", "_error", "_left", "_outputs", "_request_id", "_take", "_waiter", "deadline", "ended", "wanted"
    )  # fmt: skip

    def __init__(self, request_id: str, abort: Callable[[str], None]) -> None:
        self._request_id = request_id
        self._abort = abort
        self._outputs: deque[Output] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._take: Callable[[Output], bool] | None = None
        self._error: Exception | None = None
        self._left = False
        self.ended = False
        """Whether nothing more will arrive."""
        self.wanted = True
        """False once its reader has left or its deadline has passed."""
        self.deadline: asyncio.TimerHandle | None = None

    def push(self, output: Output) -> None:
        """Take an output; after the last one they are dropped."""
        if self.ended:
            return
        self.ended = output.finish_reason is not None
        if self._left:
            return
        if self._take is None:
            self._outputs.append(output)
        elif self._hand_over(output, self._take) and not self.ended:
            return
        self._wake()

    def fail(self, error: LLMServeError) -> None:
        """End the stream with an error, after the outputs that have arrived."""
        if self.ended:
            return
        self.ended = True
        self._error = error
        self._wake()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Output:
        while not self._outputs:
            if self._error is not None:
                error, self._error = self._error, None
                raise error
            if self.ended or self._left:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            except asyncio.CancelledError:
                await self.aclose()
                raise
        return self._outputs.popleft()

    async def forward(self, take: Callable[[Output], bool]) -> None:
        """Have `take` called with each output, as `client.protocol.OutputStream` says."""
        try:
            while self._outputs:
                if not self._hand_over(self._outputs.popleft(), take):
                    break
            if not (self.ended or self._left):
                self._take = take
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
            if self._error is not None:
                raise self._error
        finally:
            self._leave()

    async def aclose(self) -> None:
        """Leave; the request is aborted unless it has ended."""
        self._leave()
        self._error = None

    def _hand_over(self, output: Output, take: Callable[[Output], bool]) -> bool:
        """Whether `take` wants more. It must not disturb who delivers: other streams wait for their outputs."""
        try:
            goes_on = take(output)
        except Exception as error:  # noqa: BLE001 - raised by `forward`
            self._error = error
            goes_on = False
        if not goes_on:
            self._leave()
        return goes_on

    def _leave(self) -> None:
        if not self._left:
            self._left = True
            self._outputs.clear()
            if not self.ended:
                self._abort(self._request_id)
            self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Exchange:
    """Matches what an engine says to who asked."""

    def __init__(self, send: Callable[[ToEngine], None], abandon: Callable[[int], None] = lambda num: None) -> None:
        """`abandon(n)` is called when nobody waits for the first n requests sent to this engine any more."""
        self._send = send
        self._streams: dict[str, RequestStream] = {}
        self._replies: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._num_controls = 0
        self._abandon = abandon
        self._num_sent = 0
        self._num_wanted = 0
        self._load = QueueLoad()
        self.on_step: Callable[[EngineStats], None] = lambda stats: None
        self.stats = EngineStats()
        self.last_message_s = time.monotonic()
        """When the engine last finished a step, or stopped being idle."""

    @property
    def is_busy(self) -> bool:
        """Whether the engine holds a request."""
        return bool(self._streams)

    def check_capacity(self, info: EngineInfo | None) -> None:
        """Raise `Overloaded` when the engine would refuse one more request."""
        if info is not None:
            self._load.check(info, self.stats, num_open=self._num_wanted)

    def submit(self, request: Request) -> RequestStream:
        """Send a request. Raises `InvalidRequest` when its id is in use."""
        request_id = request.request_id
        if request_id in self._streams:
            raise InvalidRequest(f"request id {request_id!r} is in use", param="request_id")
        if not self._streams:
            self.last_message_s = time.monotonic()
        self._send(Submit(request))
        self._num_sent += 1
        self._num_wanted += 1
        stream = self._streams[request_id] = RequestStream(request_id, self.abort)
        if request.deadline_s is not None:
            left_s = max(0.0, request.deadline_s - time.monotonic())
            stream.deadline = asyncio.get_running_loop().call_later(left_s, self._expire, request_id)
        return stream

    def abort(self, request_id: str) -> None:
        """End a request; unknown and ended ids are ignored."""
        stream = self._streams.get(request_id)
        if stream is not None:
            self._send(Abort([request_id]))
            self._release(stream)

    def abandon_all(self) -> None:
        """Nobody waits for anything any more: the engine may leave its step."""
        self._abandon(self._num_sent)

    def _expire(self, request_id: str) -> None:
        """The deadline has passed. The engine sees that by itself, but perhaps only at the end of a long step."""
        stream = self._streams.get(request_id)
        if stream is not None and stream.wanted:
            stream.push(Output(request_id=request_id, finish_reason="deadline"))
            self.abort(request_id)

    def _release(self, stream: RequestStream) -> None:
        """Nobody waits for this stream any more."""
        if not stream.wanted:
            return
        stream.wanted = False
        if stream.deadline is not None:
            stream.deadline.cancel()
        self._num_wanted -= 1
        if not self._num_wanted:
            self._abandon(self._num_sent)

    async def control(self, command: str, args: dict[str, Any]) -> dict[str, Any]:
        """Run an engine command. Raises what the engine raised."""
        self._num_controls += 1
        control_id = self._num_controls
        reply: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._replies[control_id] = reply
        self._send(Control(control_id, command, args))
        try:
            return await reply
        finally:
            self._replies.pop(control_id, None)

    def receive(self, message: StepMessage | ControlReply) -> None:
        """Take a message of the engine."""
        if isinstance(message, ControlReply):
            self._answer(message)
            return
        if message.stats.num_steps != self.stats.num_steps:
            self.on_step(message.stats)
        self.stats = message.stats
        self.last_message_s = time.monotonic()
        for output in message.outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            stream.push(output)
            if output.finish_reason is not None:
                del self._streams[output.request_id]
                self._load.note_end()
                self._release(stream)

    def fail_all(self, error: LLMServeError) -> None:
        """The engine is gone: end every stream and command."""
        streams, self._streams = self._streams, {}
        replies, self._replies = self._replies, {}
        self._num_sent = 0
        for stream in streams.values():
            self._release(stream)
            stream.fail(error)
        for reply in replies.values():
            if not reply.done():
                reply.set_exception(error)
        self.stats = EngineStats()

    def _answer(self, message: ControlReply) -> None:
        reply = self._replies.get(message.control_id)
        if reply is None or reply.done():
            return
        if message.error is None:
            reply.set_result(message.result)
        else:
            reply.set_exception(restore_error(message.error, message.error_kind))
