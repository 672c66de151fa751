"""From a client's options and the model's defaults to the final `SamplingParams` of each sequence.

Invariants: what this module returns is within the bounds stated in `SamplingParams`; prompt and `max_tokens` together
fit the context, or `InvalidRequest` says all numbers.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from llmserve.errors import InvalidRequest
from llmserve.service.options import RequestOptions
from llmserve.types import SamplingParams

_SMALLEST_TOP_P = 1e-9
"""top_p 0 asks for "as few tokens as possible", which is the likeliest one; `SamplingParams.top_p` is above 0."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Sampling values used where a client gave none."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> GenerationDefaults:
        """Take what a checkpoint's generation config says; values of the wrong type or out of range are left out."""
        return cls(
            temperature=_number(config.get("temperature"), 0.0, 2.0, 1.0),
            top_p=_number(config.get("top_p"), 0.0, 1.0, 1.0),
            top_k=int(_number(config.get("top_k"), 0, 2**31 - 1, 0)),
            min_p=_number(config.get("min_p"), 0.0, 1.0, 0.0),
        )


def _number(value: Any, low: float, high: float, default: float) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high:
        return float(value)
    return default


def resolve(
    options: RequestOptions,
    *,
    defaults: GenerationDefaults,
    num_prompt_tokens: int,
    max_model_len: int,
    eog_ids: frozenset[int],
    default_max_tokens: int | None,
) -> SamplingParams:
    """The parameters of the first sequence of one prompt; `for_choice` derives the others.

    `default_max_tokens` None means all that the context leaves. Raises InvalidRequest.
    """
    top_p = options.top_p if options.top_p is not None else defaults.top_p
    stop_token_ids = frozenset(options.stop_token_ids)
    if not options.ignore_eos:
        stop_token_ids |= eog_ids
    return SamplingParams(
        max_tokens=_max_tokens(options.max_tokens, num_prompt_tokens, max_model_len, default_max_tokens),
        temperature=options.temperature if options.temperature is not None else defaults.temperature,
        top_k=max(options.top_k if options.top_k is not None else defaults.top_k, 0),
        top_p=max(top_p, _SMALLEST_TOP_P),
        min_p=options.min_p if options.min_p is not None else defaults.min_p,
        seed=(options.seed if options.seed is not None else secrets.randbits(64)) % 2**64,
        stop_token_ids=tuple(sorted(stop_token_ids)),
        num_logprobs=options.num_logprobs,
        num_prompt_logprobs=options.num_prompt_logprobs,
    )


def for_choice(sampling: SamplingParams, choice: int) -> SamplingParams:
    """The parameters of the n-th sequence of a prompt: the seed moves on by one, all else is equal."""
    if choice == 0:
        return sampling
    return msgspec.structs.replace(sampling, seed=(sampling.seed + choice) % 2**64)


def _max_tokens(asked: int | None, num_prompt_tokens: int, max_model_len: int, default: int | None) -> int:
    left = max_model_len - num_prompt_tokens
    if left < 0 or (left == 0 and asked != 0):
        raise InvalidRequest(
            f"the prompt has {num_prompt_tokens} tokens and the context holds {max_model_len}, the answer included",
            param="prompt",
            code="context_length_exceeded",
        )
    if asked is None:
        return left if default is None else min(default, left)
    if asked > left:
        raise InvalidRequest(
            f"the context holds {max_model_len} tokens; the prompt has {num_prompt_tokens} and max_tokens asks for "
            f"{asked} more, {left} are left",
            param="max_tokens",
            code="context_length_exceeded",
        )
    return asked
