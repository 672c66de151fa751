"""openai-python against the real model: what users do first."""

from __future__ import annotations

import math
from collections.abc import Iterator

import openai
import pytest

from tests.e2e.real_server import RealServer

pytestmark = pytest.mark.model
_FRANCE = "The capital of France is"


@pytest.fixture
def client(served: RealServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="smollm2", messages=[{"role": "user", "content": "What is the capital of France?"}], temperature=0
    )
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_stream_is_the_whole_answer(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(
        model="smollm2", messages=[{"role": "user", "content": "Name three colours."}], temperature=0, max_tokens=40
    )
    stream = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "Name three colours."}],
        temperature=0,
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    usage = chunks[-1].usage
    assert usage is not None
    assert whole.usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, whole.usage.completion_tokens)
    assert usage.prompt_tokens_details is not None
    assert (usage.prompt_tokens_details.cached_tokens or 0) >= 16, "the second request finds the first one's blocks"
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == whole.choices[0].finish_reason


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="smollm2", prompt=_FRANCE, max_tokens=4, temperature=0)
    assert answer.choices[0].text.startswith(" Paris")
    assert answer.choices[0].finish_reason == "length"


def test_logprobs_of_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": "Hello"}],
        temperature=0,
        max_tokens=8,
        logprobs=True,
        top_logprobs=3,
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert "".join(entry.token for entry in logprobs.content).startswith(answer.choices[0].message.content or "")
    for entry in logprobs.content:
        assert entry.logprob <= 0
        assert entry.top_logprobs[0].token == entry.token, "greedy takes the likeliest"
        assert math.fsum(math.exp(top.logprob) for top in entry.top_logprobs) <= 1.001


def test_echoed_prompt_has_logprobs(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="smollm2", prompt=_FRANCE + " Paris", max_tokens=0, echo=True, logprobs=1, temperature=0
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert answer.choices[0].text == _FRANCE + " Paris"
    assert logprobs.token_logprobs[-1] > -1.0, "the model knows this"


def test_seed_repeats_and_choices_differ(client: openai.OpenAI) -> None:
    first, second = (
        client.completions.create(model="smollm2", prompt="Once upon a time", max_tokens=12, n=2, seed=7, temperature=1)
        for _ in range(2)
    )
    assert [choice.text for choice in first.choices] == [choice.text for choice in second.choices]
    assert first.choices[0].text != first.choices[1].text


def test_errors_are_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="nosuch"):
        client.completions.create(model="nosuch", prompt="x")
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="smollm2", prompt="x", suffix="y")
    assert refused.value.param == "suffix"
    with pytest.raises(openai.BadRequestError) as too_long:
        client.completions.create(model="smollm2", prompt="word " * 9000)
    assert too_long.value.code == "context_length_exceeded"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["smollm2"]
    assert client.models.retrieve("smollm2").id == "smollm2"
