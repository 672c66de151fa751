"""Ten times more requests than a server can answer: what it refuses, how fast, and what is left for the others.

    python -m benchmarks.engine.overload [--seconds 30]

A server with few places and a short queue. First its capacity: a closed loop with as many streams as it holds requests.
Then an open loop: requests at ten times that rate, sent whether or not the server keeps up. Rates are the output
tokens that arrived in a window which leaves out the first fifth, in answers that were complete. Refusals are timed from
before the connection to the end of the answer, in the same process that reads all other answers.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import msgspec
import uvloop

from benchmarks.engine.probe import Conditions, arguments_of, conclude, conditions, resolve
from llmserve.tools.bench_http import Endpoint, Reply, exchange
from llmserve.tools.bench_load import Load, prepare, send_at
from llmserve.tools.bench_meter import OthersMeter, wait_until_quiet
from llmserve.tools.bench_prompts import poisson_arrivals, random_prompts
from llmserve.tools.bench_server import free_port, llmserve_command, running_server
from llmserve.tools.bench_stats import Spread
from llmserve.tools.bench_trace import read_trace

FACTOR: Final = 10
MAX_REFUSAL_P99_MS: Final = 50.0
MIN_GOODPUT: Final = 0.9
MAX_GROWTH: Final = 0.05
NUM_PLACES: Final = 16
NUM_WAITING: Final = 8
_TIMEOUT_S: Final = 120.0
_SEED: Final = 3
_RAMP: Final = 0.2
_OPTIONS: Final = (
    "--max-num-seqs", str(NUM_PLACES), "--max-num-waiting", str(NUM_WAITING),
    "--max-model-len", "1024", "--kv-cache-memory", "192MiB",
)  # fmt: skip


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Resident memory, MiB, of the server and of its engine."""

    server: float
    engine: float


class OverloadResult(msgspec.Struct, frozen=True, kw_only=True):
    """The result file."""

    conditions: Conditions
    seconds: float
    prompt_tokens: int
    output_tokens: int
    max_num_seqs: int
    max_num_waiting: int
    capacity_tokens_per_s: float
    without_queue_tokens_per_s: float
    """A closed loop with as many streams as places: all answers are equally long, so their prompts come together."""
    capacity_requests_per_s: float
    offered_requests_per_s: float
    goodput_tokens_per_s: float
    goodput_share: float
    num_sent: int
    num_answered: int
    num_refused: int
    num_refused_without_retry_after: int
    num_other: int
    """Requests that ended in any other way, among them those without a terminal answer."""
    others: list[str]
    """What these said; the first few."""
    refusal_ms: Spread
    memory_before: Memory
    """After the capacity was measured."""
    memory_after: Memory


def tokens_per_s(replies: list[Reply], output_tokens: int, start_s: float, end_s: float) -> float:
    """Output tokens that arrived in the window, in complete answers."""
    arrived = [
        sum(start_s <= at_s < end_s for at_s, _ in reply.events) / max(1, len(reply.events)) * output_tokens
        for reply in replies
        if reply.status == 200 and read_trace(reply, expected_tokens=output_tokens).failure is None
    ]
    return sum(arrived) / (end_s - start_s)


async def closed_loop(endpoint: Endpoint, requests: Iterator[bytes], num_streams: int, seconds: float) -> list[Reply]:
    """Each stream sends a request when its last has ended."""
    until_s = time.perf_counter() + seconds

    async def stream() -> list[Reply]:
        replies = []
        while time.perf_counter() < until_s:
            replies.append(await exchange(endpoint, next(requests), timeout_s=_TIMEOUT_S))
        return replies

    return list(itertools.chain.from_iterable(await asyncio.gather(*[stream() for _ in range(num_streams)])))


