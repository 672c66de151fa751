"""Random sampling states and steps, run by the compiled sampler and by its definition."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

from llmserve import _C
from llmserve.ops import philox, reference_sampler
from llmserve.ops.protocol import NO_TOKEN, SamplingState, StepInput, StepOutput
from tests.ops.sampling_state_twin import SamplingStateTwin
from tests.ops.test_sampler import NEAR, Filters, compiled_sample, make_rows, random_logits

Logits = NDArray[np.float32]
Options = dict[str, Any]
Twins = list[SamplingStateTwin | None]
NUM_STEPS: Final = 8


def sample_both(logits: Logits, step: StepInput, twins: Twins, *, isa: str = "") -> tuple[StepOutput, StepOutput]:
    """One step in the definition over `twins`, and in the extension over the step's own states."""
    states, step.states = step.states, cast("Sequence[SamplingState | None]", twins)
    expected = reference_sampler.sample_step(logits, step)
    step.states = states
    return expected, compiled_sample(logits, step, isa=isa)


def make_state(prompt: list[int], options: Options) -> _C.SamplingState:
    return _C.SamplingState(prompt, **options)


def make_states(options: Sequence[Options | None], vocab: int, prompts: list[list[int]]) -> tuple[list[Any], Twins]:
    pairs = [
        (None, None) if own is None else (_C.SamplingState(prompt, vocab_size=vocab, **own),
                                          SamplingStateTwin.of(prompt, vocab_size=vocab, **own))
        for own, prompt in zip(options, prompts, strict=True)
    ]  # fmt: skip
    return [state for state, _ in pairs], [twin for _, twin in pairs]


def random_options(draws: np.random.Generator, vocab: int) -> Options | None:
    """Any parameter with probability 1/2; one row in eight has no state."""
    if draws.random() < 1 / 8:
        return None

    def ids(num: int) -> list[int]:
        return [int(token) for token in draws.integers(0, vocab, num)]

    every: Options = {
        "repetition_penalty": float(draws.choice([0.5, 1.1, 1.5, 3.0])),
        "frequency_penalty": float(draws.uniform(-2, 2)),
        "presence_penalty": float(draws.uniform(-2, 2)),
        "logit_bias": [(token, float(draws.uniform(-5, 5))) for token in ids(5)],
        "min_tokens": int(draws.integers(0, 6)),
        "stop_token_ids": ids(vocab // 3),
        "bad_words": [ids(num) for num in (1, 1, 2, 2, 3)],
        "allowed_token_ids": ids(max(3, vocab // 2)),
        "typical_p": float(draws.uniform(0.1, 1)),
    }
    return {name: value for name, value in every.items() if draws.random() < 0.5}


def random_filters(draws: np.random.Generator, step: StepInput) -> None:
    num_rows = len(step.logit_rows)
    step.temperature[:] = draws.choice([0, 0.5, 1, 1.5], num_rows)
    step.top_k[:] = draws.choice([0, 0, 7, 30], num_rows)
    step.top_p[:] = draws.choice([1, 0.9, 0.5], num_rows)
    step.min_p[:] = draws.choice([0, 0, 0.05], num_rows)


def nearly_drawn(logits: Logits, step: StepInput, row: int, twin: SamplingStateTwin | None) -> set[int]:
    """Tokens that the definition draws from edited logits when its draw and thresholds move by less than NEAR."""
    weights = np.exp((logits.astype(np.float64) - logits.max()) / float(step.temperature[row]))
    order = reference_sampler.by_logit(logits)
    draw = philox.uniform(int(step.seed[row]), int(step.sample_position[row]))
    top_p, min_p = float(step.top_p[row]), float(step.min_p[row])
    typical_p = 1.0 if twin is None else twin.typical_p
    found = set()
    for move in (-NEAR, 0.0, NEAR):
        for typical_move in (-NEAR, 0.0, NEAR):
            for min_move in (-NEAR, NEAR):
                kept = reference_sampler.survivors(
                    weights, order, top_k=int(step.top_k[row]), top_p=min(1.0, top_p + move),
                    min_p=min_p * (1 + min_move), typical_p=min(1.0, typical_p + typical_move),
                )  # fmt: skip
                sums = np.cumsum(weights[kept])
                for u in (draw - NEAR, draw, draw + NEAR):
                    index = int(np.searchsorted(sums, u * sums[-1], side="right"))
                    found.add(int(kept[min(index, len(kept) - 1)]))
    return found


def run_rows(
    options: Sequence[Options | None], *, vocab: int, seed: int, isa: str = "", greedy: bool = False
) -> tuple[int, int]:
    """Decode a few tokens of every row in both. Returns how many outcomes differ, and how many differ by more than
    rounding explains. Where they differ, the definition goes on with the extension's token."""
    draws = np.random.default_rng(seed)
    num_rows = len(options)
    prompts = [draws.integers(0, vocab, draws.integers(1, 9)).tolist() for _ in options]
    states, twins = make_states(options, vocab, prompts)
    step = make_rows(num_rows, Filters(temperature=0.0), seed=seed)
    if not greedy:
        random_filters(draws, step)
    num_different = num_wrong = 0
    for offset in range(NUM_STEPS):
        logits = random_logits(seed + offset, num_rows, vocab)
        step.states = states
        step.sample_position[:] = [len(prompt) + offset for prompt in prompts]
        expected, found = sample_both(logits, step, twins, isa=isa)
        for row in np.flatnonzero(found.token_ids != expected.token_ids).tolist():
            twin = twins[row]
            num_different += 1
            if twin is not None:
                twin.rewind(int(step.sample_position[row]))
            edited = logits[row] if twin is None else reference_sampler.edit(logits[row], twin)
            drawn = step.temperature[row] > 0 and expected.token_ids[row] != NO_TOKEN
            near = nearly_drawn(edited, step, row, twin) if drawn else set()
            num_wrong += int(found.token_ids[row]) not in near
            if twin is not None:
                twin.record(int(found.token_ids[row]))
        for index, token in enumerate(found.token_ids.tolist()):
            if token == NO_TOKEN:  # the engine ends such a sequence
                states[index] = twins[index] = None
    for state, twin in zip(states, twins, strict=True):
        assert twin is None or state.token_ids == twin.token_ids, f"seed={seed}"
    return num_different, num_wrong
