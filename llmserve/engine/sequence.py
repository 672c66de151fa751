"""The state of one sequence in the engine.

Invariants: `num_computed_tokens < num_tokens` while it lives (there is always a token to compute), and the KV blocks
behind `block_table` cover at least `num_computed_tokens`. Only the scheduler and the engine change a sequence.
"""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from llmserve.engine.drafter import Drafter
from llmserve.engine.fair_share import Account
from llmserve.ops.protocol import SamplingState
from llmserve.types import FinishReason, Request, RequestTiming, SamplingParams, TokenLogprob

NO_TABLE = -1


@dataclass(slots=True, eq=False)
class Sequence:
    """One request being generated. Prompt and generated tokens are one list."""

    request_id: str
    sampling: SamplingParams
    token_ids: array[int]
    """32-bit integers in one piece: the block pool reads them without a copy."""
    num_prompt_tokens: int
    max_num_tokens: int
    """Length, prompt included, at which it ends with `length`."""
    stop_token_ids: frozenset[int]
    num_tokens: int
    """`len(token_ids)`, kept beside it because every step reads it."""
    account: Account
    """Of its tenant; its tokens are charged there."""
    order: int = 0
    """Number of arrival, distinct among living sequences."""
    priority: int = 0
    """Smaller is more urgent."""
    arrival_s: float = 0.0
    """Monotonic."""
    deadline_s: float | None = None
    """Monotonic; None: never."""
    cache_salt: int = 0
    """Cached prefixes are shared under the same salt alone; 64 bits."""
    parent: Sequence | None = None
    """The sequence whose prompt it shares and whose blocks it may fork."""
    ended: bool = False
    """Its terminal output was made."""
    is_poisoned: bool = False
    """Its logits were not finite: its keys and values are not for others."""
    scheduled_s: float = 0.0
    """Monotonic: when it first was admitted; 0 before."""
    first_token_s: float = 0.0
    """Monotonic: when its first token was collected; 0 before."""
    num_preemptions: int = 0
    num_passes: int = 0
    """How often one that came later was admitted before it."""
    num_cached_tokens: int = -1
    """Prompt tokens that its first admission found computed; -1 before."""
    num_computed_tokens: int = 0
    """Tokens whose keys and values lie in the cache."""
    score_end: int = 0
    """Prompt positions below this one need a logit row that scores their successor; 0 when nobody asked."""
    num_scored: int = 0
    """Prompt positions whose successor has been scored; it survives a preemption."""
    block_table: int = NO_TABLE
    """Handle in the block pool."""
    num_reserved_tokens: int = 0
    """Tokens that the reserved blocks can hold."""
    prompt_logprobs: list[TokenLogprob] | None = None
    """Collected over the chunks of the prompt, handed out with the first output."""
    sampling_row: tuple[float, int, float, float, int, int] = field(default=(0.0, 0, 1.0, 0.0, 0, -1))
    """temperature, top_k, top_p, min_p, seed, num_logprobs: this sequence's row of the sampling arrays."""
    state: SamplingState | None = None
    """What its sampling remembers, where a parameter needs that. It outlives a preemption."""
    may_draft: bool = False
    """Whether drafts may be verified for it: its sampling depends on nothing but logits and position."""
    drafter: Drafter | None = None
    """Made when it first may need one. It outlives a preemption."""

    @classmethod
    def of(
        cls,
        request: Request,
        account: Account,
        *,
        max_model_len: int,
        vocab_size: int,
        order: int,
        now_s: float,
        cache_salt: int,
    ) -> Sequence:
        """A fresh sequence of an admissible request (see `admission`)."""
        sampling = request.sampling
        num_prompt = len(request.prompt_token_ids)
        scores = sampling.num_prompt_logprobs is not None
        num_logprobs = -1 if sampling.num_logprobs is None else sampling.num_logprobs
        return cls(
            request_id=request.request_id,
            sampling=sampling,
            token_ids=array("i", request.prompt_token_ids),
            num_prompt_tokens=num_prompt,
            max_num_tokens=min(num_prompt + sampling.max_tokens, max_model_len),
            stop_token_ids=frozenset(sampling.stop_token_ids),
            num_tokens=num_prompt,
            account=account,
            order=order,
            priority=request.priority,
            arrival_s=min(request.arrival_s, now_s) or now_s,
            deadline_s=request.deadline_s,
            cache_salt=cache_salt,
            score_end=num_prompt - 1 if scores else 0,
            prompt_logprobs=[] if scores else None,
            sampling_row=(
                sampling.temperature,
                sampling.top_k,
                sampling.top_p,
                sampling.min_p,
                sampling.seed,
                num_logprobs,
            ),
            state=_sampling_state(request, vocab_size),
            may_draft=not needs_state(sampling),
        )

    @property
    def generates(self) -> bool:
        """False for a request that only scores its prompt."""
        return self.max_num_tokens > self.num_prompt_tokens

    @property
    def reads_cache(self) -> bool:
        """False while prompt positions must be scored: a cached position has no logits."""
        return self.num_scored >= self.score_end

    @property
    def view(self) -> NDArray[np.int32]:
        """`token_ids` as an array, without a copy. Let go of it before the sequence grows."""
        return np.frombuffer(self.token_ids, dtype=np.int32)

    def append(self, token_id: int) -> FinishReason | None:
        """Take a sampled token; says whether it ended the sequence, and how."""
        self.token_ids.append(token_id)
        self.num_tokens += 1
        if token_id in self.stop_token_ids:
            return "stop"
        return "length" if self.num_tokens >= self.max_num_tokens else None

    def timing(self, end_s: float = 0.0) -> RequestTiming:
        """Its times so far."""
        return RequestTiming(self.arrival_s, self.scheduled_s, self.first_token_s, end_s)

    def take_prompt_logprobs(self) -> tuple[TokenLogprob, ...] | None:
        """The prompt's scores, once."""
        scores, self.prompt_logprobs = self.prompt_logprobs, None
        return None if scores is None else tuple(scores)


def _sampling_state(request: Request, vocab_size: int) -> SamplingState | None:
    """The state of a fresh sequence; None when its logits are only scaled and cut."""
    sampling = request.sampling
    if not needs_state(sampling):
        return None
    from llmserve._C import SamplingState as State  # the reference executor runs plain requests without the extension

    return State(
        request.prompt_token_ids,
        vocab_size=vocab_size,
        repetition_penalty=sampling.repetition_penalty,
        frequency_penalty=sampling.frequency_penalty,
        presence_penalty=sampling.presence_penalty,
        logit_bias=sampling.logit_bias,
        min_tokens=sampling.min_tokens,
        stop_token_ids=[token_id for token_id in sampling.stop_token_ids if 0 <= token_id < vocab_size],
        bad_words=sampling.bad_words,
        allowed_token_ids=sampling.allowed_token_ids,
        typical_p=sampling.typical_p,
    )


def needs_state(sampling: SamplingParams) -> bool:
    """Whether some parameter edits logits by what the sequence has seen, or by token."""
    return (
        sampling.repetition_penalty != 1.0
        or sampling.frequency_penalty != 0.0
        or sampling.presence_penalty != 0.0
        or sampling.typical_p < 1.0
        or bool(sampling.logit_bias or sampling.bad_words)
        or sampling.allowed_token_ids is not None
        or (sampling.min_tokens > 0 and bool(sampling.stop_token_ids))
    )
