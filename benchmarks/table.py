"""Write the tables of README.md and docs/benchmarks.md, and the plot, from the committed result files.

python -m benchmarks.table            # rewrite the blocks between the markers
python -m benchmarks.table --check    # fail when they are not what the results say
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from benchmarks.peers.accuracy import Accuracy
from benchmarks.peers.perplexity import Perplexities, misses
from benchmarks.peers.perplexity_models import MIXED
from benchmarks.peers.results import OURS, RESULTS, Comparison, Served, Summary, load_comparison
from benchmarks.plot import Bars, draw
from llmserve.tools.bench_stats import LevelReport

ROOT: Final = Path(__file__).resolve().parent.parent
BEGIN: Final = "<!-- begin benchmarks: written by benchmarks/table.py -->\n"
END: Final = "<!-- end benchmarks -->"
SPEED: Final = RESULTS / "llama_cpp.json"
ACCURACY: Final = RESULTS / "accuracy.json"
PERPLEXITY: Final = RESULTS / "perplexity.json"
PLOT: Final = RESULTS / "llama_cpp.svg"
_T = TypeVar("_T")


def served_rows(result: Comparison) -> list[tuple[str, str, Summary, Summary]]:
    """Over HTTP: what, unit, the peer's figure and ours."""
    rows = []
    for streams in _distinct(record.level.num_streams for record in result.served):
        label = f"{streams} stream{'s' if streams > 1 else ''}"
        for title, unit, read in _HTTP_FIGURES:
            peer, ours = (
                Summary.of([read(one.level) for one in result.served if _is(one, engine, streams)])
                for engine in _engines(result)
            )
            rows.append((f"HTTP, {label}: {title}", unit, peer, ours))
    return rows


def alone_rows(result: Comparison) -> list[tuple[str, str, Summary, Summary]]:
    """Without HTTP."""
    rows = []
    for what in _distinct(record.what for record in result.alone):
        peer, ours = (
            Summary.of([one.tokens_per_s for one in result.alone if (one.engine, one.what) == (engine, what)])
            for engine in _engines(result)
        )
        rows.append((f"engine alone: {what}", "tok/s", peer, ours))
    return rows


def speed_table(result: Comparison, *, full: bool) -> str:
    """Markdown; the short form has throughputs only."""
    peer, ours = _engines(result)
    lines = [f"| | {peer} | {ours} | ratio |", "|---|---|---|---|"]
    for what, unit, theirs, mine in served_rows(result) + alone_rows(result):
        if full or unit == "tok/s":
            faster = mine.median / theirs.median if unit == "tok/s" else theirs.median / mine.median
            lines.append(f"| {what} | {_cell(theirs, unit)} | {_cell(mine, unit)} | {faster:.2f}× |")
    return "\n".join([*lines, "", _provenance(result)]) + "\n"


def accuracy_table(result: Accuracy) -> str:
    """Markdown."""
    lines = ["| mean abs. difference to float32 | most likely token | next token of the text | same top token |"]
    lines.append("|---|---|---|---|")
    lines += [
        f"| {one.engine} | {one.top_token.mean:.4f} | {one.next_token.mean:.4f} | {one.same_top_share:.1%} |"
        for one in result.engines
    ]
    first = result.engines[0]
    note = (
        f"{result.model.name}, {first.top_token.num_positions} and {first.next_token.num_positions} of "
        f"{result.num_positions} positions. {result.host.date[:10]}, commit `{result.host.commit}`."
    )
    return "\n".join([*lines, "", note]) + "\n"


def perplexity_table(result: Perplexities) -> str:
    """Markdown: for each engine the perplexity's difference to float32 and the mean |Δ| of log-probabilities."""
    names = [engine.engine for engine in result.types[0].engines]
    lines = [f"| type | float32 | {' | '.join(names)} |", "|---|---|" + "---|" * len(names)]
    for one in result.types:
        cells = [f"{engine.relative:+.2%}, {engine.mean:.4f}" for engine in one.engines]
        held = ", ".join(f"{count} {name}" for name, count in one.tensor_types.items() if name != "F32")
        name = f"{one.type}{' *' if one.widened else ''}{f' ({held})' if one.type in MIXED else ''}"
        lines.append(f"| {name} | {one.perplexity:.2f} | {' | '.join(cells)} |")
    note = (
        "Perplexity in float32; then the relative difference to it and the mean abs. difference of log-probabilities. "
        f"Over {result.num_scored} tokens of prose, but for up to "
        f"{result.num_scored - min(one.num_scored for one in result.types)} that llama.cpp does not tell; "
        f"{result.source.name} in each type; * widened to multiples of 256. "
        f"{result.host.date[:10]}, commit `{result.host.commit}`."
    )
    missed = [f"- {line}" for one in result.types for line in misses(one)]
    return "\n".join([*lines, "", note, *(["", "Bounds that are not met:", "", *missed] if missed else [])]) + "\n"


