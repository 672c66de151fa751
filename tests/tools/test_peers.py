"""The comparison with peers: order, arithmetic, tables, and the peers that are installed."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import pytest

from benchmarks.line_worker import LineWorker
from benchmarks.peers import llama_cpp, openvino
from benchmarks.peers.__main__ import PEERS, names_of
from benchmarks.peers.environment import python_of, said
from benchmarks.peers.openvino import OpenVino
from benchmarks.peers.peer import Bench, ServerCommand, Setting
from benchmarks.peers.quiet import Quiet
from benchmarks.peers.report import Row, best_type_table, plot, rows_of, shortfall, speed_table
from benchmarks.peers.results import OURS, RESULTS, Alone, Comparison, Engine, ModelFile, Served, load_comparison
from benchmarks.peers.rounds import ALONE, HTTP, order, run_rounds
from benchmarks.peers.vllm_cpu import is_needed
from llmserve.errors import EngineFault
from llmserve.tools.bench_host import describe_host
from llmserve.tools.bench_load import Load
from llmserve.tools.bench_stats import level_report
from llmserve.tools.bench_trace import Trace
from tests.e2e.real_server import default_model

FIRST, OTHER = "a-q4_1.gguf", "a-q4_0.gguf"


def alone(engine: str, number: int, speed: float, *, file: str = "", what: str = "decode B=1") -> Alone:
    return Alone(engine=engine, file=file, round=number, others_cores=0.0, what=what, tokens_per_s=speed)


def served(engine: str, number: int, e2e_s: float, *, failed: bool = False) -> Served:
    trace = Trace(failure="lost") if failed else Trace(ttft_s=e2e_s / 2, e2e_s=e2e_s, num_output_tokens=10)
    level = level_report(8, [trace], wall_s=e2e_s, client_cpu_s=0.0)
    return Served(engine=engine, round=number, others_cores=0.0, level=level)


def comparison(
    *, alone: Sequence[Alone] = (), served: Sequence[Served] = (), engines: Sequence[str] = ("p", "q", OURS)
) -> Comparison:
    file = ModelFile(name=FIRST, sha256="0", num_bytes=1)
    return Comparison(
        host=describe_host(), model=file, other_files=[msgspec.structs.replace(file, name=OTHER)], num_threads=2,
        prompt_tokens=128, output_tokens=64, max_others_cores=0.1,
        engines=[Engine(name=name, version="1", command="") for name in engines],
        served=list(served), alone=list(alone),
    )  # fmt: skip


def test_a_ratio_is_of_medians_and_its_range_within_rounds() -> None:
    """The machine was half as fast in the second round: the ratio within each is 2."""
    row = Row(label="", what="", unit="tok/s", by_round={"p": {1: 100.0, 2: 50.0, 3: 90.0}, OURS: {1: 200.0, 2: 100.0}})
    ratio = row.ratio("p")
    assert ratio is not None
    assert (ratio.low, ratio.high) == (2.0, 2.0)
    assert ratio.of_medians == pytest.approx(150 / 90)


def test_one_disturbed_round_makes_no_ratio() -> None:
    rounds = {"p": {1: 1.0, 2: 140.0, 3: 142.0}, OURS: {1: 70.0, 2: 70.0, 3: 71.0}}
    ratio = Row(label="", what="", unit="tok/s", by_round=rounds).ratio("p")
    assert ratio is not None
    assert ratio.of_medians == 0.5
    assert str(ratio) == "0.50× (0.50–70.00)"


def test_disturbed_measurements_are_told() -> None:
    records = [alone("p", 1, 100.0), alone(OURS, 1, 100.0)]
    assert "disturbed" not in speed_table(comparison(alone=records), full=False)
    records.append(msgspec.structs.replace(records[0], round=2, others_cores=0.5))
    assert "1 of 3 measurements were disturbed" in speed_table(comparison(alone=records), full=False)


def test_shorter_times_are_faster() -> None:
    row = Row(label="", what="", unit="ms", by_round={"p": {1: 10.0}, "q": {1: 30.0}, OURS: {1: 20.0}})
    assert row.best_peer() == "p"
    ratios = [row.ratio(name) for name in ("p", "q")]
    assert [one.of_medians if one else None for one in ratios] == [0.5, 1.5]


def test_a_peer_without_the_figure_is_left_out_not_nought() -> None:
    row = Row(label="", what="", unit="tok/s", by_round={"p": {1: 100.0}, OURS: {1: 50.0}})
    assert row.ratio("q") is None
    assert row.summary("q") is None
    assert row.best_peer() == "p"


def test_the_table_has_every_peer_and_the_ratio_to_the_best() -> None:
    result = comparison(alone=[alone("p", 1, 200.0), alone("q", 1, 400.0), alone(OURS, 1, 600.0)])
    table = speed_table(result, full=False)
    assert "| | p | q | llmserve | ratio to the best |" in table
    assert (
        "| engine alone: decode B=1 | 200 tok/s (200–200) | 400 tok/s (400–400) | 600 tok/s (600–600) | "
        "1.50× (1.50–1.50) |"
    ) in table


def test_files_are_not_mixed() -> None:
    """The first file's records may name it or not."""
    records = [alone(OURS, 1, 100.0), alone(OURS, 2, 110.0, file=FIRST), alone(OURS, 1, 900.0, file=OTHER)]
    result = comparison(alone=records, engines=[OURS])
    (row,), (other,) = rows_of(result, FIRST), rows_of(result, OTHER)
    assert row.by_round == {OURS: {1: 100.0, 2: 110.0}}
    assert other.by_round == {OURS: {1: 900.0}}


