"""The result file of a serving benchmark, and the arithmetic of goodput."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from llmserve.tools.bench_host import Host
from llmserve.tools.bench_load import Measured
from llmserve.tools.bench_stats import LevelReport, Spread, level_report
from llmserve.tools.bench_trace import Trace


class Slo(msgspec.Struct, frozen=True, kw_only=True):
    """What a request must keep to count as good; 0: no limit."""

    ttft_ms: float = 0.0
    tpot_ms: float = 0.0
    e2e_ms: float = 0.0

    def is_met(self, trace: Trace) -> bool:
        """Whether a request was complete and within all limits; at a limit is within. One token has no TPOT."""
        if trace.failure is not None:
            return False
        tpot_s = trace.tpot_s if trace.num_output_tokens > 1 else 0.0
        pairs = ((trace.ttft_s, self.ttft_ms), (tpot_s, self.tpot_ms), (trace.e2e_s, self.e2e_ms))
        return all(not limit_ms or seconds * 1000 <= limit_ms for seconds, limit_ms in pairs)


class Level(msgspec.Struct, frozen=True, kw_only=True):
    """One number of streams, or one rate."""

    num_streams: int
    """Of a closed loop; 0: an open one."""
    offered_per_s: float
    """Requests/s that an open loop was asked for; 0: a closed one."""
    sent_per_s: float
    """Of an open loop: requests / the time in which they were due."""
    late_ms: Spread
    """Of an open loop: how long after its time each request was sent. Far from 0: the generator did not keep up."""
    num_good: int
    good_share: float
    """Of all requests, the failed included."""
    goodput_per_s: float
    """Good requests / wall time, from the first request to the last answer."""
    others_cores: float | None
    """Cores that other processes kept busy meanwhile; None where the server is one of them."""
    report: LevelReport

    @property
    def offered(self) -> float:
        """Streams or requests/s."""
        return self.offered_per_s or float(self.num_streams)


class Serving(msgspec.Struct, frozen=True, kw_only=True):
    """A result file."""

    host: Host
    target: str
    """The server's URL, or the file's name that it was started with."""
    model: str
    """As the server calls it."""
    prompt_tokens: int
    output_tokens: int
    seed: int
    seconds: float
    """Of each open loop, while requests are sent."""
    slo: Slo
    closed: list[Level]
    open: list[Level]


def closed_level(num_streams: int, seen: Measured, slo: Slo, *, others_cores: float | None) -> Level:
    """Sum up a closed loop."""
    return _level(num_streams, seen, slo, offered_per_s=0.0, sent_per_s=0.0, others_cores=others_cores)


def open_level(rate: float, seconds: float, seen: Measured, slo: Slo, *, others_cores: float | None) -> Level:
    """Sum up an open loop; `seconds`: while requests were sent."""
    sent_per_s = round(len(seen.traces) / seconds, 3)
    return _level(0, seen, slo, offered_per_s=rate, sent_per_s=sent_per_s, others_cores=others_cores)


def _level(
    num_streams: int, seen: Measured, slo: Slo, *, offered_per_s: float, sent_per_s: float, others_cores: float | None
) -> Level:
    num_good = count_good(seen.traces, slo)
    return Level(
        num_streams=num_streams,
        offered_per_s=offered_per_s,
        sent_per_s=sent_per_s,
        late_ms=Spread.of_seconds(seen.late_s),
        num_good=num_good,
        good_share=round(num_good / len(seen.traces), 4),
        goodput_per_s=round(num_good / seen.wall_s, 3),
        others_cores=others_cores,
        report=level_report(num_streams, seen.traces, wall_s=seen.wall_s, client_cpu_s=seen.client_cpu_s),
    )


def count_good(traces: Sequence[Trace], slo: Slo) -> int:
    """Requests that meet it."""
    return sum(slo.is_met(trace) for trace in traces)
