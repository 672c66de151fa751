"""One choice of an answer: tokens in, safe text out.

Owns the detokenizer of one sequence and what is held back with its text. Invariants: log-probabilities and token ids
travel with the event that releases the last of their text; entries of which a stop string left no text are dropped
with it; the text of all deltas together is the text of the answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llmserve.client.wire import restore_error
from llmserve.errors import DeadlineExceeded
from llmserve.service.options import RequestOptions
from llmserve.text import Detokenizer, Tokenizer
from llmserve.types import Output, TokenLogprob


@dataclass(slots=True)
class Delta:
    """What one event adds to one choice."""

    index: int
    text: str
    token_ids: list[int]
    logprobs: list[TokenLogprob] | None = None
    """One entry per released token, when asked for."""
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    """Once, with the first delta, when asked for: one entry per prompt token from the second on."""
    finish_reason: Literal["stop", "length"] | None = None
    stop_reason: str | int | None = None
    """The stop string, or the stop token's id when the client named it."""


class Choice:
    """The state of one choice while it is generated."""

    def __init__(self, index: int, tokenizer: Tokenizer, options: RequestOptions) -> None:
        self.index = index
        self.num_tokens = 0
        """Generated tokens so far, a stop token included."""
        self.num_cached_tokens = 0
        self.finished = False
        self._options = options
        self._has_entries = options.num_logprobs is not None or options.num_prompt_logprobs is not None
        self._detokenizer = Detokenizer(
            tokenizer, stop=options.stop, include_stop=options.include_stop, skip_special=options.skip_special
        )
        self._pending_ids: list[int] = []
        self._pending_logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: tuple[TokenLogprob, ...] | None = None
        self._num_silent = 0  # stop tokens that the detokenizer does not see

    def push(self, output: Output) -> Delta | None:
        """Take what a step produced; None while all of it must be held back.

        Raises DeadlineExceeded, and the error an output names, when it ends the sequence without an answer.
        """
        text, ids = self._decode(output)
        self.num_tokens += len(ids)
        if output.num_cached_tokens:
            self.num_cached_tokens = output.num_cached_tokens
        stopped, reason = self._detokenizer.stopped, output.finish_reason
        if text and stopped is None and reason is None and not self._holds_back():
            return Delta(self.index, text, list(ids))  # nearly every token of nearly every answer
        self._keep(output, ids)
        if stopped is not None:
            return self._finish(text, "stop", stopped)
        if reason is not None:
            return self._end(text, output)
        return self._release(text) if text else None

    def _decode(self, output: Output) -> tuple[str, tuple[int, ...]]:
        """The text that is certain now, and the tokens of the answer: none follows one that completes a stop string.

        A step may yield several tokens, and the answer must not tell by how many it was grouped.
        """
        ids = output.token_ids
        is_silent = output.stop_token_id is not None and not self._options.include_stop
        self._num_silent = int(is_silent)
        text = ""
        for number, token_id in enumerate(ids[:-1] if is_silent else ids, 1):
            text += self._detokenizer.push((token_id,))
            if self._detokenizer.stopped is not None:
                self._num_silent = 0
                return text, ids[:number]
        return text, ids

    def _holds_back(self) -> bool:
        """Whether something travels, or waits, beside the text of the tokens just pushed."""
        return bool(self._has_entries or self._pending_ids or self._detokenizer.pending_tokens)

    def _keep(self, output: Output, ids: tuple[int, ...]) -> None:
        """Hold back what an output brought until its text is out."""
        if output.prompt_logprobs is not None:
            self._prompt_logprobs = output.prompt_logprobs
        self._pending_ids.extend(ids)
        if output.logprobs is not None:
            self._pending_logprobs.extend(output.logprobs[: len(ids)])

    def _end(self, text: str, output: Output) -> Delta:
        reason = output.finish_reason
        if reason == "stop" or reason == "length":
            text += self._detokenizer.finish()
            named = output.stop_token_id if output.stop_token_id in self._options.stop_token_ids else None
            return self._finish(text, reason, named)
        if reason == "deadline":
            raise DeadlineExceeded(output.error or "the request's deadline passed")
        raise restore_error(output.error or f"the engine ended the request with {reason!r}", output.error_kind)

    def _finish(self, text: str, reason: Literal["stop", "length"], stop_reason: str | int | None) -> Delta:
        self.finished = True
        delta = self._release(text)
        delta.token_ids += self._pending_ids
        if delta.logprobs is not None and self._detokenizer.stopped is None:
            delta.logprobs += self._pending_logprobs
        delta.finish_reason = reason
        delta.stop_reason = stop_reason
        return delta

    def _release(self, text: str) -> Delta:
        """The text with the tokens whose text is now out in full."""
        num_out = len(self._pending_ids) - self._detokenizer.pending_tokens - self._num_silent
        delta = Delta(self.index, text, self._pending_ids[:num_out], prompt_logprobs=self._prompt_logprobs)
        self._pending_ids = self._pending_ids[num_out:]
        self._prompt_logprobs = None
        if self._options.num_logprobs is not None:
            delta.logprobs = self._pending_logprobs[:num_out]
            self._pending_logprobs = self._pending_logprobs[num_out:]
        return delta
