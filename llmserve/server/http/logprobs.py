"""Log-probabilities in the shapes of the OpenAI endpoints.

A token whose bytes are not UTF-8 by themselves has no text: chat gives U+FFFD and the exact bytes, completions the
notation `bytes:\\xe2\\x98`, so that distinct tokens keep distinct keys. -inf becomes -9999.0, which JSON can say.
"""

from __future__ import annotations

from collections.abc import Sequence

from llmserve.server.http.responses import (
    ChatLogprob,
    ChatLogprobs,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TopLogprob,
)
from llmserve.text import Tokenizer
from llmserve.types import TokenLogprob

_LOWEST = -9999.0


def chat_logprobs(entries: Sequence[TokenLogprob], tokenizer: Tokenizer, *, num_top: int) -> ChatLogprobs:
    """Entries of generated tokens, each with its `num_top` likeliest."""
    content: list[ChatLogprob] = []
    for entry in entries:
        data = tokenizer.token_bytes(entry.token_id)
        top = [
            TopLogprob(_text(top_data := tokenizer.token_bytes(token_id)), max(logprob, _LOWEST), list(top_data))
            for token_id, logprob in zip(entry.top_ids[:num_top], entry.top_logprobs, strict=False)
        ]
        content.append(ChatLogprob(_text(data), max(entry.logprob, _LOWEST), list(data), top))
    return ChatLogprobs(content)


class CompletionLogprobsBuilder:
    """Builds the parallel lists of one completion, over as many events as there are."""

    def __init__(self, tokenizer: Tokenizer, *, num_top: int, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._num_top = num_top
        self._silent = tokenizer.control_ids if skip_special else frozenset()
        self._offset = 0  # characters of the text before the next token

    def build(
        self, entries: Sequence[TokenLogprob], *, prompt: tuple[int, Sequence[TokenLogprob]] | None = None
    ) -> CompletionLogprobs:
        """`prompt` puts a prompt before the entries: its first token's id, and an entry for each of the others."""
        result = CompletionLogprobs([], [], [], [])
        if prompt is not None:
            first_id, rest = prompt
            self._append(result, first_id)
            result.token_logprobs.append(None)
            result.top_logprobs.append(None)
            entries = (*rest, *entries)
        for entry in entries:
            self._append(result, entry.token_id)
            result.token_logprobs.append(max(entry.logprob, _LOWEST))
            result.top_logprobs.append(self._top(entry))
        return result

    def _append(self, result: CompletionLogprobs, token_id: int) -> None:
        result.tokens.append(self._name(token_id))
        result.text_offset.append(self._offset)
        if token_id not in self._silent:
            # Continuation bytes belong to a character that was counted with its first byte.
            data = self._tokenizer.token_bytes(token_id)
            self._offset += sum(1 for byte in data if byte & 0xC0 != 0x80)

    def _top(self, entry: TokenLogprob) -> dict[str, float]:
        top = {
            self._name(token_id): max(logprob, _LOWEST)
            for token_id, logprob in zip(entry.top_ids[: self._num_top], entry.top_logprobs, strict=False)
        }
        if self._num_top:
            top.setdefault(self._name(entry.token_id), max(entry.logprob, _LOWEST))
        return top

    def _name(self, token_id: int) -> str:
        data = self._tokenizer.token_bytes(token_id)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def prompt_logprobs_body(entries: Sequence[TokenLogprob], tokenizer: Tokenizer, *, num_top: int) -> PromptLogprobs:
    """Per prompt token the actual token and the `num_top` likeliest ones; null for the first token."""
    body: PromptLogprobs = [None]
    for entry in entries:
        row = {
            str(token_id): PromptLogprob(max(logprob, _LOWEST), rank, _text(tokenizer.token_bytes(token_id)))
            for rank, (token_id, logprob) in enumerate(
                zip(entry.top_ids[:num_top], entry.top_logprobs, strict=False), start=1
            )
        }
        actual = PromptLogprob(max(entry.logprob, _LOWEST), entry.rank, _text(tokenizer.token_bytes(entry.token_id)))
        row[str(entry.token_id)] = actual
        body.append(row)
    return body


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")
