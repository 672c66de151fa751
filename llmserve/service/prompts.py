"""From what a client sends as its prompt to token ids.

Invariant: text of a client is never read as control tokens; in a conversation only those
that the template put in place are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from llmserve.errors import InvalidRequest
from llmserve.service.generate import Prompt
from llmserve.service.model import ModelText

_T = TypeVar("_T")
_MAX_INLINE_CHARS = 2048
"""Longer texts, which take more than about half a millisecond, are tokenized on a thread: none holds up the streams."""


async def chat_prompt(
    text: ModelText, messages: list[dict[str, Any]], *, add_generation_prompt: bool, template_kwargs: dict[str, Any]
) -> Prompt:
    """Render the conversation and tokenize it. Raises InvalidRequest."""
    template = text.chat_template
    if template is None:
        raise InvalidRequest("this model has no chat template; use /v1/completions", param="messages")

    def build() -> Prompt:
        rendered = template.render(messages, add_generation_prompt=add_generation_prompt, **template_kwargs)
        return Prompt(text.tokenizer.encode_chat(rendered))

    return await _run(build, sum(len(str(message.get("content") or "")) for message in messages))


async def completion_prompts(
    text: ModelText, prompts: Sequence[str | Sequence[int]], *, echo: bool, skip_special: bool
) -> list[Prompt]:
    """Tokenize each text, take token ids as they are; `echo` asks for the text of the latter, too."""
    tokenizer = text.tokenizer

    def build() -> list[Prompt]:
        built: list[Prompt] = []
        for prompt in prompts:
            if isinstance(prompt, str):
                built.append(Prompt(_encode(text, prompt), prompt))
            else:
                ids = list(prompt)
                if any(i >= tokenizer.vocab_size for i in ids):
                    raise InvalidRequest(
                        f"a token id of the prompt is outside the vocabulary of {tokenizer.vocab_size} tokens",
                        param="prompt",
                    )
                built.append(Prompt(ids, tokenizer.decode(ids, skip_special=skip_special) if echo else ""))
        return built

    return await _run(build, sum(len(prompt) for prompt in prompts))


def _encode(text: ModelText, prompt: str) -> list[int]:
    ids = text.tokenizer.encode(prompt, add_special=True)
    bos_id = text.tokenizer.bos_id
    if not ids and bos_id is not None:
        return [bos_id]  # an empty prompt: begin at the beginning
    return ids


async def _run(build: Callable[[], _T], num_chars: int) -> _T:
    return build() if num_chars <= _MAX_INLINE_CHARS else await asyncio.to_thread(build)