def test_each_peer_is_told_with_its_best_file() -> None:
    records = [
        alone("p", 1, 100.0), alone("p", 1, 300.0, file=OTHER), alone("q", 1, 200.0), alone("q", 1, 150.0, file=OTHER),
        alone(OURS, 1, 600.0), alone(OURS, 1, 50.0, file=OTHER),
    ]  # fmt: skip
    table = best_type_table(comparison(alone=records))
    assert f"| engine alone: decode B=1, tok/s | 300 ({OTHER}) | 200 ({FIRST}) | 600 | 2.00× |" in table


def test_what_falls_short_is_told_and_nothing_else() -> None:
    records = [alone("p", 1, 100.0), alone("q", 1, 400.0), alone(OURS, 1, 300.0)]
    times = [served("p", 1, 1.0), served(OURS, 1, 2.0)]
    text = shortfall(comparison(alone=records, served=times))
    assert f"- engine alone: decode B=1 ({FIRST}): 0.75× (0.75–0.75) of q" in text
    assert f"- HTTP, 8 streams: E2E p50 ({FIRST}): 0.50× (0.50–0.50) of p" in text
    assert "of p\n- engine alone" in text
    assert text.count("decode") == 1
    assert "nothing" in shortfall(comparison(alone=[alone("p", 1, 1.0), alone(OURS, 1, 1.0)]))


def test_a_level_that_failed_has_no_latencies() -> None:
    rows = rows_of(comparison(served=[served("p", 1, 1.0, failed=True), served(OURS, 1, 2.0)]), FIRST)
    by_what = {row.what: row for row in rows}
    assert by_what["HTTP, 8 streams: output"].by_round["p"] == {1: 0.0}
    assert "p" not in by_what["HTTP, 8 streams: E2E p50"].by_round
    assert by_what["HTTP, 8 streams: output"].ratio("p") is None


def test_the_plot_has_a_panel_for_what_was_measured() -> None:
    assert plot(comparison(alone=[alone(OURS, 1, 1.0)])).count("<polyline") == 0
    assert "engine alone" in plot(comparison(alone=[alone(OURS, 1, 1.0)]))
    assert "over HTTP" not in plot(comparison(alone=[alone(OURS, 1, 1.0)]))


def test_the_committed_results_can_be_read() -> None:
    result = load_comparison(RESULTS / "peers.json")
    assert OURS in {engine.name for engine in result.engines}
    assert rows_of(result, result.model.name)


@dataclass
class Spoken:
    """An engine that only writes down when it is asked."""

    name: str
    log: list[str]
    given: str = ""
    opened: list[str] = field(default_factory=list)

    def version(self) -> str:
        return "1"

    def server(self, model: Path, port: int) -> ServerCommand | None:
        return None

    def alone(self, model: Path) -> AbstractContextManager[Bench] | None:
        return self._alone(model) if self.name != "http" else None

    @contextlib.contextmanager
    def _alone(self, model: Path) -> Iterator[Bench]:
        assert not self.opened, "one at a time"
        self.opened.append(model.name)
        self.log.append(f"{self.name} {model.name}")
        yield self
        self.opened.clear()

    def prefill(self) -> float:
        return 1.0

    def decode(self, batch: int) -> float:
        return float(batch)


def test_engines_alternate_and_only_one_is_open() -> None:
    log: list[str] = []
    opened: list[str] = []
    engines = [Spoken(name, log, opened=opened) for name in ("p", "http", OURS)]
    setting = Setting(num_threads=1, quiet=Quiet(max_cores=1e9, timeout_s=0.0, sample_s=0.01), levels=(2,))
    http, found = run_rounds(setting, engines, [Path(FIRST), Path(OTHER)], 2)
    expected = [f"{name} {file}" for names in (("p", OURS), (OURS, "p")) for file in (FIRST, OTHER) for name in names]
    assert log == expected
    assert http == []
    assert [(one.engine, one.file, one.round, one.what, one.tokens_per_s) for one in found[:2]] == [
        ("p", FIRST, 1, "prefill 512", 1.0),
        ("p", FIRST, 1, "decode B=2", 2.0),
    ]
    assert len(found) == 16
    assert order(engines, 3) == engines


