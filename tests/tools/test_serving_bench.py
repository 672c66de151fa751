"""`python -m benchmarks.serving`: arithmetic, arrivals, the page, and a run against real servers."""

from __future__ import annotations

import html.parser
import itertools
import statistics
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.arguments import one_positive, positive
from benchmarks.serving.__main__ import main
from benchmarks.serving.records import Serving, Slo, closed_level, count_good, open_level
from benchmarks.serving.report import failures_of, page
from llmserve.tools.bench_host import describe_host
from llmserve.tools.bench_load import Measured
from llmserve.tools.bench_prompts import poisson_arrivals
from llmserve.tools.bench_trace import Trace
from tests.e2e.conftest import scripted_server
from tests.e2e.real_server import default_model


def trace(ttft_ms: float, tpot_ms: float, num_tokens: int = 11) -> Trace:
    e2e_s = (ttft_ms + tpot_ms * (num_tokens - 1)) / 1000
    return Trace(ttft_s=ttft_ms / 1000, e2e_s=e2e_s, num_prompt_tokens=5, num_output_tokens=num_tokens)


LOST = Trace(failure="lost")


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        (Slo(), [True, True, True]),
        (Slo(ttft_ms=150), [True, False, True]),
        (Slo(tpot_ms=30), [True, True, False]),
        (Slo(ttft_ms=150, tpot_ms=30), [True, False, False]),
        (Slo(e2e_ms=350), [True, False, False]),
        (Slo(ttft_ms=100.001, tpot_ms=20.001), [True, False, False]),
        (Slo(ttft_ms=99.9), [False, False, False]),
    ],
)
def test_every_limit_counts(slo: Slo, good: list[bool]) -> None:
    traces = [trace(100, 20), trace(200, 20), trace(100, 40)]
    assert [slo.is_met(one) for one in traces] == good
    assert count_good([*traces, LOST], slo) == sum(good)


def test_at_the_limit_is_within() -> None:
    assert Slo(ttft_ms=250).is_met(Trace(ttft_s=0.25, e2e_s=1.0, num_output_tokens=2))
    assert Slo(e2e_ms=500).is_met(Trace(ttft_s=0.25, e2e_s=0.5, num_output_tokens=2))


def test_one_token_has_no_tpot() -> None:
    assert Slo(tpot_ms=1).is_met(Trace(ttft_s=0.1, e2e_s=0.2, num_output_tokens=1))


def test_goodput_is_over_the_wall_time_and_its_share_over_all_requests() -> None:
    traces = [trace(100, 20), trace(100, 20), trace(900, 20), LOST]
    seen = Measured(traces=traces, wall_s=4.0, client_cpu_s=0.2, late_s=[0.001, 0.003])
    level = open_level(2.0, 1.0, seen, Slo(ttft_ms=500), others_cores=0.0)
    assert (level.num_good, level.good_share, level.goodput_per_s) == (2, 0.5, 0.5)
    assert (level.report.requests_per_s, level.report.num_failures) == (0.75, 1)
    assert (level.offered, level.sent_per_s, level.late_ms.max) == (2.0, 4.0, 3.0)
    assert level.report.client_cpu_share == 0.05
    assert closed_level(8, seen, Slo(), others_cores=None).offered == 8.0


@given(st.floats(0.1, 50), st.floats(0.1, 30), st.integers(0, 100))
def test_arrivals_are_ascending_within_the_time_and_repeatable(rate: float, seconds: float, seed: int) -> None:
    arrivals = poisson_arrivals(rate, seconds, seed)
    assert arrivals == poisson_arrivals(rate, seconds, seed)
    assert arrivals[0] == 0.0
    assert arrivals[-1] < seconds
    assert all(before < after for before, after in itertools.pairwise(arrivals))


def test_arrivals_are_poisson() -> None:
    """Gaps of an exponential distribution: mean 1 / rate, deviation the same, a share 1/e longer than the mean."""
    gaps = [after - before for before, after in itertools.pairwise(poisson_arrivals(5.0, 4000.0, seed=1))]
    assert statistics.mean(gaps) == pytest.approx(0.2, rel=0.03)
    assert statistics.stdev(gaps) == pytest.approx(0.2, rel=0.03)
    assert sum(gap > 0.2 for gap in gaps) / len(gaps) == pytest.approx(0.3679, rel=0.03)
    assert poisson_arrivals(5.0, 10.0, seed=1) != poisson_arrivals(5.0, 10.0, seed=2)
    for rate, seconds in ((0.0, 1.0), (1.0, 0.0)):
        with pytest.raises(ValueError, match="positive"):
            poisson_arrivals(rate, seconds, seed=0)


