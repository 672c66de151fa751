"""What a long prompt does to the streams that run: time between their tokens with and without an inter-token target.

    python -m benchmarks.engine.interference

The same load on two engines in turn: `chunked` has the default target, `unchunked` none and a budget that takes the
prompt in one step. 32 streams decode (the base), then a prompt of 4,000 tokens arrives. A disturbed gap is one that
ends after the arrival and not after the prompt's first token: no undisturbed gap dilutes the percentile.
"""

from __future__ import annotations

import random
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import msgspec

from benchmarks.engine.probe import Conditions, Probe, Stream, arguments_of, conclude, conditions, resolve
from benchmarks.peers.quiet import Quiet
from llmserve.config import DEFAULT_ITL_TARGET_MS
from llmserve.tools.bench_stats import Spread, percentile

MAX_RATIO: Final = 3.0
MAX_MODEL_LEN: Final = 6144
_UNCHUNKED_TOKENS: Final = 4608
_FIRST_ID: Final = 1000
_WARM_UP_STEPS: Final = 8


class Round(msgspec.Struct, frozen=True, kw_only=True):
    """One arrival."""

    engine: str
    round: int
    others_cores: float
    base_ms: Spread
    """Gaps before the arrival."""
    disturbed_ms: Spread
    """Gaps from the arrival to the prompt's first token."""
    prompt_ttft_ms: float
    num_steps: int
    """That the prompt took."""


class EngineFigures(msgspec.Struct, frozen=True, kw_only=True):
    """All rounds of one engine: percentiles are medians of the rounds'."""

    engine: str
    base_p99_ms: float
    disturbed_p99_ms: float
    ratio: float
    prompt_ttft_ms: float


class Interference(msgspec.Struct, frozen=True, kw_only=True):
    """The result file."""

    conditions: Conditions
    num_streams: int
    prompt_tokens: int
    itl_target_ms: float
    max_ratio: float
    figures: list[EngineFigures]
    rounds: list[Round]


class _Scenario:
    """The load, the same for each engine and round but for its random prompts."""

    def __init__(self, num_streams: int, prompt_tokens: int, base_steps: int) -> None:
        self.num_streams, self.prompt_tokens, self.base_steps = num_streams, prompt_tokens, base_steps
        self._random = random.Random(11)

    def run(self, probe: Probe) -> tuple[list[float], list[float], float, int]:
        """(gaps before, gaps after the arrival, the prompt's TTFT, its steps); seconds."""
        limit = MAX_MODEL_LEN
        streams = [probe.submit(self._prompt(64), max_tokens=limit) for _ in range(self.num_streams)]
        probe.run_until(lambda: all(len(stream.times_s) > _WARM_UP_STEPS for stream in streams))
        start_s = streams[0].times_s[-1]
        wanted = len(streams[0].times_s) + self.base_steps
        probe.run_until(lambda: len(streams[0].times_s) >= wanted)
        first_step = probe.engine.stats().num_steps
        arrival = probe.submit(self._prompt(self.prompt_tokens), max_tokens=1)
        probe.run_until(lambda: arrival.ended)
        num_steps = probe.engine.stats().num_steps - first_step
        base = _gaps(streams, start_s, arrival.submitted_s)
        disturbed = _gaps(streams, arrival.submitted_s, arrival.times_s[0])
        probe.end_all()
        return base, disturbed, arrival.ttft_s, num_steps

    def _prompt(self, num_tokens: int) -> list[int]:
        return [self._random.randrange(_FIRST_ID, 49_000) for _ in range(num_tokens)]


def _gaps(streams: list[Stream], after_s: float, until_s: float) -> list[float]:
    """Times between tokens that end within (after_s, until_s]."""
    return [
        after - before for stream in streams for before, after in pairwise(stream.times_s) if after_s < after <= until_s
    ]


def measure(model: Path, scenario: _Scenario, num_rounds: int) -> list[Round]:
    """Both engines in turn, each round when the machine is quiet."""
    common: dict[str, Any] = {"max_model_len": MAX_MODEL_LEN, "kv_cache_bytes": 2**30, "max_num_seqs": 64}
    probes = {
        "chunked": Probe(model, **common),
        "unchunked": Probe(model, **common, itl_target_ms=0.0, max_num_batched_tokens=_UNCHUNKED_TOKENS),
    }
    for probe in probes.values():
        scenario.run(probe)  # pages, threads, step times
    rounds = []
    for number in range(num_rounds):
        for name, probe in probes.items():
            (base, disturbed, ttft_s, num_steps), others = Quiet(timeout_s=20.0, max_attempts=1).measure(
                lambda probe=probe: scenario.run(probe)  # type: ignore[misc]
            )
            rounds.append(
                Round(
                    engine=name, round=number, others_cores=others, base_ms=Spread.of_seconds(base),
                    disturbed_ms=Spread.of_seconds(disturbed), prompt_ttft_ms=round(ttft_s * 1000, 1),
                    num_steps=num_steps,
                )
            )  # fmt: skip
            print(
                f"| {name} | {number} | {rounds[-1].base_ms.p99:.1f} | {rounds[-1].disturbed_ms.p50:.1f} | "
                f"{rounds[-1].disturbed_ms.p99:.1f} | {ttft_s * 1000:.0f} | {num_steps} | {others:.2f} |"
            )
    return rounds


def figures_of(rounds: list[Round]) -> list[EngineFigures]:
    """Sum up the rounds of each engine."""
    figures = []
    for name in dict.fromkeys(one.engine for one in rounds):
        own = [one for one in rounds if one.engine == name]
        base = percentile([one.base_ms.p99 for one in own], 50)
        disturbed = percentile([one.disturbed_ms.p99 for one in own], 50)
        figures.append(
            EngineFigures(
                engine=name, base_p99_ms=base, disturbed_p99_ms=disturbed, ratio=round(disturbed / base, 2),
                prompt_ttft_ms=percentile([one.prompt_ttft_ms for one in own], 50),
            )
        )  # fmt: skip
    return figures


def main() -> int:
    parser = arguments_of(__doc__, "interference.json")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=4000)
    parser.add_argument("--base-steps", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    model = resolve(arguments.model)
    scenario = _Scenario(arguments.streams, arguments.prompt_tokens, arguments.base_steps)
    print("| engine | round | base p99 ms | disturbed p50 ms | disturbed p99 ms | TTFT ms | steps | others |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    rounds = measure(model, scenario, arguments.rounds)
    figures = figures_of(rounds)
    for one in figures:
        print(
            f"{one.engine}: p99 between tokens {one.base_p99_ms:.1f} → {one.disturbed_p99_ms:.1f} ms "
            f"(× {one.ratio:.2f}), TTFT of the prompt {one.prompt_ttft_ms:.0f} ms"
        )
    result = Interference(
        conditions=conditions(model, max(one.others_cores for one in rounds)),
        num_streams=arguments.streams,
        prompt_tokens=arguments.prompt_tokens,
        itl_target_ms=DEFAULT_ITL_TARGET_MS,
        max_ratio=MAX_RATIO,
        figures=figures,
        rounds=rounds,
    )
    ratio = figures[0].ratio
    misses = [f"p99 between tokens × {ratio}, not < × {MAX_RATIO:g}"] if ratio >= MAX_RATIO else []
    return conclude(result, arguments.output, misses)


if __name__ == "__main__":
    sys.exit(main())
