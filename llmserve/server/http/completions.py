"""`POST /v1/completions`: the body's meaning and the answer's shape."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import cast

import msgspec
from msgspec import UNSET

from llmserve.errors import InvalidRequest
from llmserve.server.http.context import Exchange
from llmserve.server.http.endpoint import common_options
from llmserve.server.http.logprobs import CompletionLogprobsBuilder, prompt_logprobs_body
from llmserve.server.http.responses import CompletionAnswer, CompletionChoice, CompletionLogprobs, UsageBody
from llmserve.server.http.schemas import CompletionBody
from llmserve.service.choice import Delta
from llmserve.service.generate import Generation, Prompt
from llmserve.service.model import ServedModel
from llmserve.service.options import MAX_PROMPTS
from llmserve.service.prompts import completion_prompts
from llmserve.types import TokenLogprob

_DEFAULT_MAX_TOKENS = 16
_encode = msgspec.json.encode


async def read_completion(body: CompletionBody, model: ServedModel, exchange: Exchange) -> CompletionReply:
    """Understand a completion request. Raises InvalidRequest."""
    if body.best_of is not None and body.best_of != (body.n or 1):
        raise InvalidRequest(
            "best_of is supported only when it equals n", param="best_of", code="unsupported_parameter"
        )
    echoed = body.logprobs if body.echo else None
    wanted = [num for num in (body.prompt_logprobs, echoed) if num is not None]
    options = common_options(
        body,
        max_tokens=body.max_tokens,
        num_logprobs=body.logprobs,
        num_prompt_logprobs=max(wanted) if wanted else None,
    )
    prompts = await completion_prompts(
        model.text, split_prompts(body.prompt), echo=bool(body.echo), skip_special=options.skip_special
    )
    generation = Generation(model, prompts, options, default_max_tokens=_DEFAULT_MAX_TOKENS, arrival_s=exchange.start_s)
    return CompletionReply(body, model, generation, prompts, request_id=exchange.request_id)


def split_prompts(prompt: str | list[str | int | list[int]]) -> Sequence[str | Sequence[int]]:
    """The prompts of a body: text, texts, token ids or lists of token ids. Raises InvalidRequest for a mixture."""
    if isinstance(prompt, str):
        return [prompt]
    kinds = {type(item) for item in prompt}
    if kinds == {int}:
        return [cast("list[int]", prompt)]
    if len(kinds) != 1:
        raise InvalidRequest("prompt mixes texts, token ids and lists of token ids", param="prompt")
    if len(prompt) > MAX_PROMPTS:
        raise InvalidRequest(f"prompt is a list of {len(prompt)} prompts; {MAX_PROMPTS} are the most", param="prompt")
    return cast("list[str | list[int]]", prompt)


class CompletionReply:
    """The shapes of one completion."""

    def __init__(
        self,
        body: CompletionBody,
        model: ServedModel,
        generation: Generation,
        prompts: list[Prompt],
        *,
        request_id: str,
    ) -> None:
        self.generation = generation
        self._body = body
        self._prompts = prompts
        self._tokenizer = model.text.tokenizer
        self._model_name = model.name
        self._id = f"cmpl-{request_id}"
        self._created = int(time.time())
        self._num_choices_each = body.n or 1
        num_choices = len(prompts) * self._num_choices_each
        options = body.stream_options
        self._null_usage = None if options and options.include_usage else UNSET
        self._plain = body.logprobs is None and not body.return_token_ids
        self._begun = [False] * num_choices
        skip_special = body.skip_special_tokens is not False
        self._logprobs = [
            CompletionLogprobsBuilder(self._tokenizer, num_top=body.logprobs or 0, skip_special=skip_special)
            for _ in range(num_choices if body.logprobs is not None else 0)
        ]
        self._frames = [self._frame(index) for index in range(num_choices)] if body.stream else []

    def _frame(self, index: int) -> tuple[bytes, bytes]:
        """What stands before and after the text in the plain event of a choice, so that only the text is encoded."""
        mark = "\x00"
        before, after = self._event([CompletionChoice(index, mark)]).split(_encode(mark))
        return before, after

    def opening(self) -> bytes:
        """Completions have no role to announce."""
        return b""

    def event(self, delta: Delta, usage: UsageBody | None) -> bytes:
        """The event of a delta; the common case is two prebuilt pieces around the encoded text."""
        if self._plain and usage is None and delta.finish_reason is None and self._begun[delta.index]:
            before, after = self._frames[delta.index]
            return before + _encode(delta.text) + after
        return self._event([self._choice(delta.index, [delta])], usage=usage)

    def usage_event(self, usage: UsageBody) -> bytes:
        """An event without choices."""
        return self._event([], usage=usage)

    def answer(self, deltas: list[Delta], usage: UsageBody) -> bytes:
        """All choices, in order."""
        by_choice: list[list[Delta]] = [[] for _ in self._begun]
        for delta in deltas:
            by_choice[delta.index].append(delta)
        choices = [self._choice(index, own) for index, own in enumerate(by_choice)]
        return _encode(CompletionAnswer(self._id, "text_completion", self._created, self._model_name, choices, usage))

    def _choice(self, index: int, deltas: list[Delta]) -> CompletionChoice:
        """A choice from some of its deltas; the first ones bring the prompt along where it is asked for."""
        body = self._body
        first = not self._begun[index]
        self._begun[index] = True
        prompt = self._prompts[index // self._num_choices_each]
        text = "".join(delta.text for delta in deltas)
        last = deltas[-1]
        choice = CompletionChoice(
            index,
            prompt.text + text if first and body.echo else text,
            logprobs=self._logprobs_of(index, deltas, prompt if first and body.echo else None),
            finish_reason=last.finish_reason,
            stop_reason=UNSET if last.finish_reason is None else last.stop_reason,
        )
        if body.return_token_ids:
            choice.token_ids = [i for delta in deltas for i in delta.token_ids]
            choice.prompt_token_ids = prompt.token_ids if first else UNSET
        if body.prompt_logprobs is not None:
            entries = _prompt_entries(deltas)
            if entries is not None:
                choice.prompt_logprobs = prompt_logprobs_body(entries, self._tokenizer, num_top=body.prompt_logprobs)
        return choice

    def _logprobs_of(self, index: int, deltas: list[Delta], echoed: Prompt | None) -> CompletionLogprobs | None:
        if self._body.logprobs is None:
            return None
        entries = [entry for delta in deltas for entry in delta.logprobs or ()]
        prompt = (echoed.token_ids[0], _prompt_entries(deltas) or ()) if echoed is not None else None
        return self._logprobs[index].build(entries, prompt=prompt)

    def _event(self, choices: list[CompletionChoice], *, usage: UsageBody | None = None) -> bytes:
        answer = CompletionAnswer(
            self._id, "text_completion", self._created, self._model_name, choices, usage or self._null_usage
        )
        return b"data: " + _encode(answer) + b"\n\n"


def _prompt_entries(deltas: list[Delta]) -> tuple[TokenLogprob, ...] | None:
    return next((delta.prompt_logprobs for delta in deltas if delta.prompt_logprobs is not None), None)
