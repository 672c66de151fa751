"""Load on one OpenAI-compatible server: closed loops at numbers of streams, open loops (Poisson) at request rates."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import uvloop

from benchmarks.arguments import one_positive, positive
from benchmarks.peers.results import RESULTS, save_json
from benchmarks.serving.records import Level, Serving, Slo, closed_level, open_level
from benchmarks.serving.report import COLUMNS, failures_of, page, row
from llmserve.checkpoints import pull
from llmserve.errors import LLMServeError
from llmserve.tools.bench_host import describe_host
from llmserve.tools.bench_http import Endpoint
from llmserve.tools.bench_load import Load, closed_loop, open_loop, prepare
from llmserve.tools.bench_meter import OthersMeter
from llmserve.tools.bench_prompts import poisson_arrivals
from llmserve.tools.bench_server import free_port, llmserve_command, running_server

KEY_VARIABLE: Final = "LLMSERVE_API_KEY"
_PROMPT_SEEDS: Final = 10**6
"""Seeds of open loops' prompts start here, apart from those of closed loops."""
_EPILOG: Final = f"""examples:
  python -m benchmarks.serving smollm2
  python -m benchmarks.serving http://127.0.0.1:8000 --streams 1,8,32 --rates 1,2,4 --seconds 60
  python -m benchmarks.serving ./model.gguf --streams '' --rates 2,4 --slo-ttft-ms 500 --slo-tpot-ms 40

A MODEL is served by `llmserve serve` on a free port, without its prefix cache. A server's key is taken from
{KEY_VARIABLE}. The exit status is 1 when a request failed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What is measured."""

    streams: list[int]
    rates: list[float]
    seconds: float
    load: Load
    slo: Slo


async def measure(endpoint: Endpoint, plan: Plan, *, is_child: bool) -> tuple[Load, list[Level], list[Level]]:
    """The load as it was sent, closed levels, open levels. `is_child`: the server is a process of this one."""
    load = await prepare(endpoint, plan.load)
    closed, opened = [], []
    for num_streams in plan.streams:
        meter = OthersMeter()
        seen = await closed_loop(endpoint, load, num_streams)
        closed.append(
            _told(closed_level(num_streams, seen, plan.slo, others_cores=meter.cores() if is_child else None))
        )
    for number, rate in enumerate(plan.rates):
        arrivals = poisson_arrivals(rate, plan.seconds, load.seed)
        meter = OthersMeter()
        seen = await open_loop(endpoint, load, arrivals, prompt_seed=_PROMPT_SEEDS * (load.seed + 1) + number)
        opened.append(
            _told(open_level(rate, plan.seconds, seen, plan.slo, others_cores=meter.cores() if is_child else None))
        )
    return load, closed, opened


def _told(level: Level) -> Level:
    print("  ".join(f"{name} {cell}" for name, cell in zip(COLUMNS, row(level), strict=True) if cell), flush=True)
    return level


def is_url(target: str) -> bool:
    """Of a server that runs already."""
    return target.startswith(("http://", "https://"))


@contextlib.contextmanager
def served(target: str, num_threads: int) -> Iterator[tuple[Endpoint, str]]:
    """A server to measure, and what to call it: the one at a URL, or one started for a model."""
    if is_url(target):
        yield Endpoint.parse(target, api_key=os.environ.get(KEY_VARIABLE)), target
        return
    path, port = pull.resolve(target), free_port()
    options = ["--threads", str(num_threads), "--no-prefix-cache"]
    with running_server(llmserve_command(str(path), port=port, options=options), port=port) as server:
        yield server.endpoint, path.name


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serving", description=__doc__, epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("target", nargs="?", default="smollm2", metavar="URL|MODEL", help="a server, or what to serve (smollm2)")
    add("--streams", type=positive(int), default="1,8,32", metavar="N,N,…", help="closed loops (1,8,32)")
    add("--requests", type=int, default=0, help="of each closed loop; 0: two for each stream, six at least")
    add("--rates", type=positive(float), default="2,4,8", metavar="R,R,…", help="open loops, requests/s (2,4,8)")
    add("--seconds", type=one_positive, default=20.0, help="while an open loop sends (20)")
    add("--prompt-tokens", type=int, default=128, help="length of the prompts, about (128)")
    add("--output-tokens", type=int, default=64, help="length of the answers (64)")
    add("--seed", type=int, default=0, help="of prompts and arrivals (0)")
    add("--chat", action="store_true", help="the chat endpoint instead of completions")
    add("--slo-ttft-ms", type=float, default=1000.0, help="limit that a good request keeps; 0: none (1000)")
    add("--slo-tpot-ms", type=float, default=100.0, help="the same for TPOT (100)")
    add("--slo-e2e-ms", type=float, default=0.0, help="the same for the whole answer (none)")
    add("--threads", type=int, default=0, help="compute threads of a server that is started; 0: all cores")
    add("--json", type=Path, default=RESULTS / "local" / "serving.json", help="result file")
    add("--html", type=Path, help="report (default: beside the result file)")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Measure, write the result file and the page; the exit status."""
    args = parse_arguments(arguments)
    load = Load(
        prompt_tokens=args.prompt_tokens, output_tokens=args.output_tokens, num_requests=args.requests,
        seed=args.seed, chat=args.chat,
    )  # fmt: skip
    slo = Slo(ttft_ms=args.slo_ttft_ms, tpot_ms=args.slo_tpot_ms, e2e_ms=args.slo_e2e_ms)
    plan = Plan(streams=args.streams, rates=args.rates, seconds=args.seconds, load=load, slo=slo)
    host = describe_host()
    try:
        with (
            served(args.target, args.threads) as (endpoint, name),
            asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner,
        ):
            load, closed, opened = runner.run(measure(endpoint, plan, is_child=not is_url(args.target)))
    except LLMServeError as error:
        print(error, file=sys.stderr)
        return 1
    result = Serving(
        host=host, target=name, model=load.model, prompt_tokens=load.prompt_tokens, output_tokens=load.output_tokens,
        seed=load.seed, seconds=args.seconds, slo=slo, closed=closed, open=opened,
    )  # fmt: skip
    html = args.html or args.json.with_suffix(".html")
    save_json(result, args.json)
    html.parent.mkdir(parents=True, exist_ok=True)
    html.write_text(page(result), encoding="utf-8")
    failures = list(failures_of(result))
    print("\n".join([*failures, f"written: {args.json}, {html}"]))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
