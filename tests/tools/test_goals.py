"""The table of what is to be reached beside peers."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.peers.goals import GOALS, HTTP_GOALS, Recorded, goals_table
from benchmarks.peers.results import OURS, Alone, Comparison, Engine, ModelFile, Served
from llmserve.tools.bench_host import describe_host
from llmserve.tools.bench_stats import level_report
from llmserve.tools.bench_trace import Trace

Q4_1, Q4_0 = "a.Q4_1.gguf", "a.Q4_0.gguf"


def comparison(speeds: Mapping[tuple[str, str], float], e2e_s: Mapping[tuple[str, str], float] = {}) -> Comparison:
    """Speeds of decode B=8 by engine and file; E2E of 8 streams over HTTP the same way."""
    names = list(dict.fromkeys([name for name, _ in (*speeds, *e2e_s)]))
    return Comparison(
        host=describe_host(), model=ModelFile(name=Q4_1, sha256="0", num_bytes=1),
        other_files=[ModelFile(name=Q4_0, sha256="0", num_bytes=1)],
        num_threads=2, prompt_tokens=128, output_tokens=64, max_others_cores=0.1,
        engines=[Engine(name=name, version="1", command="") for name in names],
        served=[
            Served(
                engine=name, file=file, round=1, others_cores=0.0,
                level=level_report(8, [Trace(ttft_s=s / 2, e2e_s=s, num_output_tokens=10, gaps_s=[s / 20] * 9)],
                                   wall_s=s, client_cpu_s=0.0),
            )
            for (name, file), s in e2e_s.items()
        ],
        alone=[
            Alone(engine=name, file=file, round=1, others_cores=0.0, what="decode B=8", tokens_per_s=speed)
            for (name, file), speed in speeds.items()
        ],
    )  # fmt: skip


def row(recorded: Recorded, label: str) -> str:
    (line,) = [line for line in goals_table(recorded).splitlines() if line.startswith(f"| {label} |")]
    return line


def test_a_goal_on_one_file_takes_no_other_and_no_other_peer() -> None:
    speeds = {("llama.cpp", Q4_1): 100.0, ("llama.cpp", Q4_0): 300.0, ("other", Q4_1): 400.0, (OURS, Q4_1): 510.0}
    line = row(Recorded(main=comparison(speeds)), GOALS[0].label)
    assert line.endswith("| — | 5.10× of 5 | — | — |")


def test_each_engine_has_the_type_that_is_best_for_it_and_a_miss_is_bold() -> None:
    speeds = {("llama.cpp", Q4_1): 100.0, ("llama.cpp", Q4_0): 300.0, (OURS, Q4_1): 510.0, (OURS, Q4_0): 600.0}
    assert row(Recorded(main=comparison(speeds)), GOALS[1].label).endswith("| — | **2.00× of 2.5** | — | — |")


def test_the_best_of_all_peers_is_the_fastest_one() -> None:
    speeds = {("llama.cpp", Q4_1): 100.0, ("other", Q4_0): 250.0, (OURS, Q4_1): 550.0}
    assert row(Recorded(main=comparison(speeds)), "SmolLM2, best of all peers").endswith("| — | 2.20× of 2.2 | — | — |")


def test_of_latencies_the_smaller_is_the_better() -> None:
    times = {("llama.cpp", Q4_0): 4.0, (OURS, Q4_0): 1.0}
    recorded = Recorded(main=comparison({}, times))
    assert row(recorded, HTTP_GOALS[1].label) == f"| {HTTP_GOALS[1].label} | — | 4.00× of 1 | — |"
    slower = Recorded(main=comparison({}, {("llama.cpp", Q4_0): 1.0, (OURS, Q4_0): 2.0}))
    assert "**0.50× of 1**" in row(slower, HTTP_GOALS[1].label)


def test_what_is_not_recorded_has_no_row() -> None:
    assert "vLLM" not in goals_table(Recorded(main=comparison({})))
