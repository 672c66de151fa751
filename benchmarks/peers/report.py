"""A comparison as Markdown and as bars: figures with their spread, ratios by round, and where a peer is faster."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, TypeVar

from benchmarks.peers.results import OURS, Alone, Comparison, Served, Summary
from benchmarks.plot import Bars, draw
from llmserve.tools.bench_stats import LevelReport

RATE: Final = "tok/s"
_T = TypeVar("_T")
_HTTP_FIGURES: Final[tuple[tuple[str, str, Callable[[LevelReport], float]], ...]] = (
    ("output", RATE, lambda level: level.output_tokens_per_s),
    ("TTFT p50", "ms", lambda level: level.ttft_ms.p50),
    ("ITL p50", "ms", lambda level: level.itl_ms.p50),
    ("ITL p99", "ms", lambda level: level.itl_ms.p99),
    ("E2E p50", "ms", lambda level: level.e2e_ms.p50),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """How much faster ours is than a peer; above 1 it is."""

    of_medians: float
    low: float
    """Within an alternation."""
    high: float

    def __str__(self) -> str:
        return f"{self.of_medians:.2f}× ({self.low:.2f}–{self.high:.2f})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One figure of all engines."""

    label: str
    """Below bars: `8 streams`, `decode B=8`."""
    what: str
    unit: str
    by_round: dict[str, dict[int, float]]
    """Engine → round → value; an engine that was not measured so is not in it."""

    def summary(self, engine: str) -> Summary | None:
        values = self.by_round.get(engine)
        return Summary.of(list(values.values())) if values else None

    def best_peer(self) -> str | None:
        """The fastest by its median."""
        medians = {name: Summary.of(list(v.values())).median for name, v in self.by_round.items() if name != OURS and v}
        pick = max if self.unit == RATE else min
        return pick(medians, key=lambda name: medians[name]) if medians else None

    def ratio(self, peer: str) -> Ratio | None:
        """Of the medians, which one disturbed alternation does not move, and its range; None where one is missing."""
        theirs, ours = self.by_round.get(peer, {}), self.by_round.get(OURS, {})
        both = [(ours[number], theirs[number]) for number in sorted(ours.keys() & theirs.keys())]
        ratios = [self._faster(*pair) for pair in both if all(pair)]
        medians = statistics.median(ours.values() or [0.0]), statistics.median(theirs.values() or [0.0])
        if not ratios or not all(medians):
            return None
        return Ratio(of_medians=self._faster(*medians), low=min(ratios), high=max(ratios))

    def _faster(self, ours: float, theirs: float) -> float:
        return ours / theirs if self.unit == RATE else theirs / ours


def rows_of(result: Comparison, file: str) -> list[Row]:
    """All figures that were measured on one file."""
    return [*_served_rows(result, file), *_alone_rows(result, file)]


def _served_rows(result: Comparison, file: str) -> Iterator[Row]:
    records = [record for record in result.served if result.is_about(record, file)]
    for streams in _distinct(record.level.num_streams for record in records):
        label = f"{streams} stream{'s' if streams > 1 else ''}"
        chosen = [record for record in records if record.level.num_streams == streams]
        for title, unit, read in _HTTP_FIGURES:
            # A level in which every request failed has no latencies.
            values = [(one.engine, one.round, read(one.level)) for one in chosen]
            found = _by_round((name, number, value) for name, number, value in values if unit == RATE or value)
            yield Row(label=label, what=f"HTTP, {label}: {title}", unit=unit, by_round=found)


def _alone_rows(result: Comparison, file: str) -> Iterator[Row]:
    records = [record for record in result.alone if result.is_about(record, file)]
    for what in _distinct(record.what for record in records):
        values = _by_round((one.engine, one.round, one.tokens_per_s) for one in records if one.what == what)
        yield Row(label=what, what=f"engine alone: {what}", unit=RATE, by_round=values)


def _by_round(values: Iterable[tuple[str, int, float]]) -> dict[str, dict[int, float]]:
    found: dict[str, dict[int, float]] = {}
    for engine, number, value in values:
        found.setdefault(engine, {})[number] = value
    return found


def speed_table(result: Comparison, *, full: bool) -> str:
    """Markdown; the short form has throughputs on the first file only."""
    text = _file_table(result, result.model.name, full=full) + "\n\n" + _provenance(result) + "\n"
    if full:
        for file in result.other_files:
            text += f"\nThe same with {file.name}:\n\n{_file_table(result, file.name, full=True)}\n"
        if result.other_files:
            text += "\n" + best_type_table(result)
        text += "\n" + shortfall(result)
    return text


def _file_table(result: Comparison, file: str, *, full: bool) -> str:
    peers = result.peers
    ratio = "ratio" if len(peers) == 1 else "ratio to the best"
    lines = [f"| | {' | '.join([*peers, OURS])} | {ratio} |", "|---|" + "---|" * (len(peers) + 2)]
    for row in rows_of(result, file):
        if full or row.unit == RATE:
            cells = [_cell(row.summary(name), row.unit) for name in (*peers, OURS)]
            best = row.best_peer()
            lines.append(f"| {row.what} | {' | '.join(cells)} | {(row.ratio(best) if best else None) or '—'} |")
    return "\n".join(lines)


