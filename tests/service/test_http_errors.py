"""Errors of the HTTP frontend: every one in OpenAI's shape, none a 422, none a traceback."""

from __future__ import annotations

import inspect
from typing import Any

import httpx
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmserve import errors
from llmserve.errors import LLMServeError
from llmserve.server.http.errors import ERROR_TABLE
from llmserve.server.http.schemas import ChatBody, CompletionBody
from llmserve.server.http.support import _neutral_fields
from tests.service.scripted import MAX_MODEL_LEN, TOKENIZER, Server, ids_of, says


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error


def test_table_is_total() -> None:
    tree = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, LLMServeError)]
    assert not [cls for cls in tree if cls not in ERROR_TABLE]
    assert all(kind.status != 422 for kind in ERROR_TABLE.values())


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"min_p": 2}, "min_p"),
        ({"top_k": -2}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"max_tokens": MAX_MODEL_LEN}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop_token_ids": [-1]}, "stop_token_ids[0]"),
        ({"top_logprobs": 1}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ({"frequency_penalty": 2.1}, "frequency_penalty"),
        ({"presence_penalty": -2.1}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"typical_p": 1.1}, "typical_p"),
        ({"logit_bias": {"5": "much"}}, "logit_bias[...]"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"word": 1}}, "logit_bias"),
        ({"logit_bias": {str(10**6): 1}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "logit_bias"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens"),
        ({"min_tokens": MAX_MODEL_LEN}, "min_tokens"),
        ({"bad_words": [""]}, "bad_words[0]"),
        ({"bad_words": ["a", " "]}, "bad_words[1]"),
        ({"bad_words": "a"}, "bad_words"),
        ({"bad_words": ["a"] * 129}, "bad_words"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids[0]"),
        ({"allowed_token_ids": [10**6]}, "allowed_token_ids"),
        ({"allowed_token_ids": [TOKENIZER.eos_id], "min_tokens": 1}, "allowed_token_ids"),
        ({"allowed_token_ids": ids_of("a"), "bad_words": ["a"]}, "allowed_token_ids"),
        ({"tools": [{}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"priority": True}, "priority"),
        ({"temprature": 1}, "temprature"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}, "messages[0].tool_calls"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "messages"),
        ({"chat_template_kwargs": {"messages": 1}}, "chat_template_kwargs"),
        ({"request_id": "a b"}, "request_id"),
    ],
)
def test_bad_chat_parameters_are_named(body: dict[str, object], param: str) -> None:
    assert error_of(Server(says("a")).chat(**body), 400)["param"] == param


@pytest.mark.parametrize(
    ("prompt", "param"),
    [([], "prompt"), ([1, "a"], "prompt"), ([[]], "prompt"), ([[1], 2], "prompt"), ([10**6], "prompt"), ({}, "prompt")],
)
def test_bad_prompts_are_named(prompt: object, param: str) -> None:
    assert error_of(Server(says("a")).complete(prompt=prompt), 400)["param"] == param


def test_prompt_beyond_the_context_tells_both_numbers() -> None:
    error = error_of(Server(says("a")).complete(prompt=[5] * 600), 400)
    assert error["code"] == "context_length_exceeded"
    assert "600" in error["message"]
    assert str(MAX_MODEL_LEN) in error["message"]


@pytest.mark.parametrize("struct", [ChatBody, CompletionBody])
def test_neutral_values_are_accepted_and_others_refused(struct: type[msgspec.Struct]) -> None:
    server = Server(says("a"))
    send = server.chat if struct is ChatBody else server.complete
    for name, values in _neutral_fields(struct):
        for value in (None, *values):
            assert send(**{name: value}).status_code == 200, (name, value)
        for other in (17, "other", [{"x": 1}], {"other": 1}):
            assert error_of(send(**{name: other}), 400)["param"] == name


@pytest.mark.parametrize("struct", [ChatBody, CompletionBody])
def test_null_is_accepted_for_every_optional_parameter(struct: type[msgspec.Struct]) -> None:
    names = [name for name in struct.__struct_fields__ if name not in ("messages", "prompt")]
    server = Server(says("a"))
    send = server.chat if struct is ChatBody else server.complete
    assert send(**dict.fromkeys(names)).status_code == 200


def test_harmless_extras_are_ignored() -> None:
    extras = {"user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "prompt_cache_key": "k"}
    assert Server(says("a")).chat(**extras).status_code == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b'{"messages":' + b"[" * 10**5, b'{"prompt": "\\ud800"}'])
def test_bodies_that_are_no_request(body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        error_of(Server(says("a")).post(path, body), 400)


def test_deep_nesting_in_a_free_field() -> None:
    body = b'{"messages":[{"role":"user","content":"a"}],"metadata":' + b"[" * 10**5 + b"]" * 10**5 + b"}"
    error_of(Server(says("a")).post("/v1/chat/completions", body), 400)


def test_location_of_json_errors() -> None:
    assert "byte" in error_of(Server(says("a")).post("/v1/completions", b'{"prompt": x}'), 400)["message"]


def test_body_too_large() -> None:
    server = Server(says("a"), max_body_bytes=100)
    error_of(server.complete(prompt="x" * 200), 413)


def test_unknown_model() -> None:
    assert error_of(Server(says("a")).chat(model="gpt-4"), 404)["code"] == "model_not_found"


def test_unknown_route_and_method() -> None:
    server = Server(says("a"))
    error_of(server.get("/v1/nothing"), 404)
    response = server.get("/v1/completions")
    error_of(response, 405)
    assert response.headers["allow"] == "POST"


def test_not_ready_while_loading() -> None:
    server = Server(says("a"))
    body = {"prompt": "x"}

    async def act(http: httpx.AsyncClient) -> httpx.Response:
        return await http.post("/v1/completions", json=body)

    response = server.run(act, start=False)
    assert error_of(response, 503)["code"] == "not_ready"
    assert response.headers["retry-after"] == "1"


def test_request_ids() -> None:
    server = Server(says("a"))

    async def act(http: httpx.AsyncClient) -> list[httpx.Response]:
        bodies = [{"prompt": "x"}, {"prompt": "x", "request_id": "mine"}]
        return [await http.post("/v1/completions", json=body, headers={"x-request-id": "outer"}) for body in bodies]

    outer, mine = server.run(act)
    assert (outer.headers["x-request-id"], outer.json()["id"]) == ("outer", "cmpl-outer")
    assert (mine.headers["x-request-id"], mine.json()["id"]) == ("mine", "cmpl-mine")
    assert server.get("/nothing").headers["x-request-id"]


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)


def _bodies(struct: type[msgspec.Struct]) -> st.SearchStrategy[Any]:
    names = st.sampled_from(struct.__struct_fields__)
    valid = {"messages": [{"role": "user", "content": "a"}]} if struct is ChatBody else {"prompt": "a"}
    return (
        _JSON | st.dictionaries(names, _JSON, max_size=4) | st.dictionaries(names, _JSON, max_size=3).map(valid.__or__)
    )


@settings(max_examples=150, deadline=None)
@given(chat=_bodies(ChatBody), completion=_bodies(CompletionBody))
def test_no_body_makes_a_5xx(chat: object, completion: object) -> None:
    server = Server(says("a"))
    for path, body in (("/v1/chat/completions", chat), ("/v1/completions", completion)):
        response = server.post(path, body)
        assert response.status_code in (200, 400, 404), response.text


@settings(max_examples=100, deadline=None)
@given(body=st.binary(max_size=64))
def test_no_bytes_make_a_5xx(body: bytes) -> None:
    assert Server(says("a")).post("/v1/completions", body).status_code in (200, 400, 404)
