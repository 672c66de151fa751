"""What a step costs besides computing: scheduler, building the step's arrays, collecting its outputs.

An executor that computes nothing answers at once, over the compiled block pool, so all the time that is measured is the
engine's own. Prints the median and the 99th percentile of a step, with and without a long waiting queue.

    python -m benchmarks.engine.overhead
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time

import msgspec
import numpy as np

from benchmarks.peers.results import RESULTS, save_json
from llmserve._C import BlockPool
from llmserve.config import DEFAULT_ITL_TARGET_MS
from llmserve.engine.engine import Engine
from llmserve.engine.scheduler import SchedulerConfig
from llmserve.ops.protocol import StepInput, StepOutput
from llmserve.tools.bench_host import Host, describe_host
from llmserve.types import EngineInfo, Request, SamplingParams, WeightsOrigin

BUDGET_US = {32: 150.0, 256: 600.0}
BLOCK_SIZE = 16
PROMPT_TOKENS = 256


class OverheadRow(msgspec.Struct, frozen=True, kw_only=True):
    """One load."""

    num_running: int
    num_waiting: int
    logprobs: bool
    median_us: float
    p99_us: float
    budget_us: float


class Overhead(msgspec.Struct, frozen=True, kw_only=True):
    """The result file."""

    host: Host
    steps: int
    rows: list[OverheadRow]


class IdleExecutor:
    """Answers every row with token 1."""

    weight_bytes = 0
    isa = "none"
    num_threads = 1
    weights_origin: WeightsOrigin = "memory"
    image_path = ""

    def __init__(self, num_blocks: int) -> None:
        self.block_pool = BlockPool(num_blocks, BLOCK_SIZE)

    def kv_bytes_per_block(self) -> int:
        return 1

    def allocate_kv(self, num_blocks: int) -> None:
        self.block_pool = BlockPool(num_blocks, BLOCK_SIZE)

    def launch(self, step: StepInput) -> None:
        num_rows = len(step.logit_rows)
        self._output = StepOutput(
            token_ids=np.ones(num_rows, np.int32),
            logprobs=np.zeros(num_rows, np.float32),
            ranks=np.ones(num_rows, np.int32),
            top_ids=np.zeros((num_rows, 0), np.int32),
            top_logprobs=np.zeros((num_rows, 0), np.float32),
        )

    def collect(self) -> StepOutput:
        return self._output


def make_engine(num_running: int, num_steps: int) -> Engine:
    max_model_len = PROMPT_TOKENS + num_steps + 64
    num_blocks = (num_running + 8) * (max_model_len // BLOCK_SIZE + 1)
    executor = IdleExecutor(num_blocks)
    config = SchedulerConfig(
        max_num_tokens=2048, max_num_seqs=num_running, max_logit_rows=num_running, itl_target_ms=DEFAULT_ITL_TARGET_MS
    )
    info = EngineInfo(
        model_path="", architecture="", vocab_size=1000, max_model_len=max_model_len, max_num_seqs=num_running,
        num_blocks=num_blocks, block_size=BLOCK_SIZE, kv_cache_bytes=0, weight_bytes=0, device="", isa="",
        num_threads=1, load_s=0.0,
    )  # fmt: skip
    return Engine(executor, config, info)


def measure(
    num_running: int, num_waiting: int, *, num_steps: int = 600, num_logprobs: int | None = None
) -> list[float]:
    """Seconds of each step with so many running (decoding) and waiting sequences."""
    engine = make_engine(num_running, num_steps)
    sampling = SamplingParams(max_tokens=num_steps + 32, temperature=0.7, num_logprobs=num_logprobs)
    rng = np.random.default_rng(3)
    for number in range(num_running + num_waiting):
        prompt = rng.integers(0, 1000, PROMPT_TOKENS).tolist()
        tenant = f"tenant {number % 7}"
        request = Request(request_id=str(number), prompt_token_ids=prompt, sampling=sampling, tenant=tenant)
        engine.submit(request)
    while engine.stats().num_running < num_running or engine.stats().num_prompt_tokens < num_running * PROMPT_TOKENS:
        engine.step()
    gc.collect()
    gc.freeze()
    gc.disable()
    times = []
    for _ in range(num_steps - num_running // 4):
        started = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - started)
    gc.enable()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    rows = []
    print("| running | waiting | logprobs | median µs | p99 µs | budget µs |")
    print("|---:|---:|---:|---:|---:|---:|")
    for num_running, budget_us in BUDGET_US.items():
        for num_waiting, num_logprobs in ((0, None), (1000, None), (0, 0)):
            times = measure(num_running, num_waiting, num_steps=arguments.steps, num_logprobs=num_logprobs)
            median = statistics.median(times) * 1e6
            p99 = statistics.quantiles(times, n=100)[98] * 1e6
            logprobs = "no" if num_logprobs is None else "yes"
            rows.append(
                OverheadRow(
                    num_running=num_running, num_waiting=num_waiting, logprobs=num_logprobs is not None,
                    median_us=round(median, 1), p99_us=round(p99, 1), budget_us=budget_us,
                )
            )  # fmt: skip
            print(f"| {num_running} | {num_waiting} | {logprobs} | {median:.0f} | {p99:.0f} | {budget_us:.0f} |")
    save_json(Overhead(host=describe_host(), steps=arguments.steps, rows=rows), RESULTS / "overhead.json")


if __name__ == "__main__":
    main()
