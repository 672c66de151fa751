"""From a client's options and the model's defaults to the final `SamplingParams` of each sequence.

Invariants: what this module returns is within the bounds stated in `SamplingParams`; prompt and `max_tokens` together
fit the context, or `InvalidRequest` says all numbers.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from llmserve.errors import InvalidRequest
from llmserve.service.options import RequestOptions
from llmserve.text import Tokenizer
from llmserve.types import SamplingParams

_T = TypeVar("_T")

_SMALLEST_SHARE = 1e-9
"""0 of top_p or typical_p asks for "as few tokens as possible", which is one; in `SamplingParams` they are above 0."""
_MAX_BIAS = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Sampling values used where a client gave none."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> GenerationDefaults:
        """Take what a checkpoint's generation config says; values of the wrong type or out of range are left out."""
        return cls(
            temperature=_number(config.get("temperature"), 0.0, 2.0, 1.0),
            top_p=_number(config.get("top_p"), 0.0, 1.0, 1.0),
            top_k=int(_number(config.get("top_k"), 0, 2**31 - 1, 0)),
            min_p=_number(config.get("min_p"), 0.0, 1.0, 0.0),
            typical_p=_number(config.get("typical_p"), 0.0, 1.0, 1.0),
            repetition_penalty=_number(config.get("repetition_penalty"), 0.01, 100.0, 1.0),
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
    bad_words: tuple[tuple[int, ...], ...],
    default_max_tokens: int | None,
) -> SamplingParams:
    """The parameters of the first sequence of one prompt; `for_choice` derives the others.

    `bad_words` are those of `resolve_tokens`. `default_max_tokens` None means all that the context leaves. Raises
    InvalidRequest.
    """
    stop_token_ids = frozenset(options.stop_token_ids)
    if not options.ignore_eos:
        stop_token_ids |= eog_ids
    max_tokens = _max_tokens(options.max_tokens, num_prompt_tokens, max_model_len, default_max_tokens)
    _check_min_tokens(options, max_tokens, stop_token_ids)
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_either(options.temperature, defaults.temperature),
        top_k=max(_either(options.top_k, defaults.top_k), 0),
        top_p=max(_either(options.top_p, defaults.top_p), _SMALLEST_SHARE),
        min_p=_either(options.min_p, defaults.min_p),
        typical_p=max(_either(options.typical_p, defaults.typical_p), _SMALLEST_SHARE),
        repetition_penalty=_either(options.repetition_penalty, defaults.repetition_penalty),
        frequency_penalty=options.frequency_penalty,
        presence_penalty=options.presence_penalty,
        logit_bias=tuple((i, min(max(bias, -_MAX_BIAS), _MAX_BIAS)) for i, bias in options.logit_bias.items()),
        min_tokens=options.min_tokens,
        bad_words=bad_words,
        allowed_token_ids=options.allowed_token_ids,
        seed=(options.seed if options.seed is not None else secrets.randbits(64)) % 2**64,
        stop_token_ids=tuple(sorted(stop_token_ids)),
        num_logprobs=options.num_logprobs,
        num_prompt_logprobs=options.num_prompt_logprobs,
    )


def resolve_tokens(options: RequestOptions, tokenizer: Tokenizer, vocab_size: int) -> tuple[tuple[int, ...], ...]:
    """Check what names tokens, once a request; returns the bad words as token ids.

    Raises InvalidRequest for a token outside the vocabulary, and when no token may be sampled.
    """
    _check_ids("logit_bias", options.logit_bias, vocab_size)
    _check_ids("allowed_token_ids", options.allowed_token_ids or (), vocab_size)
    bad_words = _bad_word_ids(options.bad_words, tokenizer)
    if options.allowed_token_ids is not None and {(i,) for i in options.allowed_token_ids} <= set(bad_words):
        raise InvalidRequest("bad_words forbids every one of allowed_token_ids", param="allowed_token_ids")
    return bad_words


def _bad_word_ids(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """Each word as the tokenizer writes it at the start of a text and after a space, without repeats."""
    found: dict[tuple[int, ...], None] = {}
    for index, word in enumerate(words):
        bare = word.lstrip(" ")
        spellings = [tuple(tokenizer.encode(text, add_special=False)) for text in (bare, " " + bare)]
        if not bare or not all(spellings):
            raise InvalidRequest(f"bad_words[{index}] has no text", param=f"bad_words[{index}]")
        found.update(dict.fromkeys(spellings))
    return tuple(found)


def _check_ids(name: str, token_ids: Iterable[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if token_id >= vocab_size:
            raise InvalidRequest(
                f"{name} names token {token_id}, outside the vocabulary of {vocab_size} tokens", param=name
            )


def _check_min_tokens(options: RequestOptions, max_tokens: int, stop_token_ids: frozenset[int]) -> None:
    if options.min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens is {options.min_tokens}, but max_tokens or the context end the answer after {max_tokens}",
            param="min_tokens",
        )
    allowed = options.allowed_token_ids
    if options.min_tokens > 0 and allowed is not None and stop_token_ids.issuperset(allowed):
        raise InvalidRequest("min_tokens forbids every one of allowed_token_ids", param="allowed_token_ids")


def _either(asked: _T | None, default: _T) -> _T:
    return default if asked is None else asked


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
