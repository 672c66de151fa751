"""Drafters that say what a test wants, in engines where drafts cost nothing and so are always made."""

from __future__ import annotations

from collections.abc import Callable

from llmserve.engine.engine import Engine
from llmserve.engine.sequence import Sequence
from llmserve.engine.speculation import Speculation
from llmserve.engine.step_time import StepTimeModel
from tests.engine.fake_executor import VOCAB_SIZE, next_token

Guess = Callable[[Sequence, int], list[int]]
"""The next tokens of a sequence, as many as asked for or fewer."""


class FreeDrafts(StepTimeModel):
    """Decodes take a second, drafts no time at all."""

    def decode_s(self, num_decodes: int) -> float:
        return 1.0 if num_decodes else 0.0

    def draft_token_s(self, num_rows: int) -> float:
        return 0.0


class Guesser:
    """A drafter that is sure of itself."""

    def __init__(self, seq: Sequence, guess: Guess) -> None:
        self._seq = seq
        self._guess = guess
        self._guessed: list[int] = []

    def catch_up(self) -> None:
        self._guessed = []

    def chances(self, max_tokens: int) -> list[float]:
        self._guessed = self._guess(self._seq, max_tokens) if max_tokens > 0 else []
        return [1.0] * len(self._guessed)

    def draft(self, num_tokens: int) -> list[int]:
        return self._guessed[:num_tokens]


def speculate(engine: Engine, guess: Guess | None, *, max_draft_tokens: int = 4) -> None:
    """Let an engine verify what `guess` says; None: what its own drafters say."""
    scheduler = engine._scheduler
    scheduler.step_times = FreeDrafts()
    if guess is None:
        scheduler.speculation = Speculation(max_draft_tokens, engine._kv_cache)
    else:
        scheduler.speculation = Speculation(
            max_draft_tokens, engine._kv_cache, make_drafter=lambda seq: Guesser(seq, guess)
        )


def right(seq: Sequence, num_tokens: int) -> list[int]:
    """What the fake executor will sample."""
    tokens = seq.token_ids.tolist()
    for _ in range(num_tokens):
        tokens.append(next_token(tokens, seq.sampling.seed))
    return tokens[seq.num_tokens :]


def wrong(seq: Sequence, num_tokens: int) -> list[int]:
    """At each place another token than that."""
    return [(token + 1) % VOCAB_SIZE for token in right(seq, num_tokens)]


def mixed(seq: Sequence, num_tokens: int) -> list[int]:
    """Right up to a place that changes from step to step; sometimes nothing."""
    tokens = right(seq, num_tokens)
    place = seq.num_tokens * 7 % (num_tokens + 2)
    if place < len(tokens):
        tokens[place] = (tokens[place] + 1) % VOCAB_SIZE
    return tokens if seq.num_tokens % 5 else []