def test_numbers_of_the_command_line() -> None:
    assert positive(int)("1,8") == [1, 8]
    assert positive(float)("") == []
    assert one_positive("2.5") == 2.5
    for bad in ("0", "-1", "x", "1,,x", "nan", "inf"):
        with pytest.raises(Exception, match="numbers"):
            positive(float)(bad)
    for bad in ("", "0", "1,2"):
        with pytest.raises(Exception, match="number"):
            one_positive(bad)


class Links(html.parser.HTMLParser):
    """What a page would fetch, and its tags that are still open."""

    VOID = ("meta", "circle", "rect", "line", "polyline")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.num_plots = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href", "xlink:href")]
        self.num_plots += tag == "svg"
        if tag in ("script", "link", "img", "iframe"):
            self.fetched.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def test_the_page_is_whole_alone_and_escaped() -> None:
    seen = Measured(traces=[trace(100, 20), Trace(failure="<b>lost")], wall_s=4.0, client_cpu_s=0.2, late_s=[0.001])
    result = Serving(
        host=describe_host(), target="m.gguf", model="<i>", prompt_tokens=5, output_tokens=11, seed=0, seconds=1.0,
        slo=Slo(ttft_ms=500), closed=[closed_level(8, seen, Slo(), others_cores=0.1)],
        open=[open_level(rate, 1.0, seen, Slo(), others_cores=0.1) for rate in (1.0, 2.5)],
    )  # fmt: skip
    text = page(result)
    links = Links(text)
    assert (links.fetched, links.open, links.num_plots) == ([], [], 2)
    assert "@import" not in text
    assert "url(" not in text
    assert "<i>" not in text
    assert "<b>" not in text
    assert "8 streams" in text
    assert "2.5 requests/s" in text
    assert "TTFT ≤ 500 ms" in text
    assert next(iter(failures_of(result))) == "8 streams: 1× <b>lost"
    assert msgspec.json.decode(msgspec.json.encode(result), type=Serving) == result


def test_a_running_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its script answers with eight tokens whatever is asked; a time of 0.001 ms cannot be kept."""
    out = tmp_path / "result.json"
    options = ["--streams", "2", "--requests", "4", "--rates", "20,40", "--seconds", "0.5", "--json", str(out)]
    load = ["--prompt-tokens", "6", "--output-tokens", "8"]
    with scripted_server() as server:
        assert main([server.url, *options, *load]) == 0
        result = msgspec.json.decode(out.read_bytes(), type=Serving)
        assert main([server.url, *options, *load, "--slo-ttft-ms", "0.001"]) == 0
        strict = msgspec.json.decode(out.read_bytes(), type=Serving)
        assert main([server.url, *options, "--prompt-tokens", "6", "--output-tokens", "9"]) == 1
    assert "8 tokens instead of 9" in capsys.readouterr().out
    assert [level.report.num_requests for level in result.open] == [
        len(poisson_arrivals(rate, 0.5, 0)) for rate in (20.0, 40.0)
    ]
    for level in (*result.closed, *result.open):
        assert level.num_good == level.report.num_requests
        assert level.report.output_tokens == 8
        assert level.others_cores is None
    assert {level.num_good for level in (*strict.closed, *strict.open)} == {0}
    assert out.with_suffix(".html").read_text().count("<svg") == 2


def test_nobody_listens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    assert main(["http://127.0.0.1:1", "--json", str(out)]) == 1
    assert "cannot connect" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.model
def test_it_starts_and_stops_a_server(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    options = ["--streams", "2", "--requests", "2", "--rates", "4", "--seconds", "0.5", "--json", str(out)]
    assert main([str(default_model()), *options, "--prompt-tokens", "8", "--output-tokens", "4"]) == 0
    result = msgspec.json.decode(out.read_bytes(), type=Serving)
    assert result.target.endswith(".gguf")
    for level in (*result.closed, *result.open):
        assert level.others_cores is not None
        assert level.report.output_tokens == 4
