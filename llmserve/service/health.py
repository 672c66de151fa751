"""Whether this server should get traffic: a truthful answer, also while a step computes.

The rule: a model is loaded, the server is not draining, and the engine is idle or made progress within N seconds. A
long prefill keeps moving the progress counter and stays ready; a frozen engine does not.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass

from llmserve.client.protocol import EngineClient
from llmserve.errors import LLMServeError
from llmserve.service.in_flight import InFlight


@dataclass(frozen=True, slots=True)
class Readiness:
    """An answer of `Health.check`; `reason` is one line, empty when ready."""

    ready: bool
    reason: str = ""


_STATE_REASONS = {
    "starting": "the model is loading",
    "restarting": "the engine is restarting",
    "stopped": "the engine is stopped",
}


class Health:
    """Judges readiness from what the client and the running requests say; holds no timer of its own."""

    def __init__(self, client: EngineClient, in_flight: InFlight, *, progress_timeout_s: float) -> None:
        self._client = client
        self._in_flight = in_flight
        self._progress_timeout_s = progress_timeout_s

    def check(self) -> Readiness:
        """Judge now. Cheap enough to be asked many times a second."""
        if self._in_flight.draining:
            return Readiness(False, "the server is shutting down")
        state = self._client.state
        if state != "ready":
            return Readiness(False, _STATE_REASONS.get(state, f"the engine is {state}"))
        if self._client.is_busy:
            stalled_s = time.monotonic() - self._client.last_progress_s
            if stalled_s > self._progress_timeout_s:
                return Readiness(False, f"the engine is busy and made no progress for {stalled_s:.1f} s")
        return Readiness(True)

    async def probe(self) -> Readiness:
        """As `check`, but an idle engine must answer first: that nothing is to be done says not that it could.

        Takes as long as the engine does, the progress timeout at most.
        """
        readiness = self.check()
        if not readiness.ready or self._client.is_busy:
            return readiness
        try:
            async with asyncio.timeout(self._progress_timeout_s):
                await self._client.control("stats")
        except TimeoutError:
            if not self._client.is_busy:
                return Readiness(False, f"the idle engine did not answer within {self._progress_timeout_s:g} s")
        except LLMServeError:
            pass  # it ended meanwhile: its state says so
        return self.check()
