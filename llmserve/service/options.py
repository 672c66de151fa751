"""The parameters of a generation request: their types, bounds and meaning, once for all frontends.

The annotated aliases are what each frontend's schema is made of, so parsing, bounds and documentation cannot drift
apart. `RequestOptions` is what the frontends hand to `sampling.resolve`. `None` always means "not given".
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

import msgspec
from msgspec import Meta

MAX_CHOICES = 128
"""Upper bound of `n`."""
MAX_SEQUENCES = 1024
"""Upper bound of prompts times `n` in one request."""
MAX_PROMPTS = 1024
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 1024
MAX_STOP_TOKEN_IDS = 128
MAX_LOGPROBS = 20
MAX_LOGIT_BIAS = 1024
MAX_BAD_WORDS = 128
MAX_BAD_WORD_CHARS = 128
MAX_ALLOWED_TOKEN_IDS = 16_384
MAX_TOKENS = 2**31 - 1

MaxTokens = Annotated[
    int,
    Meta(ge=1, le=MAX_TOKENS, description="Most tokens to generate. Prompt and this together must fit the context."),
]
MaxTokensOrZero = Annotated[
    int,
    Meta(
        ge=0, le=MAX_TOKENS, description="Most tokens to generate, 16 when absent; 0 only scores or echoes the prompt."
    ),
]
Temperature = Annotated[float, Meta(ge=0, le=2, description="0 is greedy; higher values flatten the distribution.")]
TopP = Annotated[float, Meta(ge=0, le=1, description="Sample from the smallest set of tokens with this probability.")]
TopK = Annotated[
    int, Meta(ge=-1, le=MAX_TOKENS, description="Sample from the k most likely tokens; 0 and -1 keep all.")
]
MinP = Annotated[float, Meta(ge=0, le=1, description="Drop tokens less likely than this share of the most likely one.")]
NumChoices = Annotated[
    int, Meta(ge=1, le=MAX_CHOICES, description="Answers for each prompt; choice i samples with seed + i.")
]
Seed = Annotated[
    int, Meta(ge=-(2**63), le=2**63 - 1, description="The same seed, prompt and parameters give the same tokens.")
]
StopString = Annotated[str, Meta(min_length=1, max_length=MAX_STOP_CHARS)]
StopStrings = Annotated[
    list[StopString], Meta(max_length=MAX_STOP_STRINGS, description="Generation ends where one of these begins.")
]
TokenId = Annotated[int, Meta(ge=0, le=2**31 - 1)]
StopTokenIds = Annotated[
    list[TokenId], Meta(max_length=MAX_STOP_TOKEN_IDS, description="Tokens that end generation as the end token does.")
]
RepetitionPenalty = Annotated[
    float,
    Meta(
        ge=0.01,
        le=100,
        description="Divide positive and multiply negative logits of tokens of the prompt or the answer; 1 is off.",
    ),
]
FrequencyPenalty = Annotated[
    float, Meta(ge=-2, le=2, description="Lower a token's logit by this for each time that the answer has it.")
]
PresencePenalty = Annotated[
    float, Meta(ge=-2, le=2, description="Lower the logit of every token that the answer has by this.")
]
TypicalP = Annotated[
    float,
    Meta(
        ge=0,
        le=1,
        description="Sample from the tokens whose surprise is nearest the entropy, up to this probability.",
    ),
]
LogitBias = Annotated[
    dict[TokenId, float],
    Meta(max_length=MAX_LOGIT_BIAS, description="Token id to what is added to its logit, cut to -100…100."),
]
MinTokens = Annotated[
    int,
    Meta(
        ge=0,
        le=MAX_TOKENS,
        description="No end token and none of `stop_token_ids` before this many tokens; stop strings still count.",
    ),
]
BadWord = Annotated[str, Meta(min_length=1, max_length=MAX_BAD_WORD_CHARS)]
BadWords = Annotated[
    list[BadWord],
    Meta(
        max_length=MAX_BAD_WORDS,
        description="Words kept out of the answer, as the tokenizer writes them with and without a space before.",
    ),
]
AllowedTokenIds = Annotated[
    list[TokenId],
    Meta(min_length=1, max_length=MAX_ALLOWED_TOKEN_IDS, description="Sample no other token, the end token included."),
]
NumLogprobs = Annotated[
    int, Meta(ge=0, le=MAX_LOGPROBS, description="Report the sampled token's log-probability and this many likeliest.")
]
NumPromptLogprobs = Annotated[
    int, Meta(ge=0, le=MAX_LOGPROBS, description="The same for every prompt token but the first.")
]


Priority = Annotated[
    int, Meta(ge=-(2**31), le=2**31 - 1, description="Smaller is served sooner; 0 when absent. Waiting counts as well.")
]
CacheSalt = Annotated[
    str, Meta(min_length=1, max_length=256, description="Share cached prefixes only with requests of the same salt.")
]
DeadlineMs = Annotated[
    int,
    Meta(
        ge=1,
        le=86_400_000,
        description="Time for the whole answer, waiting included: then a 408, or an error event once a stream began.",
    ),
]


class RequestOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What a client asked for, in bounds but without the model's defaults."""

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int = 1
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    repetition_penalty: float | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    typical_p: float | None = None
    logit_bias: Mapping[int, float] = {}
    min_tokens: int = 0
    bad_words: tuple[str, ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    num_logprobs: int | None = None
    num_prompt_logprobs: int | None = None
    include_stop: bool = False
    """Leave the stop string or stop token in the text."""
    skip_special: bool = True
    """Leave control tokens out of the text."""
    priority: int = 0
    cache_salt: str = ""
    deadline_ms: int | None = None
    """From the request's arrival."""