def plot(result: Comparison) -> str:
    """Throughputs as SVG."""
    panels = []
    for title, rows in (("over HTTP, output tok/s", served_rows(result)), ("engine alone, tok/s", alone_rows(result))):
        chosen = [row for row in rows if row[1] == "tok/s"]
        groups = [_group(row[0]) for row in chosen]
        peer, ours = _engines(result)
        panels.append(Bars(title, groups, [(peer, [row[2] for row in chosen]), (ours, [row[3] for row in chosen])]))
    return draw(panels)


def with_block(text: str, block: str) -> str:
    """Replace what stands between the markers. Raises `ValueError` when they are not there."""
    head, begin, rest = text.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise ValueError("the markers of the benchmark block are missing")
    return head + begin + block + end + tail


def written_files() -> dict[Path, str]:
    """All files this writes, with their right contents."""
    files: dict[Path, str] = {}
    short = full = ""
    if SPEED.exists():
        result = load_comparison(SPEED)
        short, full = speed_table(result, full=False), speed_table(result, full=True)
        files[PLOT] = plot(result)
        full += f"\n![throughput](../{PLOT.relative_to(ROOT)})\n"
    if ACCURACY.exists():
        full += "\n" + accuracy_table(msgspec.json.decode(ACCURACY.read_bytes(), type=Accuracy))
    if PERPLEXITY.exists():
        full += "\n" + perplexity_table(msgspec.json.decode(PERPLEXITY.read_bytes(), type=Perplexities))
    for path, block in ((ROOT / "README.md", short), (ROOT / "docs" / "benchmarks.md", full)):
        files[path] = with_block(path.read_text(), block)
    return files


def main() -> int:
    """Write, or check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 when something would change")
    check = parser.parse_args().check
    stale = [path for path, text in written_files().items() if not path.exists() or path.read_text() != text]
    for path in stale:
        print(f"{'differs from the results' if check else 'written'}: {path.relative_to(ROOT)}", file=sys.stderr)
        if not check:
            path.write_text(written_files()[path])
    return 1 if check and stale else 0


_HTTP_FIGURES: Final[tuple[tuple[str, str, Callable[[LevelReport], float]], ...]] = (
    ("output", "tok/s", lambda level: level.output_tokens_per_s),
    ("TTFT p50", "ms", lambda level: level.ttft_ms.p50),
    ("ITL p50", "ms", lambda level: level.itl_ms.p50),
    ("ITL p99", "ms", lambda level: level.itl_ms.p99),
    ("E2E p50", "ms", lambda level: level.e2e_ms.p50),
)


def _distinct(values: Iterable[_T]) -> list[_T]:
    return list(dict.fromkeys(values))


def _engines(result: Comparison) -> tuple[str, str]:
    (peer,) = [engine.name for engine in result.engines if engine.name != OURS]
    return peer, OURS


def _group(what: str) -> str:
    """A row's label below its bars."""
    return what.removeprefix("HTTP, ").removesuffix(": output").removeprefix("engine alone: ")


def _is(record: Served, engine: str, streams: int) -> bool:
    return (record.engine, record.level.num_streams) == (engine, streams)


def _cell(value: Summary, unit: str) -> str:
    digits = 0 if value.median >= 100 else 1
    return f"{value.median:.{digits}f} {unit} ({value.low:.{digits}f}–{value.high:.{digits}f})"


def _provenance(result: Comparison) -> str:
    """What the figures belong to, and what disturbed them."""
    host, failures = result.host, dict.fromkeys(_engines(result), 0)
    for record in result.served:
        failures[record.engine] += record.level.num_failures
    others = [one.others_cores for one in result.served] + [one.others_cores for one in result.alone]
    rounds = max(record.round for record in result.served)
    client = max(record.level.client_cpu_share for record in result.served)
    failed = ", ".join(f"{name} {count}" for name, count in failures.items())
    return (
        f"{result.model.name}, {result.prompt_tokens} tokens in, {result.output_tokens} out; medians of {rounds} "
        f"alternations (lowest–highest); a ratio above 1 means that {OURS} is faster. Failed requests: {failed}. "
        f"{host.cpu} (family/model {host.cpu_family_model}; {', '.join(host.features)}), {host.num_cores} cores, "
        f"{result.num_threads} threads each. Other processes kept {statistics.median(others):.2f} cores busy "
        f"(median; {max(others):.2f} at most), the load generator {client:.1%} of one. {host.date[:10]}, "
        f"commit `{host.commit}`."
    )


if __name__ == "__main__":
    sys.exit(main())
