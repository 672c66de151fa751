"""What a benchmark reports: plain structs that are also its JSON, and the arithmetic that makes them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from llmserve.tools.bench_trace import Trace


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` per cent lie, linear between ranks; NaN-free: 0.0 for no values."""
    ordered = sorted(values)
    if not ordered:
        return 0.0
    rank = (len(ordered) - 1) * percent / 100
    below = int(rank)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (rank - below)


class Spread(msgspec.Struct, frozen=True, kw_only=True):
    """A distribution of times, in ms."""

    mean: float
    p50: float
    p90: float
    p99: float
    max: float

    @classmethod
    def of_seconds(cls, values_s: Iterable[float]) -> Spread:
        """All zeros for no values."""
        ms = [value * 1000 for value in values_s]
        ranks = [round(percentile(ms, percent), 3) for percent in (50, 90, 99, 100)]
        return cls(
            mean=round(sum(ms) / len(ms), 3) if ms else 0.0, p50=ranks[0], p90=ranks[1], p99=ranks[2], max=ranks[3]
        )


class LevelReport(msgspec.Struct, frozen=True, kw_only=True):
    """A closed loop at one number of streams. Rates count complete requests only, over the whole wall time."""

    num_streams: int
    num_requests: int
    num_failures: int
    failures: dict[str, int]
    """How often each failure occurred."""
    wall_s: float
    prompt_tokens: float
    """Mean for each request, as the server counts."""
    output_tokens: float
    output_tokens_per_s: float
    requests_per_s: float
    ttft_ms: Spread
    itl_ms: Spread
    tpot_ms: Spread
    e2e_ms: Spread
    client_cpu_share: float
    """CPU time of the load generator / wall time; 1 is a whole core."""


def level_report(num_streams: int, traces: Sequence[Trace], *, wall_s: float, client_cpu_s: float) -> LevelReport:
    """Sum up the requests of one level."""
    good = [trace for trace in traces if trace.failure is None]
    failures = Counter(trace.failure for trace in traces if trace.failure is not None)
    num_output = sum(trace.num_output_tokens for trace in good)
    return LevelReport(
        num_streams=num_streams,
        num_requests=len(traces),
        num_failures=len(traces) - len(good),
        failures=dict(failures),
        wall_s=round(wall_s, 4),
        prompt_tokens=round(sum(trace.num_prompt_tokens for trace in good) / max(1, len(good)), 1),
        output_tokens=round(num_output / max(1, len(good)), 1),
        output_tokens_per_s=round(num_output / wall_s, 2),
        requests_per_s=round(len(good) / wall_s, 3),
        ttft_ms=Spread.of_seconds(trace.ttft_s for trace in good),
        itl_ms=Spread.of_seconds(gap for trace in good for gap in trace.gaps_s),
        tpot_ms=Spread.of_seconds(trace.tpot_s for trace in good if trace.num_output_tokens > 1),
        e2e_ms=Spread.of_seconds(trace.e2e_s for trace in good),
        client_cpu_share=round(client_cpu_s / wall_s, 4),
    )
