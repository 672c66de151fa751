"""The plain data that crosses layers and processes.

Owns the wire types (`SamplingParams`, `Request`, `Output` and what they hold) and `CheckpointTensor`.
Everything here is immutable; wire types are `msgspec.Struct`s, so one definition serves both processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "deadline", "error"]
WeightsOrigin = Literal["memory", "written", "mapped"]
KVCacheLimit = Literal["available", "cap", "kv_cache_bytes", "max_num_seqs"]
"""What limits the size of the KV cache: a share of the free memory; the default limit; the configuration; the most
sequences of the greatest length, which could not use more."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one sequence is sampled. All values are final: defaults were applied and bounds checked by the frontend."""

    max_tokens: int = 16
    """Upper limit of generated tokens; 0 is allowed and scores the prompt only."""
    temperature: float = 1.0
    """0 means greedy."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches top_p, in (0, 1]."""
    min_p: float = 0.0
    """Drop tokens less likely than min_p times the most likely one, in [0, 1]."""
    seed: int = 0
    """Key of the Philox generator, 0 ≤ seed < 2**64; the frontend draws one when the client gave none."""
    stop_token_ids: tuple[int, ...] = ()
    """A generated token of this set ends the sequence with `stop`; the end-of-generation set is already in it."""
    typical_p: float = 1.0
    """Keep the tokens whose surprise is nearest the entropy until their probability reaches typical_p, in (0, 1]."""
    repetition_penalty: float = 1.0
    """Divide positive and multiply negative logits of tokens seen in prompt or output; 1 is off."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit for each time it was generated."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of a token that was generated."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, value added to its logit)."""
    min_tokens: int = 0
    """Tokens of `stop_token_ids` are not sampled before this many tokens were generated."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """Token sequences that are never completed."""
    allowed_token_ids: tuple[int, ...] | None = None
    """When given, no other token is sampled."""
    num_logprobs: int | None = None
    """None: none. k ≥ 0: log-probability of the sampled token and of the k most likely ones."""
    num_prompt_logprobs: int | None = None
    """The same for every prompt token but the first, reported with the first output."""


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Raw log-probabilities (natural log, before temperature and filters) at one position."""

    token_id: int
    logprob: float
    rank: int
    """1 for the most likely token."""
    top_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """One sequence to generate, as the engine sees it."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    priority: int = 0
    """Smaller is more urgent."""
    tenant: str = ""
    """Whose request it is: fair shares are kept between tenants. Never the secret of a key."""
    cache_salt: str = ""
    """Prompts share cached prefixes only under the same salt."""
    arrival_s: float = 0.0
    """`time.monotonic()` at which the frontend took the request (one clock for all processes of a machine)."""
    deadline_s: float | None = None
    """`time.monotonic()` after which the request ends with `deadline`, wherever it is; None: never."""
    parent_id: str | None = None
    """The request whose prompt this one shares (n > 1): its blocks are forked instead of computed again."""


class RequestTiming(msgspec.Struct, frozen=True, array_like=True):
    """When a sequence got on, in `time.monotonic()` seconds; 0 for what has not happened."""

    arrival_s: float
    """The frontend took the request."""
    scheduled_s: float = 0.0
    """It first was part of a step."""
    first_token_s: float = 0.0
    end_s: float = 0.0


class Output(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one step produced for one request. Exactly one output per request has a `finish_reason`."""

    request_id: str
    token_ids: tuple[int, ...] = ()
    """New tokens, a stop token included."""
    logprobs: tuple[TokenLogprob, ...] | None = None
    """One entry per new token when asked for."""
    prompt_logprobs: tuple[TokenLogprob, ...] | None = None
    """One entry per prompt token from the second on, once, when asked for."""
    num_cached_tokens: int = 0
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    """The token that ended the sequence with `stop`."""
    error: str | None = None
    """One line, only with `finish_reason == "error"`."""
    error_kind: str = ""
    """The class of `errors` it belongs to; empty: `EngineFault`."""
    timing: RequestTiming | None = None
    """With the first token and with the `finish_reason`; None where the engine never took the request."""


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine says of itself once it is ready."""

    model_path: str
    architecture: str
    vocab_size: int
    max_model_len: int
    max_num_seqs: int
    num_blocks: int
    block_size: int
    kv_cache_bytes: int
    weight_bytes: int
    device: str
    isa: str
    num_threads: int
    load_s: float
    max_num_waiting: int = 0
    """Sequences that may wait; 0: any number."""
    available_bytes: int = 0
    """Memory that was free when the KV cache was sized."""
    kv_cache_limit: KVCacheLimit = "available"
    """What the size of the cache was limited by."""
    weights_origin: WeightsOrigin = "memory"
    """Packed into memory, packed into an image, or mapped from one that was there."""
    image_path: str = ""
    """The image of the packed weights; empty: there is none."""


class DraftStats(msgspec.Struct, frozen=True, omit_defaults=True):
    """Running totals of speculation."""

    num_drafts: int = 0
    """Drafts verified; each is of one sequence in one step."""
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    num_accepted_per_position: tuple[int, ...] = ()
    """Of the first token of the drafts, the second, … up to the longest draft so far."""


class EngineStats(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Gauges and running totals of an engine, sent with every step."""

    num_running: int = 0
    num_waiting: int = 0
    num_blocks_used: int = 0
    num_blocks: int = 0
    num_steps: int = 0
    num_preemptions: int = 0
    num_cache_queries: int = 0
    """Prompt tokens looked up in the prefix cache."""
    num_cache_hits: int = 0
    """Prompt tokens found there."""
    num_host_cache_hits: int = 0
    """Tokens found there that the host had, also where a preempted sequence came back."""
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    drafts: DraftStats = DraftStats()
    last_step_tokens: int = 0
    last_step_s: float = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class CheckpointTensor:
    """A tensor as it lies in a checkpoint file, not copied, or one that is converted whenever `data` is read."""

    name: str
    """Canonical name (see `checkpoints.names`)."""
    dtype: str
    """A key of `checkpoints.dtypes.BLOCKS`: `f32`, `q4_0`, …"""
    shape: tuple[int, ...]
    """Logical shape, row-major, e.g. (out_features, in_features)."""
    data: memoryview
    """The bytes, read-only. A mapped file stays mapped as long as there is a view of them. To read them several times,
    take them once (see `checkpoints.module.ConvertedTensor`)."""
    order: tuple[int, ...] | None = None
    """Activation order: column j of the stored rows multiplies input `order[j]`; None: j itself. The shape's columns
    are the inputs."""