def resident(pid: int) -> Memory:
    """Of a server and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return Memory(server=_resident_mib(pid), engine=round(sum(_resident_mib(int(child)) for child in children), 1))


def _resident_mib(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return round(next(int(line.split()[1]) for line in lines if line.startswith("VmRSS")) / 1024, 1)


async def measure(endpoint: Endpoint, pid: int, load: Load, seconds: float) -> dict[str, object]:
    """The figures of `OverloadResult` that this run gives."""
    load = await prepare(endpoint, load)
    prompts = random_prompts(load.prompt_tokens, 17)
    bodies = (endpoint.request("POST", load.path, load.body(prompt)) for prompt in prompts)
    capacities = {}
    for num_streams in (NUM_PLACES, NUM_PLACES + NUM_WAITING):
        started_s = time.perf_counter()
        replies = await closed_loop(endpoint, bodies, num_streams, seconds / 2)
        window = started_s + seconds / 2 * _RAMP, started_s + seconds / 2
        capacities[num_streams] = tokens_per_s(replies, load.output_tokens, *window)
    capacity = capacities[NUM_PLACES + NUM_WAITING]
    before = resident(pid)
    rate = FACTOR * capacity / load.output_tokens
    started_s = time.perf_counter()
    replies = await send_at(endpoint, bodies, poisson_arrivals(rate, seconds, _SEED), timeout_s=_TIMEOUT_S)
    goodput = tokens_per_s(replies, load.output_tokens, started_s + seconds * _RAMP, started_s + seconds)
    return {
        "capacity_tokens_per_s": round(capacity, 1),
        "without_queue_tokens_per_s": round(capacities[NUM_PLACES], 1),
        "capacity_requests_per_s": round(capacity / load.output_tokens, 2),
        "offered_requests_per_s": round(rate, 2),
        "goodput_tokens_per_s": round(goodput, 1),
        "goodput_share": round(goodput / capacity, 4),
        "memory_before": before,
        "memory_after": resident(pid),
        **count_answers(replies, load.output_tokens),
    }


def count_answers(replies: list[Reply], output_tokens: int) -> dict[str, object]:
    """How they ended."""
    refused = [reply for reply in replies if reply.status == 429]
    failures = [read_trace(reply, expected_tokens=output_tokens).failure for reply in replies if reply.status != 429]
    others = [failure for failure in failures if failure is not None]
    return {
        "num_sent": len(replies),
        "num_answered": len(failures) - len(others),
        "num_refused": len(refused),
        "num_refused_without_retry_after": sum(not reply.retry_after.isdigit() for reply in refused),
        "num_other": len(others),
        "others": others[:5],
        "refusal_ms": Spread.of_seconds(reply.ended_s - reply.started_s for reply in refused),
    }


def misses_of(result: OverloadResult) -> list[str]:
    """What is not as it should be."""
    before, after = result.memory_before, result.memory_after
    growth = (after.server + after.engine) / (before.server + before.engine) - 1
    checks = {
        f"refusal p99 {result.refusal_ms.p99:.1f} ms": result.refusal_ms.p99 >= MAX_REFUSAL_P99_MS,
        f"goodput {result.goodput_share:.1%} of the capacity": result.goodput_share < MIN_GOODPUT,
        f"memory grew by {growth:.1%}": growth > MAX_GROWTH,
        f"{result.num_other} requests were neither answered nor refused": result.num_other > 0,
        f"{result.num_refused_without_retry_after} without Retry-After": result.num_refused_without_retry_after > 0,
        "nothing was refused": result.num_refused == 0,
    }
    return [text for text, missed in checks.items() if missed]


def main() -> int:
    parser = arguments_of(__doc__, "overload.json")
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--output-tokens", type=int, default=128)
    arguments = parser.parse_args()
    load = Load(prompt_tokens=arguments.prompt_tokens, output_tokens=arguments.output_tokens)
    port = free_port()
    wait_until_quiet(max_cores=0.05, timeout_s=30.0)
    with running_server(llmserve_command(arguments.model, port=port, options=_OPTIONS), port=port) as server:
        meter = OthersMeter()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            figures = runner.run(measure(server.endpoint, server.pid, load, arguments.seconds))
        others_cores = meter.cores()
    content = {
        "conditions": conditions(resolve(arguments.model), others_cores),
        "seconds": arguments.seconds,
        "prompt_tokens": load.prompt_tokens,
        "output_tokens": load.output_tokens,
        "max_num_seqs": NUM_PLACES,
        "max_num_waiting": NUM_WAITING,
        **figures,
    }
    result = msgspec.convert(content, OverloadResult, from_attributes=True)
    print(msgspec.json.format(msgspec.json.encode(result), indent=1).decode())
    return conclude(result, arguments.output, misses_of(result))


if __name__ == "__main__":
    sys.exit(main())
