"""`llmserve bench`: how fast a model is served, measured from outside or, with `--offline`, within the engine."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import msgspec
import typer

from llmserve.checkpoints import sources
from llmserve.cli import options
from llmserve.cli.progress import ProgressDisplay
from llmserve.cli.remote_model import API_KEY_VARIABLE
from llmserve.config import DEFAULT_MAX_DRAFT_TOKENS
from llmserve.errors import InvalidRequest

if TYPE_CHECKING:
    from llmserve.tools.bench_http import Endpoint
    from llmserve.tools.bench_load import Load
    from llmserve.tools.bench_offline import OfflineReport
    from llmserve.tools.bench_stats import LevelReport

HELP: Final = """Measure how fast a model is served, at several numbers of streams.

URL is any OpenAI-compatible server. For MODEL `llmserve serve` is started on a free port and stopped afterwards.
Each stream sends its next request as soon as the last one has ended. The prompts are random words without a common
start; answers have exactly `--output-tokens` tokens where the server takes `ignore_eos`. The exit code is 1 when a
request failed. A server's key is taken from LLMSERVE_API_KEY.

Examples:

    llmserve bench smollm2

    llmserve bench http://127.0.0.1:8000 --streams 1,8,32 --requests 64 --json result.json

    llmserve bench smollm2 --offline
