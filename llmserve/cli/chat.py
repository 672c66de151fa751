"""`llmserve chat`: a conversation in the terminal, or one answer.

The event loop runs only while something is loaded or answered; between answers the terminal belongs to `input`. So
Ctrl-C during an answer cancels that answer, which aborts its request, and nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from dataclasses import dataclass
from typing import Annotated, Final

import typer

from llmserve.checkpoints import sources
from llmserve.cli import options
from llmserve.cli.partner import ChatMessage, ChatOptions, Partner
from llmserve.cli.progress import ProgressDisplay
from llmserve.config import DEFAULT_MAX_DRAFT_TOKENS, Speculation
from llmserve.errors import LLMServeError

HELP: Final = """Chat with MODEL, or with the model of the server at URL.

A key for the server is taken from $LLMSERVE_API_KEY.

Examples:

    llmserve chat smollm2

    llmserve chat smollm2 --prompt "Why is the sky blue?" --temperature 0

    llmserve chat http://127.0.0.1:8000 --system "Answer in one sentence."
"""
_INTERRUPTED: Final = 130
_COMMANDS: Final = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"

ModelOrUrl = Annotated[
    str,
    typer.Argument(
        metavar="MODEL|URL",
        show_default=False,
        help="A model as for `serve`, loaded here; or the URL of an OpenAI-compatible server.",
    ),
]
Prompt = Annotated[str | None, typer.Option(metavar="TEXT", show_default=False, help="Answer this and leave.")]
System = Annotated[str, typer.Option(metavar="TEXT", help="The system message.")]


@dataclass(slots=True)
class Pace:
    """How fast an answer came."""

    started_s: float
    first_s: float = 0.0
    last_s: float = 0.0

    def note(self) -> None:
        """A piece has come."""
        self.last_s = time.monotonic()
        self.first_s = self.first_s or self.last_s

    def describe(self, num_tokens: int | None) -> str:
        """One line, without what is not known."""
        parts = [f"first token after {self.first_s - self.started_s:.2f} s"] if self.first_s else []
        if num_tokens is not None:
            parts.insert(0, f"{num_tokens} token{'s' if num_tokens != 1 else ''}")
            if num_tokens > 1 and self.last_s > self.first_s:
                parts.append(f"{(num_tokens - 1) / (self.last_s - self.first_s):.1f} tok/s")
        return ", ".join(parts)


def command(
    model: ModelOrUrl,
    prompt: Prompt = None,
    system: System = "",
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    top_k: options.TopK = None,
    min_p: options.MinP = None,
    seed: options.Seed = None,
    max_model_len: options.MaxModelLen = 0,
    kv_cache_memory: options.KVCacheMemory = "",
    threads: options.Threads = 0,
    exact: options.Exact = False,
    packed_cache: options.PackedCache = True,
    speculation: options.SpeculationOption = "auto",
    max_draft_tokens: options.MaxDraftTokens = DEFAULT_MAX_DRAFT_TOKENS,
) -> int:
    """Run the command; see `HELP`."""
    sampling = ChatOptions(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seed
    )
    with asyncio.Runner() as runner:
        if sources.is_server(model):
            partner: Partner = runner.run(_open_remote(model))
        else:
            partner = _open_local(
                runner,
                model,
                max_model_len=max_model_len,
                kv_cache_memory=kv_cache_memory,
                threads=threads,
                exact=exact,
                packed_cache=packed_cache,
                speculation=speculation,
                max_draft_tokens=max_draft_tokens,
            )
        try:
            conversation = Conversation(runner, partner, sampling, system=system)
            if prompt is not None:
                return conversation.say(prompt)
            return conversation.hold()
        finally:
            runner.run(partner.aclose())


async def _open_remote(url: str) -> Partner:
    from llmserve.cli.remote_model import open_remote_model

    return await open_remote_model(url)


def _open_local(
    runner: asyncio.Runner,
    model: str,
    *,
    max_model_len: int,
    kv_cache_memory: str,
    threads: int,
    exact: bool,
    packed_cache: bool,
    speculation: Speculation,
    max_draft_tokens: int,
) -> Partner:
    from llmserve.checkpoints import pull
    from llmserve.cli.local_model import open_local_model

    with ProgressDisplay() as display:
        path = pull.resolve(model, progress=display)
        config = options.engine_config(
            path,
            max_model_len=max_model_len,
            max_num_seqs=1,
            kv_cache_memory=kv_cache_memory,
            threads=threads,
            exact=exact,
            packed_cache=packed_cache,
            speculation=speculation,
            max_draft_tokens=max_draft_tokens,
        )
        return runner.run(open_local_model(config, name=options.model_name(model, path), on_progress=display))


class Conversation:
    """What was said so far. Invariant: it holds whole turns only: a stopped or failed one is taken back."""

    def __init__(self, runner: asyncio.Runner, partner: Partner, sampling: ChatOptions, *, system: str) -> None:
        self._runner = runner
        self._partner = partner
        self._sampling = sampling
        self._system: list[ChatMessage] = [{"role": "system", "content": system}] if system else []
        self._messages: list[ChatMessage] = list(self._system)

    def say(self, text: str) -> int:
        """Print the answer to `text` as it comes; the exit code of an answer that was stopped is 130.

        Raises what the partner raises.
        """
        self._messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        pace = Pace(time.monotonic())
        try:
            self._runner.run(self._print_answer(pieces, pace))
        except KeyboardInterrupt:
            self._messages.pop()
            print(flush=True)
            return _INTERRUPTED
        except LLMServeError:
            self._messages.pop()
            if pieces:
                print(flush=True)
            raise
        print(flush=True)
        self._messages.append({"role": "assistant", "content": "".join(pieces)})
        _print_dimly(pace.describe(self._partner.num_tokens))
        return 0

    def hold(self) -> int:
        """Answer line by line until the end of the input."""
        if sys.stdin.isatty():
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  # gives `input` its editing and its history
            _print_dimly(f"{self._partner.name}: {_COMMANDS}")
        while True:
            try:
                text = input(">>> " if sys.stdin.isatty() else "").strip()
            except EOFError:
                if sys.stdin.isatty():
                    print()
                return 0
            except KeyboardInterrupt:
                print()
                continue
            if text == "/exit":
                return 0
            if text:
                self._react(text)

    def _react(self, text: str) -> None:
        if text == "/reset":
            self._messages = list(self._system)
            _print_dimly("the conversation is forgotten")
        elif text.startswith("/") and " " not in text:
            _print_dimly(f"no such command; {_COMMANDS}")
        else:
            try:
                self.say(text)
            except LLMServeError as error:
                print(f"llmserve: {error}", file=sys.stderr)

    async def _print_answer(self, pieces: list[str], pace: Pace) -> None:
        async with contextlib.aclosing(self._partner.answer(self._messages, self._sampling)) as answer:
            async for piece in answer:
                if piece:
                    pace.note()
                    pieces.append(piece)
                    print(piece, end="", flush=True)


def _print_dimly(text: str) -> None:
    """A remark beside the conversation: on stderr, so that a pipe gets the answers alone."""
    if sys.stderr.isatty():
        text = f"\x1b[2m{text}\x1b[0m"
    print(text, file=sys.stderr, flush=True)
