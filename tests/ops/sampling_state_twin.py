"""A sampling state without cleverness: the oracle of the compiled one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self


@dataclass(slots=True)
class SamplingStateTwin:
    """Has the attributes that the definition reads; counts nothing, remembers the tokens."""

    prompt_token_ids: Sequence[int]
    vocab_size: int
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Sequence[tuple[int, float]] = ()
    min_tokens: int = 0
    stop_token_ids: Sequence[int] = ()
    bad_words: Sequence[Sequence[int]] = ()
    allowed_token_ids: Sequence[int] | None = None
    typical_p: float = 1.0
    token_ids: list[int] = field(default_factory=list)
    num_prompt_tokens: int = 0

    @classmethod
    def of(cls, prompt_token_ids: Sequence[int], **options: Any) -> Self:
        twin = cls(prompt_token_ids, **options)
        twin.token_ids, twin.num_prompt_tokens = list(prompt_token_ids), len(prompt_token_ids)
        return twin

    def rewind(self, position: int) -> None:
        if not self.num_prompt_tokens <= position <= len(self.token_ids):
            raise ValueError("states: a position that was never reached")
        del self.token_ids[position:]

    def record(self, token_id: int) -> None:
        self.token_ids.append(token_id)
