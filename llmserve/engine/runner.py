"""Runs plans on an executor: plan → arrays → executor → what each sequence got.

Invariant: every `launch` that returned is followed by exactly one `collect`.
"""

from __future__ import annotations

from dataclasses import dataclass

from llmserve.engine.batch import BatchBuilder
from llmserve.engine.plan import Plan
from llmserve.ops.protocol import Executor, StepOutput
from llmserve.types import TokenLogprob


class StepResult:
    """What a step computed, row by row; rows are ordered as the plan's."""

    __slots__ = ("_columns", "_output", "token_ids")

    def __init__(self, output: StepOutput) -> None:
        self._output = output
        self._columns: _LogprobColumns | None = None
        self.token_ids: list[int] = output.token_ids.tolist()
        """Per row: the sampled token, or the scored one."""

    def take(self, rows: list[int]) -> StepResult:
        """These rows alone."""
        output = self._output
        return StepResult(
            StepOutput(
                output.token_ids[rows],
                output.logprobs[rows],
                output.ranks[rows],
                output.top_ids[rows],
                output.top_logprobs[rows],
            )
        )

    def logprob(self, row: int, num_top: int) -> TokenLogprob:
        """The log-probabilities of one row that asked for them."""
        if self._columns is None:
            self._columns = _LogprobColumns.of(self._output)
        columns = self._columns
        return TokenLogprob(
            self.token_ids[row],
            columns.logprobs[row],
            columns.ranks[row],
            tuple(columns.top_ids[row][:num_top]),
            tuple(columns.top_logprobs[row][:num_top]),
        )


@dataclass(frozen=True, slots=True)
class _LogprobColumns:
    """The arrays as lists: converted at once, and only when some row asks."""

    logprobs: list[float]
    ranks: list[int]
    top_ids: list[list[int]]
    top_logprobs: list[list[float]]

    @classmethod
    def of(cls, output: StepOutput) -> _LogprobColumns:
        return cls(
            output.logprobs.tolist(),
            output.ranks.tolist(),
            output.top_ids.tolist(),
            output.top_logprobs.tolist(),
        )


class ModelRunner:
    """Feeds an executor. All methods raise whatever the executor raises."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._builder = BatchBuilder()

    def next_plan(self) -> Plan | None:
        """What has been launched already and is to be run next; None: nothing."""
        return None

    def run(self, plan: Plan) -> StepResult:
        """Run one step to its end."""
        self.launch(plan)
        return self.collect()

    def launch(self, plan: Plan) -> None:
        """Start the step."""
        self._executor.launch(self._builder.build(plan))

    def collect(self) -> StepResult:
        """Wait for the step launched last."""
        return StepResult(self._executor.collect())