def best_type_table(result: Comparison) -> str:
    """Markdown: each peer's best file for each throughput, and ours on the first file."""
    files = [result.model.name, *(file.name for file in result.other_files)]
    by_file = {file: {row.what: row for row in rows_of(result, file) if row.unit == RATE} for file in files}
    peers = result.peers
    lines = ["Each peer with the file that is best for it, llmserve with the first:", ""]
    lines += [f"| | {' | '.join([*peers, OURS])} | ratio to the best |", "|---|" + "---|" * (len(peers) + 2)]
    for what, row in by_file[result.model.name].items():
        best = {peer: _best_file(peer, what, by_file) for peer in peers}
        cells = [f"{speed:.0f} ({file})" if file else "—" for file, speed in best.values()]
        ours, highest = row.summary(OURS), max((speed for _, speed in best.values()), default=0.0)
        ratio = f"{ours.median / highest:.2f}×" if ours and highest else "—"
        lines.append(f"| {what}, {RATE} | {' | '.join(cells)} | {f'{ours.median:.0f}' if ours else '—'} | {ratio} |")
    return "\n".join(lines) + "\n"


def _best_file(peer: str, what: str, by_file: dict[str, dict[str, Row]]) -> tuple[str, float]:
    """Name and median of the file on which a peer is fastest; no name where it was not measured."""
    found = {file: rows[what].summary(peer) for file, rows in by_file.items() if what in rows}
    speeds = {file: one.median for file, one in found.items() if one}
    name = max(speeds, key=lambda file: speeds[file], default="")
    return name, speeds.get(name, 0.0)


def shortfall(result: Comparison) -> str:
    """Markdown: every figure in which a peer is faster on the same file, by the medians."""
    lines = []
    for file in (result.model.name, *(one.name for one in result.other_files)):
        for row in rows_of(result, file):
            for peer in result.peers:
                ratio = row.ratio(peer)
                if ratio and ratio.of_medians < 1:
                    where = f" ({file})" if result.other_files else ""
                    lines.append(f"- {row.what}{where}: {ratio} of {peer}")
    if not lines:
        return "What falls short: nothing; in each figure llmserve is at least as fast as each peer.\n"
    return "\n".join(["What falls short of a peer:", "", *lines]) + "\n"


def plot(result: Comparison) -> str:
    """Throughputs on the first file as SVG."""
    rows = [row for row in rows_of(result, result.model.name) if row.unit == RATE]
    panels = []
    for title, start in (("over HTTP, output tok/s", "HTTP"), ("engine alone, tok/s", "engine")):
        chosen = [row for row in rows if row.what.startswith(start)]
        names = [name for name in (*result.peers, OURS) if any(row.by_round.get(name) for row in chosen)]
        series = [(name, [row.summary(name) for row in chosen]) for name in names]
        if chosen:
            panels.append(Bars(title, [row.label for row in chosen], series))
    return draw(panels, own=OURS)


def _distinct(values: Iterable[_T]) -> list[_T]:
    return list(dict.fromkeys(values))


def _cell(value: Summary | None, unit: str) -> str:
    if value is None:
        return "—"
    digits = 0 if value.median >= 100 else 1
    return f"{value.median:.{digits}f} {unit} ({value.low:.{digits}f}–{value.high:.{digits}f})"


def _provenance(result: Comparison) -> str:
    """What the figures belong to, and what disturbed them."""
    host = result.host
    failures: dict[str, int] = {}
    for record in result.served:
        failures[record.engine] = failures.get(record.engine, 0) + record.level.num_failures
    records: list[Served | Alone] = [*result.served, *result.alone]
    measured = [one.others_cores for one in records]
    rounds = max(one.round for one in records)
    client = max((record.level.client_cpu_share for record in result.served), default=0.0)
    failed = ", ".join(f"{name} {count}" for name, count in failures.items())
    disturbed = sum(others > result.max_others_cores for others in measured)
    warning = (
        f" {disturbed} of {len(measured)} measurements were disturbed: others took more than "
        f"{result.max_others_cores:g} cores."
        if disturbed
        else ""
    )
    given = "".join(f" {one.name} computes with {one.given}." for one in result.engines if one.given)
    return (
        f"{result.model.name}, {result.prompt_tokens} tokens in, {result.output_tokens} out; medians of {rounds} "
        "alternations (lowest–highest), ratios are of medians (lowest–highest within an alternation), above 1 means "
        f"that {OURS} is faster.{given} Failed requests: {failed or 'none sent'}. {host.cpu} (family/model "
        f"{host.cpu_family_model}; {', '.join(host.features)}), {host.num_cores} cores, {result.num_threads} threads "
        f"each. Other processes kept {statistics.median(measured):.2f} cores busy (median; {max(measured):.2f} at "
        f"most), the load generator {client:.1%} of one.{warning} {host.date[:10]}, commit `{host.commit}`."
    )
