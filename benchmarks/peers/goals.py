"""What llmserve is to reach beside its peers, and what the recorded comparisons say to that.

A ratio is of medians, ours to the peer's. Where a goal is about several types of weights, each engine has the one that
is best for it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from benchmarks.peers.report import RATE, Row, rows_of
from benchmarks.peers.results import OURS, Comparison

LLAMA_CPP: Final = "llama.cpp"
_STEPS: Final = ("decode B=1", "decode B=8", "decode B=32", "prefill 512")
_STREAMS: Final = ("1 stream", "8 streams", "32 streams")


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """The result files that goals look at; None where one is not recorded."""

    main: Comparison | None = None
    """The default model in 4-bit types, beside all peers."""
    same_type: Comparison | None = None
    """The default model in Q8_0 and BF16."""
    half_billion: Comparison | None = None
    """The shape of Qwen2.5-0.5B with random weights."""
    vllm: Comparison | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Goal:
    """A row of the table: ratios that are to be reached, one for each of `whats`."""

    label: str
    of: Callable[[Recorded], Comparison | None]
    bounds: tuple[float, ...]
    peer: str = ""
    """Empty: the best of all."""
    files: str = ""
    """Part of the names of the files that count; empty: all."""
    whats: tuple[str, ...] = tuple(f"engine alone: {step}" for step in _STEPS)

    def ratio(self, result: Comparison, what: str) -> float | None:
        """Ours to theirs; None where either was not measured."""
        ours, theirs = _best(self._rows(result, what), [OURS]), _best(self._rows(result, what), self._peers(result))
        if ours is None or theirs is None:
            return None
        return ours / theirs if _is_rate(what) else theirs / ours

    def _peers(self, result: Comparison) -> list[str]:
        return [self.peer] if self.peer else result.peers

    def _rows(self, result: Comparison, what: str) -> list[Row]:
        names = [result.model.name, *(file.name for file in result.other_files)]
        chosen = [name for name in names if self.files in name]
        return [row for name in chosen for row in rows_of(result, name) if row.what == what]


def _http(figure: str) -> tuple[str, ...]:
    return tuple(f"HTTP, {streams}: {figure}" for streams in _STREAMS)


GOALS: Final = (
    Goal(label="SmolLM2 Q4_1, llama.cpp on the same file", of=lambda r: r.main, peer=LLAMA_CPP, files="Q4_1",
         bounds=(2.2, 5.0, 5.5, 5.5)),
    Goal(label="SmolLM2, best 4-bit type of llama.cpp", of=lambda r: r.main, peer=LLAMA_CPP,
         bounds=(1.3, 2.5, 2.4, 1.9)),
    Goal(label="0.5B shape, best 4-bit type of llama.cpp", of=lambda r: r.half_billion, peer=LLAMA_CPP, files="Q4",
         bounds=(1.15, 2.5, 2.4, 1.9)),
    Goal(label="SmolLM2 Q8_0, llama.cpp on the same file", of=lambda r: r.same_type, peer=LLAMA_CPP, files="Q8_0",
         bounds=(1.15, 2.2, 2.5, 2.3)),
    Goal(label="SmolLM2 BF16, llama.cpp on the same file", of=lambda r: r.same_type, peer=LLAMA_CPP, files="BF16",
         bounds=(1.0, 1.4, 1.6, 1.1)),
    Goal(label="SmolLM2, best of all peers", of=lambda r: r.main, bounds=(1.3, 2.2, 1.8, 1.45)),
    Goal(label="0.5B shape, best of all peers", of=lambda r: r.half_billion, bounds=(1.15, 2.0, 1.5, 1.35)),
)  # fmt: skip
HTTP_GOALS: Final = (
    Goal(label="output tok/s, llama-server on Q4_0", of=lambda r: r.main, peer=LLAMA_CPP, files="Q4_0",
         whats=_http("output"), bounds=(1.8, 2.8, 2.6)),
    Goal(label="ITL p99, llama-server on Q4_0", of=lambda r: r.main, peer=LLAMA_CPP, files="Q4_0",
         whats=_http("ITL p99"), bounds=(1.0, 1.0, 1.0)),
    Goal(label="output tok/s, vLLM-CPU", of=lambda r: r.vllm, whats=_http("output"), bounds=(5.5, 3.2, 2.8)),
    Goal(label="ITL p99, vLLM-CPU", of=lambda r: r.vllm, whats=_http("ITL p99"), bounds=(1.0, 1.0, 1.0)),
)  # fmt: skip


def goals_table(recorded: Recorded) -> str:
    """Markdown: ratios beside what they are to be; those that fall short in bold."""
    return "\n".join([*_table(recorded, GOALS, _STEPS), "", *_table(recorded, HTTP_GOALS, _STREAMS)]) + "\n"


def _table(recorded: Recorded, goals: Sequence[Goal], columns: Sequence[str]) -> Iterator[str]:
    yield f"| llmserve to | {' | '.join(columns)} |"
    yield "|---|" + "---|" * len(columns)
    for goal in goals:
        result = goal.of(recorded)
        if result is not None:
            yield f"| {goal.label} | {' | '.join(_cells(goal, result))} |"


def _cells(goal: Goal, result: Comparison) -> Iterator[str]:
    for what, bound in zip(goal.whats, goal.bounds, strict=True):
        ratio = goal.ratio(result, what)
        if ratio is None:
            yield "—"
            continue
        text = f"{ratio:.2f}× of {bound:g}"
        yield text if ratio >= bound else f"**{text}**"


def _best(rows: Sequence[Row], engines: Sequence[str]) -> float | None:
    """The best median of these engines over all files."""
    medians = [one.median for row in rows for name in engines if (one := row.summary(name))]
    if not medians:
        return None
    return max(medians) if rows[0].unit == RATE else min(medians)


def _is_rate(what: str) -> bool:
    return "ITL" not in what
