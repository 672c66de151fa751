"""The kernel benchmark's driver reads what the executable prints, judges the floors and draws. Nothing is timed."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import msgspec
import pytest

from benchmarks.kernels import report
from benchmarks.kernels.floors import LIBRARY_TYPE, misses, share, units
from benchmarks.kernels.records import Gemm, Kernels, Versus, parse
from llmserve.tools.bench_host import describe_host

_RUN = (
    '{"record":"run","cpu":"Some CPU","isa":"avx512","threads":2,"rounds":5,"commit":"0123456789","compiler":"12.2.0"}'
)
_ROOF = '{"record":"roof","name":"dram","threads":2,"per_s":3.2e+10,"low":2.8e+10,"high":3.4e+10}'
_GEMM = (
    '{"record":"gemm","type":"q4_0","shape":"llama-3.2-1b","part":"gate_up","n":16384,"k":2048,"m":16,"copies":11,"disturbed":0,'
    '"weight_bytes":18874368,"gemm_s":0.0025,"gemm_s_low":0.0024,"gemm_s_high":0.0027,"call_s":0.0026,'
    '"bytes_per_s":7.5e+09,"ops_per_s":4.2e+11,"dram_share":0.2200,"roof":"int8","roof_share":0.7000}'
)


def _gemm(m: int, *, share: float, **changes: object) -> Gemm:
    (one,) = parse([_RUN, _GEMM]).gemms
    few = {"dram_share": share, "roof_share": 0.1}
    many = {"dram_share": 0.1, "roof_share": share}
    return msgspec.structs.replace(one, m=m, **{**(few if m < 8 else many), **changes})


def test_the_executable_s_lines_are_read() -> None:
    printed = parse([_RUN, _ROOF, _GEMM, ""])
    assert (printed.run.isa, printed.run.threads) == ("avx512", 2)
    assert [(one.name, one.per_s) for one in printed.roofs] == [("dram", 3.2e10)]
    (one,) = printed.gemms
    assert (one.type, one.part, one.m, one.gemm_s, one.bound_share) == ("q4_0", "gate_up", 16, 0.0025, 0.7)


@pytest.mark.parametrize(
    "lines", [[], [_GEMM], [_RUN, _RUN], [_RUN, '{"record":"other"}'], [_RUN, _GEMM[:-20]], [_RUN, '{"record":"roof"}']]
)
def test_lines_that_are_no_run_are_refused(lines: list[str]) -> None:
    with pytest.raises(ValueError):
        parse(lines)


def test_one_row_is_judged_by_the_dram_rate_of_large_models() -> None:
    assert misses([_gemm(1, share=0.86)], []) == []
    assert len(misses([_gemm(1, share=0.84)], [])) == 1
    assert misses([_gemm(1, share=0.84, shape="smollm2-135m")], []) == []
    arithmetic = _gemm(1, share=0.84, roof_share=0.95)
    assert len(misses([arithmetic], [])) == 1, "the arithmetic is no excuse"


def test_a_few_rows_may_take_a_tenth_more_than_one() -> None:
    one = _gemm(1, share=0.9, gemm_s=1.0)
    for m in (2, 4):
        assert misses([one, _gemm(m, share=0.9, gemm_s=1.09)], []) == []
        assert len(misses([one, _gemm(m, share=0.9, gemm_s=1.11)], [])) == 1


@pytest.mark.parametrize(
    ("name", "m", "floor"),
    [("q4_0", 8, 0.6), ("q4_0", 16, 0.68), ("q4_1", 16, 0.62), ("q8_0", 512, 0.68), ("bf16", 64, 0.7)],
)
def test_more_rows_are_judged_by_type(name: str, m: int, floor: float) -> None:
    assert misses([_gemm(m, share=floor + 0.01, type=name)], []) == []
    (line,) = misses([_gemm(m, share=floor - 0.01, type=name)], [])
    assert line.startswith(f"{name} llama-3.2-1b layer M={m}: ")


def test_many_rows_may_be_bound_by_memory() -> None:
    assert misses([_gemm(16, share=0.3, dram_share=0.9)], []) == []


def test_a_layer_is_judged_as_a_whole_and_the_head_alone() -> None:
    small = _gemm(16, share=0.2, part="o", gemm_s=0.1)
    large = _gemm(16, share=0.8, part="gate_up", gemm_s=0.9)
    head = _gemm(16, share=0.2, part="head")
    assert misses([small, large], []) == []
    assert share([small, large], 16) == pytest.approx(0.74)
    (line,) = misses([small, large, head], [])
    assert "head" in line
    assert len(units([small, large, head])) == 2


def test_a_layer_with_a_disturbed_matrix_is_not_judged_but_said() -> None:
    lost = '{"record":"disturbed","type":"q4_0","shape":"llama-3.2-1b","part":"o","m":16}'
    (disturbed,) = parse([_RUN, lost]).disturbed
    found = misses([_gemm(16, share=0.2), _gemm(64, share=0.2)], [], [disturbed])
    assert found[0] == "q4_0 llama-3.2-1b o M=16: disturbed in every round"
    assert [line.split(":")[0] for line in found[1:]] == ["q4_0 llama-3.2-1b layer M=64"]


def test_a_type_without_a_floor_is_said() -> None:
    assert misses([_gemm(1, share=0.9, type="f32")], []) == []
    (line,) = misses([_gemm(1, share=0.9, type="q99")], [])
    assert line.startswith("q99 has no floor")


def test_int8_per_channel_must_match_the_library() -> None:
    def versus(ours: float, m: int) -> Versus:
        return Versus(
            kind="int8", n=2048, k=2048, m=m, library="other", library_ops_per_s=8e11,
            ours={LIBRARY_TYPE: ours, "q4_0": 1e11},
        )  # fmt: skip

    assert misses([], [versus(8.1e11, 2048), versus(1e11, 16)]) == []
    assert len(misses([], [versus(7.9e11, 2048)])) == 1


def test_text_and_plot_show_every_type() -> None:
    printed = parse([_RUN, _ROOF])
    gemms = [_gemm(m, share=0.5 + m / 100, type=name) for name in ("q4_0", "bf16") for m in (1, 4, 16)]
    versus = [Versus(kind="bf16", n=2048, k=2048, m=16, library="other", library_ops_per_s=4e11, ours={"bf16": 3e11})]
    result = Kernels(
        host=describe_host(),
        run=printed.run,
        others_cores=0.0,
        roofs=printed.roofs,
        gemms=gemms,
        disturbed=[],
        versus=versus,
    )
    shown = report.text(result)
    assert "| q4_0 llama-3.2-1b layer |" in shown
    assert "| bf16 16x2048x2048 | 400 GOPS | bf16 300 (0.75×) |" in shown
    root = ElementTree.fromstring(report.plot(result))
    lines = [one.attrib["points"].split() for one in root.iter() if one.tag.endswith("polyline")]
    assert [len(points) for points in lines] == [3, 3]
    first, middle, last = (float(point.split(",")[0]) for point in lines[0])
    assert middle - first == pytest.approx(last - middle, abs=0.2), "1, 4, 16 are even steps of a logarithm"
    assert msgspec.json.decode(msgspec.json.encode(result), type=Kernels) == result