"""
_MAX_LEVELS: Final = 32
_MAX_STREAMS: Final = 4096

Target = Annotated[str, typer.Argument(metavar="URL|MODEL", show_default=False, help="A server, or what to serve.")]
Streams = Annotated[
    str, typer.Option(metavar="N,N,…", help="Concurrent streams of each level; batch sizes with --offline.")
]
Requests = Annotated[
    int, typer.Option(min=0, help="Requests of each level; 0: two for each stream, six at least.", show_default=False)
]
PromptTokens = Annotated[int, typer.Option(min=1, max=100_000, help="Length of the prompts, about.")]
OutputTokens = Annotated[int, typer.Option(min=2, max=100_000, help="Length of the answers.")]
Seed = Annotated[int, typer.Option(min=0, help="The same seed sends the same prompts.")]
Chat = Annotated[bool, typer.Option("--chat", help="Use the chat endpoint instead of completions.")]
JsonFile = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", show_default=False, help="Write all results into FILE too.")
]
Offline = Annotated[
    bool, typer.Option("--offline", help="Measure the engine in this process: prefill of 512 tokens, and decode.")
]


def command(
    target: Target,
    streams: Streams = "1,8,32",
    requests: Requests = 0,
    prompt_tokens: PromptTokens = 128,
    output_tokens: OutputTokens = 64,
    seed: Seed = 0,
    chat: Chat = False,
    json: JsonFile = None,
    offline: Offline = False,
    threads: options.Threads = 0,
    exact: options.Exact = False,
    speculation: options.SpeculationOption = "auto",
    max_draft_tokens: options.MaxDraftTokens = DEFAULT_MAX_DRAFT_TOKENS,
) -> int:
    """Run the command; see `HELP`."""
    levels = parse_levels(streams)
    is_url = sources.is_server(target)
    if offline:
        if is_url:
            raise InvalidRequest("--offline measures a MODEL in this process, not a server")
        report = _offline(target, levels, prompt_tokens, output_tokens, seed, threads=threads, exact=exact)
        _write(json, {"offline": report})
        return 0
    from llmserve.tools.bench_http import Endpoint
    from llmserve.tools.bench_load import Load

    load = Load(prompt_tokens=prompt_tokens, output_tokens=output_tokens, num_requests=requests, seed=seed, chat=chat)
    if is_url:
        endpoint = Endpoint.parse(target, api_key=os.environ.get(API_KEY_VARIABLE))
        reports = _run(endpoint, load, levels)
    else:
        engine_options = ["--threads", str(threads), *(["--exact"] if exact else [])]
        engine_options += ["--speculation", speculation, "--max-draft-tokens", str(max_draft_tokens)]
        reports = _serve_and_run(target, load, levels, engine_options)
    _write(json, {"target": target, "prompt_tokens": prompt_tokens, "output_tokens": output_tokens, "levels": reports})
    return 1 if any(report.num_failures for report in reports) else 0


def parse_levels(text: str) -> list[int]:
    """`1,8,32` → numbers of streams. Raises `InvalidRequest`."""
    try:
        levels = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InvalidRequest(f"--streams {text!r}: write numbers with commas, e.g. 1,8,32") from error
    if len(levels) > _MAX_LEVELS or not all(1 <= level <= _MAX_STREAMS for level in levels):
        raise InvalidRequest(f"--streams {text!r}: {_MAX_LEVELS} numbers from 1 to {_MAX_STREAMS} at most")
    return levels


def _offline(
    model: str,
    levels: list[int],
    prompt_tokens: int,
    output_tokens: int,
    seed: int,
    *,
    threads: int,
    exact: bool,
) -> OfflineReport:
    from llmserve.checkpoints import pull
    from llmserve.tools.bench_offline import OfflineLoad, run_offline

    load = OfflineLoad(
        batch_sizes=tuple(levels), prompt_tokens=prompt_tokens, output_tokens=output_tokens, repetitions=3, seed=seed
    )
    with ProgressDisplay() as display:
        path = pull.resolve(model, progress=display)
        report = run_offline(path, load, num_threads=threads, exact=exact, progress=display)
    rows = [
        [f"prefill {one.num_tokens}", f"{one.tokens_per_s:.0f}", _percent(one.kernel_share)] for one in report.prefill
    ]
    rows += [
        [f"decode B={one.num_sequences}", f"{one.tokens_per_s:.0f}", _percent(one.kernel_share)]
        for one in report.decode
    ]
    title = f"engine alone, {report.isa}, {report.num_threads} threads, loaded in {report.load_s:.2f} s"
    _print_table(title, ["", "tok/s", "in kernels"], rows)
    return report


def _serve_and_run(model: str, load: Load, levels: list[int], engine_options: list[str]) -> list[LevelReport]:
    from llmserve.checkpoints import pull
    from llmserve.tools.bench_server import free_port, llmserve_command, running_server

    with ProgressDisplay() as display:  # a download is shown here, not lost in the server's output
        path = pull.resolve(model, progress=display)
    port = free_port()
    with running_server(llmserve_command(str(path), port=port, options=engine_options), port=port) as server:
        return _run(server.endpoint, load, levels)


def _run(endpoint: Endpoint, load: Load, levels: list[int]) -> list[LevelReport]:
    import uvloop

    from llmserve.tools.bench_load import prepare, run_level

    async def run_all() -> list[LevelReport]:
        prepared = await prepare(endpoint, load)
        return [await run_level(endpoint, prepared, level) for level in levels]

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        reports = runner.run(run_all())
    columns = ["streams", "requests", "failed", "tok/s", "req/s", "TTFT p50", "p99", "ITL p50", "p99", "E2E p50"]
    title = f"closed loop, {reports[0].prompt_tokens:.0f} tokens in, {reports[0].output_tokens:.0f} out; times in ms"
    _print_table(title, [*columns, "client CPU"], [_row(report) for report in reports])
    for failure, count in {key: value for report in reports for key, value in report.failures.items()}.items():
        print(f"failed {count}×: {failure}")
    return reports


def _row(report: LevelReport) -> list[str]:
    times = (report.ttft_ms.p50, report.ttft_ms.p99, report.itl_ms.p50, report.itl_ms.p99, report.e2e_ms.p50)
    return [
        str(report.num_streams),
        str(report.num_requests),
        str(report.num_failures),
        f"{report.output_tokens_per_s:.0f}",
        f"{report.requests_per_s:.2f}",
        *(f"{time_ms:.1f}" for time_ms in times),
        _percent(report.client_cpu_share),
    ]


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{100 * share:.1f} %"


def _print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def _write(path: Path | None, results: dict[str, Any]) -> None:
    """Write a JSON file with what the figures belong to. Raises `InvalidRequest` when that cannot be."""
    if path is None:
        return
    from llmserve.tools.bench_host import describe_host

    encoded = msgspec.json.format(msgspec.json.encode({"host": describe_host(), **results}))
    try:
        path.write_bytes(encoded + b"\n")
    except OSError as error:
        raise InvalidRequest(f"--json {path}: {(error.strerror or str(error)).lower()}") from error
