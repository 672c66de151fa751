"""The request bodies of the generation endpoints.

These structs are the one definition of the parameters: they drive parsing, bounds, `/openapi.json` and the support
table of `docs/api.md`. Invariants: every optional field takes null as "not given"; a field is honoured, or marked
`neutral` (only its neutral values are accepted, everything else is a 400 naming it), or marked `IGNORED` (harmless
extras that the OpenAI clients send); a field that is not here is a 400 naming it.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from llmserve.service import options

Json = Any
"""Any JSON value."""

IGNORED = Meta(description="Accepted and without effect.", extra={"support": "ignored"})


def neutral(*values: object) -> Meta:
    """Mark a parameter that is not supported yet: only null and `values` are accepted."""
    allowed = ", ".join(msgspec.json.encode(value).decode() for value in (None, *values))
    return Meta(
        description=f"Not supported yet. Accepted values, which change nothing: {allowed}.",
        extra={"support": "neutral", "neutral": values},
    )


def _described(text: str) -> Meta:
    return Meta(description=text)


class TextPart(msgspec.Struct, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """A piece of text in a message's content."""

    text: str


class Message(msgspec.Struct, forbid_unknown_fields=True):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str | list[TextPart] | None, _described("Text, or a list of text parts.")] = None
    name: Annotated[str | None, _described("Handed to the chat template.")] = None
    tool_calls: Annotated[list[Json] | None, neutral([])] = None
    function_call: Annotated[Json, neutral()] = None
    audio: Annotated[Json, neutral()] = None
    refusal: Annotated[str | None, neutral("")] = None
    annotations: Annotated[list[Json] | None, IGNORED] = None


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    """What a stream reports besides text."""

    include_usage: Annotated[bool | None, _described("One more event with the usage, before the end.")] = None
    continuous_usage_stats: Annotated[bool | None, _described("The usage so far in every event.")] = None
    include_obfuscation: Annotated[bool | None, neutral(False)] = None


class GenerationBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The parameters that chat and completions share."""

    model: Annotated[str | None, _described("Name of the served model; the only one when absent.")] = None
    temperature: options.Temperature | None = None
    top_p: options.TopP | None = None
    top_k: options.TopK | None = None
    min_p: options.MinP | None = None
    typical_p: options.TypicalP | None = None
    repetition_penalty: options.RepetitionPenalty | None = None
    frequency_penalty: options.FrequencyPenalty | None = None
    presence_penalty: options.PresencePenalty | None = None
    logit_bias: options.LogitBias | None = None
    bad_words: options.BadWords | None = None
    allowed_token_ids: options.AllowedTokenIds | None = None
    min_tokens: options.MinTokens | None = None
    n: options.NumChoices | None = None
    seed: options.Seed | None = None
    stop: options.StopString | options.StopStrings | None = None
    stop_token_ids: options.StopTokenIds | None = None
    ignore_eos: Annotated[bool | None, _described("Go on after the end token.")] = None
    include_stop_str_in_output: Annotated[bool | None, _described("Leave the stop string or token in the text.")] = None
    skip_special_tokens: Annotated[
        bool | None, _described("Leave control tokens out of the text; true by default.")
    ] = None
    prompt_logprobs: options.NumPromptLogprobs | None = None
    stream: Annotated[bool | None, _described("Answer by server-sent events.")] = None
    stream_options: StreamOptions | None = None
    priority: options.Priority | None = None
    cache_salt: options.CacheSalt | None = None
    deadline_ms: options.DeadlineMs | None = None
    return_token_ids: Annotated[bool | None, _described("Report prompt and generated token ids.")] = None
    request_id: Annotated[
        Annotated[str, Meta(pattern="^[\\x21-\\x7e]{1,128}$")] | None,
        _described("Names the request in the answer, its headers and the log."),
    ] = None

    response_format: Annotated[Json, neutral({"type": "text"})] = None
    structured_outputs: Annotated[Json, neutral()] = None
    guided_json: Annotated[Json, neutral()] = None
    guided_regex: Annotated[Json, neutral()] = None
    guided_choice: Annotated[Json, neutral()] = None
    guided_grammar: Annotated[Json, neutral()] = None
    regex: Annotated[Json, neutral()] = None
    truncate_prompt_tokens: Annotated[int | None, neutral()] = None

    user: Annotated[Json, IGNORED] = None
    metadata: Annotated[Json, IGNORED] = None
    store: Annotated[Json, IGNORED] = None
    service_tier: Annotated[Json, IGNORED] = None
    safety_identifier: Annotated[Json, IGNORED] = None
    prompt_cache_key: Annotated[Json, IGNORED] = None
    prompt_cache_retention: Annotated[Json, IGNORED] = None


class ChatBody(GenerationBody, kw_only=True):
    """The body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Meta(min_length=1, max_length=4096, description="The conversation so far.")]
    max_tokens: options.MaxTokens | None = None
    max_completion_tokens: options.MaxTokens | None = None
    logprobs: Annotated[bool | None, _described("Report the log-probability of each token.")] = None
    top_logprobs: options.NumLogprobs | None = None
    add_generation_prompt: Annotated[bool | None, _described("Begin the assistant's turn; true by default.")] = None
    chat_template_kwargs: Annotated[dict[str, Json] | None, _described("More variables for the chat template.")] = None

    tools: Annotated[list[Json] | None, neutral([])] = None
    tool_choice: Annotated[Json, neutral("none", "auto")] = None
    parallel_tool_calls: Annotated[bool | None, IGNORED] = None
    functions: Annotated[list[Json] | None, neutral([])] = None
    function_call: Annotated[Json, neutral("none", "auto")] = None
    reasoning_effort: Annotated[str | None, neutral()] = None
    verbosity: Annotated[str | None, neutral()] = None
    modalities: Annotated[list[Json] | None, neutral(["text"])] = None
    audio: Annotated[Json, neutral()] = None
    prediction: Annotated[Json, neutral()] = None
    web_search_options: Annotated[Json, neutral()] = None
    chat_template: Annotated[str | None, neutral()] = None
    continue_final_message: Annotated[bool | None, neutral(False)] = None


PromptItem = str | int | list[options.TokenId]


class CompletionBody(GenerationBody, kw_only=True):
    """The body of `POST /v1/completions`."""

    prompt: Annotated[
        str | Annotated[list[PromptItem], Meta(min_length=1, max_length=2**20)],
        _described("A text, a list of texts, a list of token ids, or a list of lists of token ids."),
    ]
    max_tokens: options.MaxTokensOrZero | None = None
    logprobs: options.NumLogprobs | None = None
    echo: Annotated[bool | None, _described("Begin the answer with the prompt, its log-probabilities included.")] = None
    best_of: Annotated[int, Meta(ge=1, description="Only as many as `n`, which changes nothing.")] | None = None
    suffix: Annotated[str | None, neutral("")] = None
