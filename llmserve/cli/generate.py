"""`llmserve generate`: raw completions of one prompt or of many, all in one batch."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from llmserve.cli import options
from llmserve.cli.progress import ProgressDisplay
from llmserve.cli.prompts_file import NumberedPrompt, read_prompts
from llmserve.config import DEFAULT_MAX_DRAFT_TOKENS
from llmserve.errors import EngineDied, InvalidRequest, LLMServeError, NotReady
from llmserve.service.options import RequestOptions

if TYPE_CHECKING:
    from llmserve.cli.local_model import LocalModel
    from llmserve.config import EngineConfig

HELP: Final = """Continue PROMPT with MODEL, as it stands: no chat template is applied.

The JSON lines come in the order of the prompts. A prompt that cannot be served gets a line with `error`, and the
exit code is then 1.

Examples:

    llmserve generate smollm2 "Once upon a time" --max-tokens 50

    git log -1 | llmserve generate smollm2 -

    llmserve generate smollm2 --file prompts.jsonl --temperature 0 > answers.jsonl
"""
_DEFAULT_MAX_TOKENS: Final = 128
_AHEAD: Final = 2
"""Prompts under way for each sequence of a step, so that none of the engine's places is ever empty."""

Prompt = Annotated[
    str | None, typer.Argument(metavar="[PROMPT|-]", show_default=False, help="The text; `-` reads stdin.")
]
PromptsFile = Annotated[
    Path | None,
    typer.Option(
        "--file",
        metavar="PROMPTS.JSONL",
        show_default=False,
        help='A JSON string or `{"prompt": …, "id": …}` on each line; `-` is stdin.',
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON lines, also for one prompt; `--file` always does.")]
Stop = Annotated[list[str] | None, typer.Option(metavar="TEXT", help="End before this text; may be repeated.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on after the end token.")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is to be done."""

    prompts: list[NumberedPrompt]
    request: RequestOptions
    as_json: bool
    max_under_way: int
    """Prompts that are computed at the same time."""


def command(
    model: options.Model,
    prompt: Prompt = None,
    file: PromptsFile = None,
    as_json: AsJson = False,
    max_tokens: options.MaxTokens = _DEFAULT_MAX_TOKENS,
    stop: Stop = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    seed: options.Seed = None,
    ignore_eos: IgnoreEos = False,
    max_model_len: options.MaxModelLen = 0,
    max_num_seqs: options.MaxNumSeqs = 0,
    max_num_batched_tokens: options.MaxNumBatchedTokens = 0,
    kv_cache_memory: options.KVCacheMemory = "",
    device: options.DeviceOption = "cpu",
    threads: options.Threads = 0,
    exact: options.Exact = False,
    packed_cache: options.PackedCache = True,
    speculation: options.SpeculationOption = "auto",
    max_draft_tokens: options.MaxDraftTokens = DEFAULT_MAX_DRAFT_TOKENS,
) -> int:
    """Run the command; see `HELP`."""
    prompts = _collect(prompt, file)
    from llmserve.checkpoints import pull

    with ProgressDisplay() as display:
        path = pull.resolve(model, progress=display)
        engine = options.engine_config(
            path,
            max_model_len=max_model_len,
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            kv_cache_memory=kv_cache_memory,
            device=device,
            threads=threads,
            exact=exact,
            packed_cache=packed_cache,
            speculation=speculation,
            max_draft_tokens=max_draft_tokens,
        )
        request = RequestOptions(
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            seed=seed,
            stop=tuple(stop or ()),
            ignore_eos=ignore_eos,
        )
        job = Job(
            prompts=prompts,
            request=request,
            as_json=as_json or file is not None,
            max_under_way=_AHEAD * engine.max_num_seqs,
        )
        return asyncio.run(_run(engine, job, name=options.model_name(model, path), display=display))


def _collect(prompt: str | None, file: Path | None) -> list[NumberedPrompt]:
    if file is not None:
        if prompt is not None:
            raise InvalidRequest("give either PROMPT or --file, not both")
        return read_prompts(file)
    if prompt is None:
        raise InvalidRequest("give a PROMPT, `-` for stdin, or --file")
    return [NumberedPrompt(0, sys.stdin.read() if prompt == "-" else prompt)]


async def _run(engine: EngineConfig, job: Job, *, name: str, display: ProgressDisplay) -> int:
    from llmserve.cli.local_model import open_local_model

    model = await open_local_model(engine, name=name, on_progress=display)
    display.close()
    async with contextlib.aclosing(model):
        if job.as_json:
            return await _write_lines(model, job)
        await _print_text(model, job.prompts[0], job.request)
        return 0


async def _print_text(model: LocalModel, prompt: NumberedPrompt, request: RequestOptions) -> None:
    _, stream = await model.complete(prompt.text, request, default_max_tokens=_DEFAULT_MAX_TOKENS)
    async with contextlib.aclosing(stream) as deltas:
        async for delta in deltas:
            print(delta.text, end="", flush=True)
    print(flush=True)


async def _write_lines(model: LocalModel, job: Job) -> int:
    started_s, num_tokens, num_failed = time.monotonic(), 0, 0
    with _bar(len(job.prompts)) as advance:
        async with contextlib.aclosing(_in_order(model, job)) as lines:
            async for line in lines:
                print(json.dumps(line, ensure_ascii=False), flush=True)
                num_tokens += line.get("completion_tokens", 0)
                num_failed += "error" in line
                advance()
    took_s = time.monotonic() - started_s
    failed = f", {num_failed} failed" if num_failed else ""
    print(
        f"{len(job.prompts)} prompts, {num_tokens} tokens in {took_s:.1f} s, {num_tokens / took_s:.1f} tok/s{failed}",
        file=sys.stderr,
    )
    return 1 if num_failed else 0


async def _in_order(model: LocalModel, job: Job) -> AsyncGenerator[dict[str, Any], None]:
    """The lines in the order of the prompts, while up to `max_under_way` are computed."""
    slots = asyncio.Semaphore(job.max_under_way)

    async def complete(prompt: NumberedPrompt) -> dict[str, Any]:
        async with slots:
            return await _complete(model, prompt, job.request)

    tasks = [asyncio.create_task(complete(prompt)) for prompt in job.prompts]
    try:
        for task in tasks:
            yield await task
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _complete(model: LocalModel, prompt: NumberedPrompt, request: RequestOptions) -> dict[str, Any]:
    """One line of the output. Raises what ends the whole run: the engine's death."""
    line: dict[str, Any] = {"index": prompt.index, **({"id": prompt.id} if prompt.id is not None else {})}
    try:
        generation, stream = await model.complete(prompt.text, request, default_max_tokens=_DEFAULT_MAX_TOKENS)
        pieces: list[str] = []
        finish_reason = None
        async with contextlib.aclosing(stream) as deltas:
            async for delta in deltas:
                pieces.append(delta.text)
                finish_reason = delta.finish_reason
    except (EngineDied, NotReady):
        raise
    except LLMServeError as error:
        return line | {"prompt": prompt.text, "error": str(error)}
    usage = generation.usage
    return line | {
        "prompt": prompt.text,
        "text": "".join(pieces),
        "finish_reason": finish_reason,
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
    }


@contextlib.contextmanager
def _bar(num_prompts: int) -> Iterator[Callable[[], None]]:
    """A progress bar over many prompts on a terminal; nothing elsewhere. Yields what advances it by one."""
    if num_prompts == 1 or not sys.stderr.isatty():
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("prompts"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("prompts", total=num_prompts)
        yield lambda: bar.advance(task)
