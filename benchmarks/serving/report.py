"""A serving result as text and as one HTML page that needs nothing else: a table, its plots, what they belong to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from html import escape
from typing import Final

from benchmarks.plot import Lines, draw
from benchmarks.serving.records import Level, Serving, Slo
from llmserve.tools.bench_stats import Spread

_STYLE: Final = (
    "body{font:15px sans-serif;max-width:1100px;margin:2em auto;padding:0 1em;color:#222}"
    "table{border-collapse:collapse;font-size:13px}th,td{padding:.3em .6em;border-bottom:1px solid #ddd;"
    "text-align:right;white-space:nowrap}th:first-child,td:first-child{text-align:left}.bad{color:#c43f3f}"
    "svg{max-width:100%;height:auto}div{overflow-x:auto}"
)
_TIMES: Final[tuple[tuple[str, Callable[[Level], Spread]], ...]] = (
    ("TTFT", lambda level: level.report.ttft_ms),
    ("ITL", lambda level: level.report.itl_ms),
    ("TPOT", lambda level: level.report.tpot_ms),
    ("E2E", lambda level: level.report.e2e_ms),
)
_PERCENTILES: Final[tuple[tuple[str, Callable[[Spread], float]], ...]] = (
    ("p50", lambda spread: spread.p50),
    ("p90", lambda spread: spread.p90),
    ("p99", lambda spread: spread.p99),
)
_DEFINITIONS: Final = (
    "TTFT: from before the connection to the first event with text. ITL: each gap between events with text. TPOT: "
    "(E2E − TTFT) / (tokens − 1) of one request. E2E: to the end of the answer. Times in ms, p50 / p90 / p99, of "
    "complete answers. Rates are over the wall time from the first request to the last answer."
)
COLUMNS: Final = (
    "load", "requests", "failed", "output tok/s", "requests/s", "goodput/s", "good", "TTFT", "ITL", "TPOT", "E2E",
    "late p99", "generator CPU", "others' cores",
)  # fmt: skip


def row(level: Level) -> list[str]:
    """One level, in the order of `COLUMNS`."""
    report = level.report
    late = "" if level.num_streams else f"{level.late_ms.p99:.1f}"
    times = [" / ".join(f"{read(spread(level)):.1f}" for _, read in _PERCENTILES) for _, spread in _TIMES]
    return [
        name_of(level), str(report.num_requests), str(report.num_failures), f"{report.output_tokens_per_s:.1f}",
        f"{report.requests_per_s:.2f}", f"{level.goodput_per_s:.2f}", f"{level.good_share:.1%}", *times, late,
        f"{report.client_cpu_share:.1%}", "" if level.others_cores is None else f"{level.others_cores:.2f}",
    ]  # fmt: skip


def name_of(level: Level) -> str:
    """`8 streams`, `4 requests/s`."""
    if level.num_streams:
        return f"{level.num_streams} stream{'s' if level.num_streams > 1 else ''}"
    return f"{level.offered_per_s:g} requests/s"


def slo_text(slo: Slo) -> str:
    """The limits in words."""
    limits = [(slo.ttft_ms, "TTFT"), (slo.tpot_ms, "TPOT"), (slo.e2e_ms, "E2E")]
    return ", ".join(f"{name} ≤ {limit:g} ms" for limit, name in limits if limit) or "none, a complete answer is good"


def failures_of(result: Serving) -> Iterator[str]:
    """A line for each kind of failure at each level."""
    for level in (*result.closed, *result.open):
        for failure, count in level.report.failures.items():
            yield f"{name_of(level)}: {count}× {failure}"


def page(result: Serving) -> str:
    """The whole HTML page."""
    host = result.host
    title = f"Serving benchmark: {result.model}"
    facts = (
        f"{result.target}, {result.prompt_tokens} tokens in (about), {result.output_tokens} out, seed {result.seed}. "
        f"{host.cpu} (family/model {host.cpu_family_model}; {', '.join(host.features)}), {host.num_cores} cores, "
        f"{host.memory_gib:.0f} GiB. llmserve {host.llmserve}, commit {host.commit}. {host.date}."
    )
    parts = [f"<h1>{escape(title)}</h1><p>{escape(facts)}</p><p>Goodput's limits: {escape(slo_text(result.slo))}.</p>"]
    if result.closed:
        parts += ["<h2>Closed loop</h2>", _table(result.closed), draw(list(_panels(result.closed, "streams")))]
    if result.open:
        note = f"<p>Poisson arrivals, {result.seconds:g} s for each rate.</p>"
        parts += ["<h2>Open loop</h2>", note, _table(result.open), draw(list(_panels(result.open, "requests/s sent")))]
    failures = [f'<li class="bad">{escape(line)}</li>' for line in failures_of(result)]
    parts += [f"<h2>Failures</h2><ul>{''.join(failures)}</ul>"] if failures else []
    body = "\n".join([*parts, f"<p>{_DEFINITIONS}</p>"])
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body>{body}</body></html>\n"
    )


def _table(levels: Sequence[Level]) -> str:
    head = "".join(f"<th>{column}</th>" for column in COLUMNS)
    rows = "".join(f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row(level))}</tr>\n" for level in levels)
    return f"<div><table><tr>{head}</tr>\n{rows}</table></div>"


def _panels(levels: Sequence[Level], x_title: str) -> Iterator[Lines]:
    """Throughput, goodput, and each time's percentiles against the load."""
    tokens = [(level.offered, level.report.output_tokens_per_s) for level in levels]
    yield Lines(title="output tok/s", x_title=x_title, series=[("output", tokens)])
    complete = [(level.offered, level.report.requests_per_s) for level in levels]
    good = [(level.offered, level.goodput_per_s) for level in levels]
    yield Lines(title="requests/s", x_title=x_title, series=[("complete", complete), ("good", good)])
    for name, spread in _TIMES:
        series = [(label, [(level.offered, read(spread(level))) for level in levels]) for label, read in _PERCENTILES]
        yield Lines(title=f"{name}, ms", x_title=x_title, series=series)
