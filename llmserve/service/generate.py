"""Running one request: n choices of each prompt, as one stream of deltas.

Invariants: every sequence that was submitted is ended, by the engine or by an abort, before `run` returns or raises,
whichever way it is left; a token of the engine wakes no task on its way to `emit`; `usage` counts every generated token
once, stop tokens included, and each prompt once.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from uuid import uuid4

from llmserve.errors import DeadlineExceeded, EngineFault, InvalidRequest
from llmserve.metrics import Metrics
from llmserve.service.choice import Choice, Delta
from llmserve.service.model import ServedModel
from llmserve.service.options import MAX_SEQUENCES, RequestOptions
from llmserve.service.sampling import for_choice, resolve, resolve_tokens
from llmserve.types import Output, Request, RequestTiming


@dataclass(frozen=True, slots=True)
class Prompt:
    """A tokenized prompt."""

    token_ids: list[int]
    text: str = ""
    """What `echo` repeats."""


@dataclass(slots=True)
class Usage:
    """Token counts of a request so far."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens that were not computed again."""


class _Run:
    """One sequence on its way: its request, its choice and the times of its tokens."""

    __slots__ = ("choice", "first_s", "last_s", "request", "timing")

    def __init__(self, choice: Choice, request: Request) -> None:
        self.choice = choice
        self.request = request
        self.first_s = 0.0  # monotonic; 0 until the first token
        self.last_s = 0.0
        self.timing: RequestTiming | None = None  # what the engine last said of it


