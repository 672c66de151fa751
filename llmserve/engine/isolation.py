"""Finding the sequence that makes a step fail, so that it fails alone.

A step that raised changed nothing: no sequence has advanced, and what it wrote into the KV cache lies past the
computed tokens and is written again. So its sequences are tried again in halves, and the halves that fail in halves
again. Results do not depend on the batch, so the others get the tokens they would have got.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from llmserve.engine.plan import Plan
from llmserve.engine.runner import StepResult

Outcome = StepResult | Exception


def attempt(plan: Plan, run: Callable[[Plan], StepResult]) -> Outcome:
    """Run a plan; an exception is a result like any other."""
    try:
        return run(plan)
    except Exception as error:  # noqa: BLE001  # the step is lost, the loop is not
        return error


def run_apart(plan: Plan, error: Exception, run: Callable[[Plan], StepResult]) -> Iterator[tuple[Plan, Outcome]]:
    """The parts of a plan that failed with `error`, with what came of each; a part that failed is one sequence.

    Take each result before asking for the next. An `InterruptedError` stands for the part it came from.
    """
    if isinstance(error, InterruptedError) or plan.num_sequences == 1:
        yield plan, error
        return
    for half in plan.halves():
        outcome = attempt(half, run)
        if isinstance(outcome, Exception):
            yield from run_apart(half, outcome, run)
        else:
            yield half, outcome
