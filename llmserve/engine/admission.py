"""What the engine refuses before it becomes a sequence.

Frontends check first and word it better; the engine checks again because one row that does not fit the step's arrays
would fail every request of that step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from llmserve.types import Request, SamplingParams

_MAX_INT32 = 2**31 - 1
_MAX_UINT64 = 2**64 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionLimits:
    """What a request must fit into."""

    vocab_size: int
    max_model_len: int
    """Tokens of a sequence, prompt included; never more than the whole KV cache holds."""


def refusal(request: Request, limits: AdmissionLimits) -> str | None:
    """Why this request can never be served, in one line; None when it can."""
    prompt = request.prompt_token_ids
    if not prompt:
        return "the prompt has no tokens"
    num_needed = len(prompt) + (1 if request.sampling.max_tokens > 0 else 0)
    if num_needed > limits.max_model_len:
        return f"the prompt has {len(prompt)} tokens; this engine holds sequences of {limits.max_model_len} at most"
    if min(prompt) < 0 or max(prompt) >= limits.vocab_size:
        return f"the prompt holds a token id outside 0 to {limits.vocab_size - 1}"
    return _sampling_refusal(request.sampling, limits.vocab_size)


def _sampling_refusal(sampling: SamplingParams, vocab_size: int) -> str | None:
    ranges: tuple[tuple[str, float, float, float], ...] = (
        ("max_tokens", sampling.max_tokens, 0, _MAX_INT32),
        ("temperature", sampling.temperature, 0.0, 1e6),
        ("top_k", sampling.top_k, 0, _MAX_INT32),
        ("top_p", sampling.top_p, 0.0, 1.0),
        ("min_p", sampling.min_p, 0.0, 1.0),
        ("typical_p", sampling.typical_p, 1e-9, 1.0),
        ("repetition_penalty", sampling.repetition_penalty, 1e-3, 1e3),
        ("frequency_penalty", sampling.frequency_penalty, -1e3, 1e3),
        ("presence_penalty", sampling.presence_penalty, -1e3, 1e3),
        ("min_tokens", sampling.min_tokens, 0, _MAX_INT32),
        ("seed", sampling.seed, 0, _MAX_UINT64),
        ("num_logprobs", sampling.num_logprobs or 0, 0, vocab_size),
        ("num_prompt_logprobs", sampling.num_prompt_logprobs or 0, 0, vocab_size),
    )
    for name, value, low, high in ranges:
        if not low <= value <= high:
            return f"{name} is {value}; it must lie between {low} and {high}"
    return _token_refusal(sampling, vocab_size)


def _token_refusal(sampling: SamplingParams, vocab_size: int) -> str | None:
    if sampling.allowed_token_ids == ():
        return "allowed_token_ids is empty: no token may be sampled"
    if not all(sampling.bad_words):
        return "bad_words holds a word without tokens"
    if not all(-1e3 <= bias <= 1e3 for _, bias in sampling.logit_bias):
        return "logit_bias holds a value that does not lie between -1000 and 1000"
    token_ids: dict[str, Iterable[int]] = {
        "logit_bias": (token_id for token_id, _ in sampling.logit_bias),
        "bad_words": (token_id for word in sampling.bad_words for token_id in word),
        "allowed_token_ids": sampling.allowed_token_ids or (),
    }
    for name, ids in token_ids.items():
        if not all(0 <= token_id < vocab_size for token_id in ids):
            return f"{name} holds a token id outside 0 to {vocab_size - 1}"
    return None