class Generation:
    """One validated request. Make it, then `run` it, or iterate `deltas`, once."""

    def __init__(
        self,
        model: ServedModel,
        prompts: list[Prompt],
        options: RequestOptions,
        *,
        default_max_tokens: int | None,
        arrival_s: float | None = None,
    ) -> None:
        """Resolve all parameters. Raises InvalidRequest, and NotReady while there is no engine to ask.

        `default_max_tokens` None lets an answer fill the context; `arrival_s` is monotonic and defaults to now.
        """
        model.check_accepting()
        if len(prompts) * options.n > MAX_SEQUENCES:
            raise InvalidRequest(
                f"{len(prompts)} prompts with n={options.n} make more than {MAX_SEQUENCES} sequences", param="n"
            )
        self.arrival_s = time.monotonic() if arrival_s is None else arrival_s
        self.ttft_s: float | None = None
        """From arrival to the first token of any choice."""
        self._model = model
        self._bad_words = resolve_tokens(options, model.text.tokenizer, model.info.vocab_size)
        self._runs = [
            run
            for number, prompt in enumerate(prompts)
            for run in self._plan_prompt(number, prompt, options, default_max_tokens)
        ]
        self._num_prompt_tokens = sum(len(prompt.token_ids) for prompt in prompts)
        self._num_choices_each = options.n

    def _plan_prompt(
        self, number: int, prompt: Prompt, options: RequestOptions, default_max_tokens: int | None
    ) -> list[_Run]:
        model = self._model
        text = model.text
        _check_tokens(prompt.token_ids, model.info.vocab_size)
        sampling = resolve(
            options,
            defaults=text.defaults,
            num_prompt_tokens=len(prompt.token_ids),
            max_model_len=model.info.max_model_len,
            eog_ids=text.tokenizer.eog_ids,
            bad_words=self._bad_words,
            default_max_tokens=default_max_tokens,
        )
        # Never the client's own id: two requests in flight may bear the same.
        request_ids = [uuid4().hex for _ in range(options.n)]
        return [
            _Run(
                Choice(number * options.n + j, text.tokenizer, options),
                Request(
                    request_id=request_ids[j],
                    prompt_token_ids=prompt.token_ids,
                    sampling=for_choice(sampling, j),
                    arrival_s=self.arrival_s,
                    priority=options.priority,
                    cache_salt=options.cache_salt,
                    deadline_s=None if options.deadline_ms is None else self.arrival_s + options.deadline_ms * 1e-3,
                    parent_id=request_ids[0] if j else None,
                ),
            )
            for j in range(options.n)
        ]

    @property
    def usage(self) -> Usage:
        """Counts as of the last delta."""
        choices = [run.choice for run in self._runs]
        return Usage(
            prompt_tokens=self._num_prompt_tokens,
            completion_tokens=sum(choice.num_tokens for choice in choices),
            # The choices of one prompt share it: what each found cached counts once.
            cached_tokens=sum(choice.num_cached_tokens for choice in choices[:: self._num_choices_each]),
        )

    async def run(self, emit: Callable[[Delta], None]) -> None:
        """Generate to the end; `emit` gets the deltas of all choices, each choice's in order. Cancel to abort.

        `emit` is called in the turn of the loop in which the engine's message came. Raises what it and the engine's
        streams raise, and EngineFault or DeadlineExceeded when a sequence ends without an answer.
        """
        failure = "abort"
        try:
            if len(self._runs) == 1:
                await self._run(self._runs[0], emit)
            else:
                await self._run_all(emit)
        except Exception as error:
            failure = "deadline" if isinstance(error, DeadlineExceeded) else "error"
            raise
        finally:
            for run in self._runs:
                if not run.choice.finished:
                    self._model.metrics.finished[failure] += 1

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """What `run` emits, for whoever wants to pull. Close it (`contextlib.aclosing`) to abort."""
        queue: asyncio.Queue[Delta | None] = asyncio.Queue()
        task = asyncio.create_task(self.run(queue.put_nowait))
        task.add_done_callback(lambda _: queue.put_nowait(None))
        try:
            while (delta := await queue.get()) is not None:
                yield delta
            await task
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run_all(self, emit: Callable[[Delta], None]) -> None:
        """All sequences at once; the first that fails ends the others."""
        tasks = [asyncio.create_task(self._run(run, emit)) for run in self._runs]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, run: _Run, emit: Callable[[Delta], None]) -> None:
        metrics, choice = self._model.metrics, run.choice

        def take(output: Output) -> bool:
            self._note_time(run, output, metrics)
            delta = choice.push(output)
            if delta is not None:
                if delta.finish_reason is not None:
                    self._note_end(run, delta.finish_reason, metrics)
                emit(delta)
            return not choice.finished  # a stop string: leaving aborts the sequence

        await self._model.client.submit(run.request).forward(take)
        if not choice.finished:
            raise EngineFault("the engine ended the stream without a finish reason")

    def _note_time(self, run: _Run, output: Output, metrics: Metrics) -> None:
        now = time.monotonic()
        if run.last_s:
            metrics.inter_token_latency.observe(now - run.last_s)
        else:
            run.first_s = now
            if self.ttft_s is None:
                self.ttft_s = now - self.arrival_s
            metrics.time_to_first_token.observe(now - self.arrival_s)
        run.last_s = now
        run.timing = output.timing or run.timing

    def _note_end(self, run: _Run, reason: str, metrics: Metrics) -> None:
        num_tokens = run.choice.num_tokens
        metrics.finished[reason] += 1
        metrics.e2e_latency.observe(run.last_s - self.arrival_s)
        metrics.prompt_tokens.observe(len(run.request.prompt_token_ids))
        metrics.generation_tokens.observe(num_tokens)
        if run.timing is not None:
            # A stop string ends the sequence here: what the engine does with it after that is no part of the answer.
            metrics.note_timing(run.timing, run.timing.end_s or run.last_s)
        if num_tokens > 1:
            metrics.time_per_output_token.observe((run.last_s - run.first_s) / (num_tokens - 1))


def _check_tokens(token_ids: list[int], vocab_size: int) -> None:
    if not token_ids:
        raise InvalidRequest("the prompt has no tokens", param="prompt")
    if max(token_ids) >= vocab_size or min(token_ids) < 0:
        raise InvalidRequest(
            f"a token id of the prompt is outside the vocabulary of {vocab_size} tokens", param="prompt"
        )
