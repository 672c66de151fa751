"""Write the tables of README.md and docs/benchmarks.md, and the plot, from the committed result files.

python -m benchmarks.table            # rewrite the blocks between the markers
python -m benchmarks.table --check    # fail when they are not what the results say
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Final

import msgspec

from benchmarks.peers.accuracy import Accuracy
from benchmarks.peers.goals import Recorded, goals_table
from benchmarks.peers.perplexity import Perplexities, misses
from benchmarks.peers.perplexity_models import MIXED
from benchmarks.peers.report import plot, speed_table
from benchmarks.peers.results import RESULTS, Comparison, load_comparison

ROOT: Final = Path(__file__).resolve().parent.parent
BEGIN: Final = "<!-- begin benchmarks: written by benchmarks/table.py -->\n"
END: Final = "<!-- end benchmarks -->"
SPEED: Final = RESULTS / "peers.json"
ACCURACY: Final = RESULTS / "accuracy.json"
PERPLEXITY: Final = RESULTS / "perplexity.json"
PLOT: Final = RESULTS / "peers.svg"
SAME_TYPE: Final = RESULTS / "peers_same_type.json"
HALF_BILLION: Final = RESULTS / "peers_05b.json"
VLLM: Final = RESULTS / "peers_vllm.json"
LONG: Final = RESULTS / "peers_long.json"
AMX: Final = RESULTS / "peers_amx.json"
"""`SPEED` without HTTP, on a processor with a matrix unit."""


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


def recorded_in(path: Path) -> Comparison | None:
    """The comparison of a result file; None where there is none."""
    return load_comparison(path) if path.exists() else None


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
    for path in (SAME_TYPE, HALF_BILLION, VLLM, AMX, LONG):
        if path.exists():
            full += f"\n{speed_table(load_comparison(path), full=True)}"
    recorded = Recorded(
        main=recorded_in(SPEED),
        same_type=recorded_in(SAME_TYPE),
        half_billion=recorded_in(HALF_BILLION),
        vllm=recorded_in(VLLM),
    )
    full = f"What is to be reached, and what was; what falls short in bold:\n\n{goals_table(recorded)}\n{full}"
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


if __name__ == "__main__":
    sys.exit(main())
