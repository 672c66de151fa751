"""Decode steps that are launched before the tokens of the step before are known, where the device computes by itself.

While a step of plain decodes computes, the next one is launched behind it: its tokens are those that the first will
have sampled, which never leave the device. A sequence that ends with the first step has computed one token in vain.
Invariants: at most one step is in flight beyond the one that is run; it is collected before anything else is launched;
what was computed for sequences that ended meanwhile reaches nobody.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from llmserve.engine.plan import Plan
from llmserve.engine.runner import ModelRunner, StepResult
from llmserve.engine.sequence import Sequence
from llmserve.ops.protocol import Executor

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Flight:
    """A step that was launched ahead."""

    sequences: list[Sequence]
    plan: Plan | None = None
    """What of it is still wanted, once that was asked for."""
    rows: list[int] = field(default_factory=list)
    """Of the plan's decodes in the step."""


class AheadRunner(ModelRunner):
    """`can_follow(plan, ahead)` says whether the decodes of a plan may run on before their tokens are known, and
    reserves a slot for each; `ahead` whether the plan itself was launched ahead."""

    def __init__(self, executor: Executor, can_follow: Callable[[Plan, bool], bool]) -> None:
        super().__init__(executor)
        self._can_follow = can_follow
        self._flight: _Flight | None = None

    def next_plan(self) -> Plan | None:
        """What is in flight, without sequences that have ended since; None when nothing of it is wanted."""
        flight = self._flight
        if flight is None:
            return None
        flight.rows = [row for row, seq in enumerate(flight.sequences) if not seq.ended]
        if not flight.rows:
            self._drop()
            return None
        flight.plan = Plan(decodes=[flight.sequences[row] for row in flight.rows])
        return flight.plan

    def run(self, plan: Plan) -> StepResult:
        """Run one step to its end, and start the one behind it where that may be."""
        flight = self._flight
        is_ahead = flight is not None and flight.plan is plan
        if not is_ahead:
            self._drop()
            self.launch(plan)
        rows = flight.rows if flight is not None and is_ahead else None
        self._flight = None
        following = self._follow(plan, rows)
        try:
            result = self.collect()
        except Exception:
            self._flight = following
            self._drop()
            raise
        self._flight = following
        return result if rows is None else result.take(rows)

    def _follow(self, plan: Plan, rows: list[int] | None) -> _Flight | None:
        if not self._can_follow(plan, rows is not None):
            return None
        previous = rows if rows is not None else list(range(len(plan.decodes)))
        try:
            self._executor.launch(self._builder.build_following(plan.decodes, previous))
        except Exception:  # noqa: BLE001  # the step before is not lost with it; what is wrong will be met again
            _log.exception("a step could not be launched ahead num_sequences=%d", len(plan.decodes))
            return None
        return _Flight(list(plan.decodes))

    def _drop(self) -> None:
        """Collect what is in flight for nobody."""
        if self._flight is None:
            return
        self._flight = None
        try:
            self.collect()
        except Exception:  # noqa: BLE001  # nobody waits for it
            _log.exception("a step that was launched ahead failed")
