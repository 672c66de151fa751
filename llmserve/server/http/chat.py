"""`POST /v1/chat/completions`: the body's meaning and the answer's shape."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from msgspec import UNSET

from llmserve.errors import InvalidRequest
from llmserve.server.http.context import Exchange
from llmserve.server.http.endpoint import common_options
from llmserve.server.http.logprobs import chat_logprobs, prompt_logprobs_body
from llmserve.server.http.responses import (
    AnswerMessage,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatLogprobs,
    DeltaBody,
    UsageBody,
)
from llmserve.server.http.schemas import ChatBody, Message
from llmserve.server.http.support import check_supported
from llmserve.service.choice import Delta
from llmserve.service.generate import Generation, Prompt
from llmserve.service.model import ServedModel
from llmserve.service.prompts import chat_prompt
from llmserve.types import TokenLogprob

_encode = msgspec.json.encode


async def read_chat(body: ChatBody, model: ServedModel, exchange: Exchange) -> ChatReply:
    """Understand a chat request. Raises InvalidRequest."""
    for index, message in enumerate(body.messages):
        check_supported(message, f"messages[{index}].")
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest("top_logprobs needs logprobs to be true", param="top_logprobs")
    if None not in (body.max_tokens, body.max_completion_tokens) and body.max_tokens != body.max_completion_tokens:
        raise InvalidRequest("max_tokens and max_completion_tokens differ; send one of them", param="max_tokens")
    options = common_options(
        body,
        max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        num_logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        num_prompt_logprobs=body.prompt_logprobs,
    )
    prompt = await chat_prompt(
        model.text,
        [_message(message) for message in body.messages],
        add_generation_prompt=body.add_generation_prompt is not False,
        template_kwargs=body.chat_template_kwargs or {},
    )
    try:
        generation = Generation(model, [prompt], options, default_max_tokens=None, arrival_s=exchange.start_s)
    except InvalidRequest as error:
        if error.param == "prompt":
            error.param = "messages"
        raise
    return ChatReply(body, model, generation, prompt, request_id=exchange.request_id)


def _message(message: Message) -> dict[str, Any]:
    """A message as chat templates know it. `developer` is OpenAI's newer name of `system`."""
    content = message.content
    rendered: dict[str, Any] = {
        "role": "system" if message.role == "developer" else message.role,
        "content": "\n".join(part.text for part in content) if isinstance(content, list) else content or "",
    }
    if message.name is not None:
        rendered["name"] = message.name
    return rendered


class ChatReply:
    """The shapes of one chat answer."""

    def __init__(
        self, body: ChatBody, model: ServedModel, generation: Generation, prompt: Prompt, *, request_id: str
    ) -> None:
        self.generation = generation
        self._body = body
        self._tokenizer = model.text.tokenizer
        self._prompt = prompt
        self._model_name = model.name
        self._id = f"chatcmpl-{request_id}"
        self._created = int(time.time())
        options = body.stream_options
        self._null_usage = None if options and options.include_usage else UNSET
        self._plain = not (body.logprobs or body.return_token_ids)
        self._frames = [self._frame(index) for index in range(body.n or 1)] if body.stream else []

    def _frame(self, index: int) -> tuple[bytes, bytes]:
        """What stands before and after the text in the plain event of a choice, so that only the text is encoded."""
        mark = "\x00"
        before, after = self._chunk(ChatChunkChoice(index, DeltaBody(content=mark))).split(_encode(mark))
        return before, after

    def opening(self) -> bytes:
        """The role of each choice."""
        choices = (
            ChatChunkChoice(index, DeltaBody(role="assistant", content="")) for index in range(self._body.n or 1)
        )
        first, *others = choices
        ids = self._prompt.token_ids if self._body.return_token_ids else UNSET
        return b"".join((self._chunk(first, prompt_token_ids=ids), *map(self._chunk, others)))

    def event(self, delta: Delta, usage: UsageBody | None) -> bytes:
        """The event of a delta; the common case is two prebuilt pieces around the encoded text."""
        if self._plain and usage is None and delta.finish_reason is None and delta.prompt_logprobs is None:
            before, after = self._frames[delta.index]
            return before + _encode(delta.text) + after
        choice = ChatChunkChoice(
            delta.index,
            DeltaBody(content=delta.text) if delta.text else DeltaBody(),
            logprobs=self._logprobs(delta.logprobs) if delta.logprobs else None,
            finish_reason=delta.finish_reason,
            stop_reason=UNSET if delta.stop_reason is None else delta.stop_reason,
            token_ids=delta.token_ids if self._body.return_token_ids else UNSET,
        )
        prompt_logprobs = delta.prompt_logprobs if delta.index == 0 else None
        return self._chunk(choice, usage=usage or self._null_usage, prompt_logprobs=prompt_logprobs)

    def usage_event(self, usage: UsageBody) -> bytes:
        """An event without choices."""
        return _event(ChatChunk(self._id, "chat.completion.chunk", self._created, self._model_name, [], usage))

    def answer(self, deltas: list[Delta], usage: UsageBody) -> bytes:
        """All choices, in order."""
        choices = [self._choice(index, [d for d in deltas if d.index == index]) for index in range(self._body.n or 1)]
        prompt_logprobs = next((d.prompt_logprobs for d in deltas if d.prompt_logprobs is not None), None)
        answer = ChatAnswer(self._id, self._created, self._model_name, choices, usage)
        if prompt_logprobs is not None:
            answer.prompt_logprobs = self._prompt_logprobs(prompt_logprobs)
        if self._body.return_token_ids:
            answer.prompt_token_ids = self._prompt.token_ids
        return _encode(answer)

    def _choice(self, index: int, deltas: list[Delta]) -> ChatChoice:
        last = deltas[-1]
        assert last.finish_reason is not None, "a generation ends each choice"
        entries = [entry for delta in deltas for entry in delta.logprobs or ()]
        return ChatChoice(
            index,
            AnswerMessage("".join(delta.text for delta in deltas)),
            logprobs=self._logprobs(entries) if self._body.logprobs else None,
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
            token_ids=[i for delta in deltas for i in delta.token_ids] if self._body.return_token_ids else UNSET,
        )

    def _chunk(
        self,
        choice: ChatChunkChoice,
        *,
        usage: UsageBody | msgspec.UnsetType | None = UNSET,
        prompt_logprobs: tuple[TokenLogprob, ...] | None = None,
        prompt_token_ids: list[int] | msgspec.UnsetType = UNSET,
    ) -> bytes:
        return _event(
            ChatChunk(
                self._id,
                "chat.completion.chunk",
                self._created,
                self._model_name,
                [choice],
                usage=self._null_usage if usage is UNSET else usage,
                prompt_logprobs=UNSET if prompt_logprobs is None else self._prompt_logprobs(prompt_logprobs),
                prompt_token_ids=prompt_token_ids,
            )
        )

    def _logprobs(self, entries: list[TokenLogprob]) -> ChatLogprobs:
        return chat_logprobs(entries, self._tokenizer, num_top=self._body.top_logprobs or 0)

    def _prompt_logprobs(self, entries: tuple[TokenLogprob, ...]) -> Any:
        return prompt_logprobs_body(entries, self._tokenizer, num_top=self._body.prompt_logprobs or 0)


def _event(chunk: ChatChunk) -> bytes:
    return b"data: " + _encode(chunk) + b"\n\n"
