"""Statistics, prompts, the meter of others, and the tables made of results."""

from __future__ import annotations

import itertools
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.table import BEGIN, END, with_block
from llmserve.tools.bench_meter import OthersMeter, family_seconds
from llmserve.tools.bench_prompts import WORDS, random_prompts
from llmserve.tools.bench_stats import level_report, percentile
from llmserve.tools.bench_trace import Trace


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 100))
def test_percentile_is_numpys(values: list[float], percent: float) -> None:
    assert percentile(values, percent) == pytest.approx(float(np.percentile(values, percent)), abs=1e-6)


def test_percentile_of_nothing() -> None:
    assert percentile([], 50) == 0.0


def test_level_report_counts_complete_answers_only() -> None:
    good = Trace(ttft_s=0.1, e2e_s=0.4, gaps_s=[0.1, 0.2], num_prompt_tokens=7, num_output_tokens=3)
    report = level_report(2, [good, good, Trace(failure="lost")], wall_s=2.0, client_cpu_s=0.5)
    assert (report.num_requests, report.num_failures, report.failures) == (3, 1, {"lost": 1})
    assert (report.output_tokens_per_s, report.requests_per_s) == (3.0, 1.0)
    assert (report.prompt_tokens, report.output_tokens) == (7.0, 3.0)
    assert (report.itl_ms.p50, report.itl_ms.max, report.ttft_ms.mean) == (150.0, 200.0, 100.0)
    assert report.tpot_ms.p50 == 150.0
    assert report.client_cpu_share == 0.25


def test_a_level_where_all_failed() -> None:
    report = level_report(1, [Trace(failure="lost")], wall_s=1.0, client_cpu_s=0.0)
    assert (report.output_tokens_per_s, report.e2e_ms.p99) == (0.0, 0.0)


def test_prompts_are_repeatable_and_start_differently() -> None:
    prompts = list(itertools.islice(random_prompts(128, seed=3), 2000))
    assert prompts == list(itertools.islice(random_prompts(128, seed=3), 2000))
    assert prompts[0] != next(random_prompts(128, seed=4))
    assert {len(prompt.split()) for prompt in prompts} == {128}
    assert len({tuple(prompt.split()[:2]) for prompt in prompts}) == len(prompts)
    assert len(WORDS) == len(set(WORDS))


def test_own_children_are_not_others() -> None:
    busy = [sys.executable, "-c", "import time; end = time.process_time() + 0.5\nwhile time.process_time() < end: pass"]
    meter, before_s = OthersMeter(), family_seconds()
    subprocess.run(busy, check=True)
    assert family_seconds() - before_s >= 0.5
    assert meter.cores() >= 0


def test_block_is_replaced_between_markers() -> None:
    text = f"before\n{BEGIN}old\n{END}\nafter\n"
    assert with_block(text, "new\n") == f"before\n{BEGIN}new\n{END}\nafter\n"
    assert with_block(with_block(text, "x\n"), "old\n") == text
    with pytest.raises(ValueError, match="markers"):
        with_block("none", "new")