@dataclass
class Failing(Spoken):
    """It fails at one file."""

    file: str = FIRST

    @contextlib.contextmanager
    def _alone(self, model: Path) -> Iterator[Bench]:
        if model.name == self.file:
            raise EngineFault(f"{self.name} ended")
        yield self


def test_a_peer_that_fails_loses_its_turn_and_no_other_does(capsys: pytest.CaptureFixture[str]) -> None:
    setting = Setting(num_threads=1, quiet=Quiet(max_cores=1e9, timeout_s=0.0, sample_s=0.01), levels=(2,))
    engines = [Failing("p", []), Spoken("q", []), Spoken(OURS, [])]
    _, found = run_rounds(setting, engines, [Path(FIRST), Path(OTHER)], 1, (ALONE,))
    turns = {(one.engine, one.file) for one in found}
    assert turns == {("p", OTHER), ("q", FIRST), ("q", OTHER), (OURS, FIRST), (OURS, OTHER)}
    assert f"p failed with {FIRST}: p ended" in capsys.readouterr().err
    assert run_rounds(setting, engines, [Path(FIRST)], 1, (HTTP,)) == ([], [])
    with pytest.raises(EngineFault):
        run_rounds(setting, [Failing(OURS, [])], [Path(FIRST)], 1)


BENCH = 'ggml_info: x\n[\n  {\n    "n_prompt": 512,\n    "samples_ts": [ 20.5, 53.5, 30.0 ]\n  }\n]\n'
BATCHED = """
|    PP |     TG |    B |   N_KV |   T_PP s | S_PP t/s |   T_TG s | S_TG t/s |      T s |    S t/s |
|-------|--------|------|--------|----------|----------|----------|----------|----------|----------|
|   128 |     64 |    8 |   1536 |    3.332 |    38.42 |    3.659 |   125.09 |    6.991 |    18.88 |

llama_perf_context_print: done
"""


def test_the_tools_of_llama_cpp_are_read() -> None:
    assert llama_cpp.prefill_speed(BENCH) == 30.0
    assert llama_cpp.decode_speed(BATCHED) == 125.09


def test_peers_by_name() -> None:
    assert names_of(PEERS)(",".join(PEERS)) == list(PEERS)
    assert names_of(PEERS)("openvino,openvino") == ["openvino"]
    with pytest.raises(Exception, match="choose among"):
        names_of(PEERS)("llama.cpp,other")


@pytest.mark.parametrize(
    ("requirement", "needed"),
    [
        ("torch==2.13.0+cpu; platform_machine == 'x86_64'", False),
        ("torchaudio; platform_machine != 's390x'", False),
        ("tokenizers>=0.23.2", True),
        ("fastapi[standard]<0.137.0,>=0.133.0", True),
        ('pandas; extra == "bench"', False),
    ],
)
def test_requirements_that_are_installed(requirement: str, needed: bool) -> None:
    assert is_needed(requirement) is needed


def test_a_command_that_fails_is_not_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(["echo", "here"]) == "here\n"
    with pytest.raises(subprocess.CalledProcessError):
        said(["sh", "-c", "echo broken >&2; exit 3"])
    assert "broken" in capsys.readouterr().err


def worker_of(folder: Path, source: str) -> LineWorker:
    script = folder / "worker.py"
    script.write_text(source)
    return LineWorker(Path(sys.executable), script)


def test_a_worker_answers_and_its_end_is_told(tmp_path: Path) -> None:
    source = "while line := input():\n    assert 'end' not in line, 'told to'\n    print(line, flush=True)\n"
    with worker_of(tmp_path, source) as worker:
        assert msgspec.json.decode(worker.ask({"a": [1]})) == {"a": [1]}
        assert worker.ask({"end": 1}) == b""
        assert "told to" in worker.last_words()


def test_modules_beside_a_worker_do_not_hide_packages(tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("raise ImportError('hidden')\n")
    with worker_of(tmp_path, "import numpy\ninput()\nprint(len(numpy.__version__) > 0)\n") as worker:
        assert worker.ask({}) == b"True\n"


@pytest.fixture(scope="module")
def openvino_engine() -> OpenVino:
    python = python_of(openvino.ENVIRONMENT)
    if not python.exists():
        pytest.skip(f"{openvino.PEER} is not installed: python -m benchmarks.peers --peers openvino")
    return OpenVino(Setting(num_threads=1, load=Load(prompt_tokens=8, output_tokens=4)), python)


@pytest.mark.model
def test_openvino_measures_what_it_was_asked(openvino_engine: OpenVino) -> None:
    """Its worker fails when steps and tokens differ, so a speed is one of as many tokens."""
    with openvino_engine.alone(default_model()) as bench:
        for speed in (bench.prefill(), bench.decode(1), bench.decode(4)):
            assert 1 < speed < 1e5


def test_openvino_tells_what_it_cannot_load(openvino_engine: OpenVino, tmp_path: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUFnone")
    with pytest.raises(EngineFault, match=r"OpenVINO GenAI: \S+"), openvino_engine.alone(broken):
        pass
