"""Which requests are being served: how many, since when, and how to end them.

Invariants: a tracked task that is cancelled through its ticket ends with the ticket's reason, never with a bare
`CancelledError`; a cancellation from elsewhere passes through untouched.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from llmserve.errors import LLMServeError, NotReady


class Ticket:
    """One running request. Owned by the task that serves it."""

    __slots__ = ("_task", "reason")

    def __init__(self, task: asyncio.Task[object]) -> None:
        self._task: asyncio.Task[object] | None = task
        self.reason: LLMServeError | None = None

    def cancel(self, reason: LLMServeError) -> None:
        """End the request with `reason`; the first reason stands. No effect once the request has ended."""
        if self._task is not None and self.reason is None:
            self.reason = reason
            self._task.cancel()

    def close(self) -> None:
        """The request ended: later cancellations must not hit whatever the task does next."""
        self._task = None


class InFlight:
    """The set of running requests of one server."""

    def __init__(self) -> None:
        self._tickets: set[Ticket] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self.draining = False

    def __len__(self) -> int:
        return len(self._tickets)

    @contextlib.contextmanager
    def track(self) -> Iterator[Ticket]:
        """Count the current task as a running request. Raises NotReady when draining, or the ticket's reason."""
        if self.draining:
            raise NotReady("the server is shutting down")
        task = asyncio.current_task()
        assert task is not None, "requests are served by tasks"
        ticket = Ticket(task)
        if not self._tickets:
            self._idle.clear()
        self._tickets.add(ticket)
        try:
            yield ticket
        except asyncio.CancelledError:
            if ticket.reason is None:
                raise
            task.uncancel()
            raise ticket.reason from None
        finally:
            ticket.close()
            self._tickets.discard(ticket)
            if not self._tickets:
                self._idle.set()

    async def drain(self, timeout_s: float) -> None:
        """Take no more requests, wait for the running ones, then end what is left with NotReady."""
        self.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        self.end_all(NotReady("the server is shutting down"))

    def end_all(self, reason: LLMServeError) -> None:
        """End every running request with `reason`, from the next turn of the loop on."""
        self.draining = True
        for ticket in tuple(self._tickets):
            ticket.cancel(reason)
