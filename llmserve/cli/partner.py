"""Who answers in a chat: a model of this machine, or a server elsewhere. One conversation at a time."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol, TypedDict


class ChatMessage(TypedDict):
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """Sampling of the answers; None leaves the choice to the model."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None


class Partner(Protocol):
    """Answers conversations."""

    @property
    def name(self) -> str:
        """The model's name."""

    @property
    def num_tokens(self) -> int | None:
        """Tokens of the last answer; None when that is not known."""

    def answer(self, messages: list[ChatMessage], options: ChatOptions) -> AsyncGenerator[str, None]:
        """Pieces of text as they come. Close it to stop the answer. Raises `LLMServeError`."""

    async def aclose(self) -> None:
        """Give everything back."""
