"""The seam above the engine: what every engine client offers, wherever its engine runs.

Invariant: every stream that `submit` returned ends exactly once, either with an `Output` that has a `finish_reason`
or by raising `EngineDied`; one with a deadline ends by then, whatever the engine does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol, Self

from llmserve.types import EngineInfo, EngineStats, Output, Request

ClientState = Literal["starting", "ready", "restarting", "stopped"]


class OutputStream(Protocol):
    """The outputs of one request, in order. The last one has a `finish_reason`; iteration then stops.

    Leaving early (`aclose`, or cancelling a pending `__anext__`) aborts the request. Wrap in `contextlib.aclosing`.
    Raises `EngineDied` when the engine ended while it held the request.
    """

    def __aiter__(self) -> Self: ...

    async def __anext__(self) -> Output: ...

    async def forward(self, take: Callable[[Output], bool]) -> None:
        """Have `take` called with each output as it arrives, until the last, or until it returns False (an abort).

        `take` runs on the loop, in the turn in which the output came: no task wakes up for it. What it raises ends
        the request and is raised here. Cancelling aborts. For a stream that is not iterated.
        """

    async def aclose(self) -> None:
        """Abort the request unless it has ended. Harmless when called again."""


class EngineClient(Protocol):
    """One engine, as the service sees it. Used from one event loop only."""

    @property
    def state(self) -> ClientState:
        """`ready` alone accepts requests."""

    @property
    def info(self) -> EngineInfo | None:
        """None until the engine was ready once."""

    @property
    def stats(self) -> EngineStats:
        """As of the last step."""

    @property
    def is_busy(self) -> bool:
        """Whether the engine holds a request that has not ended."""

    @property
    def last_progress_s(self) -> float:
        """`time.monotonic()` at which the engine last finished a step, moved inside one, or stopped being idle."""

    async def start(self) -> EngineInfo:
        """Load the model. Returns when ready; raises what loading raised, or `EngineDied`."""

    def submit(self, request: Request) -> OutputStream:
        """Send a request, at once. Raises `NotReady`, `Overloaded`, and `InvalidRequest` for an id in use."""

    def watch_steps(self, on_step: Callable[[EngineStats], None]) -> None:
        """Have `on_step` called with the statistics after each step that computed something."""

    def check_capacity(self) -> None:
        """Raise `Overloaded` when `submit` would, for whoever wants to know before tokenizing."""

    async def abort(self, request_id: str) -> None:
        """End a request with `abort`. Unknown and ended ids are ignored."""

    async def control(self, command: str, **args: Any) -> dict[str, Any]:
        """Run an engine command: `stats`, `info`, `check_integrity`.

        Raises `InvalidRequest` for an unknown one, `NotReady`, `EngineDied`.
        """

    async def stop(self) -> None:
        """Abort what is left and end the engine. Harmless when called again."""
