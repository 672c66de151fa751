"""`/v1/chat/completions` from bytes to bytes, over a scripted engine."""

from __future__ import annotations

import pytest

from llmserve.errors import EngineDied
from llmserve.types import Output
from tests.service.scripted import TOKENIZER, Server, events, ids_of, says, speak


def test_whole_answer() -> None:
    server = Server(says("hello wörld"))
    body = server.chat(model="made-model").json()
    choice = body["choices"][0]
    assert choice["message"] == {"content": "hello wörld", "role": "assistant", "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"] is None
    assert body["object"] == "chat.completion"
    num_prompt = len(server.client.requests[0].prompt_token_ids)
    num_answer = len(ids_of("hello wörld")) + 1
    assert body["usage"] == {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_answer,
        "total_tokens": num_prompt + num_answer,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_prompt_is_the_rendered_template() -> None:
    server = Server(says("x"))
    messages = [
        {"role": "developer", "content": "be"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
    ]
    server.chat(messages=messages, chat_template_kwargs={"suffix": "!"})
    rendered = TOKENIZER.decode(server.client.requests[0].prompt_token_ids, skip_special=False)
    expected = "<|im_start|>system\nbe<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\n!"
    assert rendered == expected


def test_without_generation_prompt() -> None:
    server = Server(says("x"))
    server.chat(add_generation_prompt=False)
    assert TOKENIZER.decode(server.client.requests[0].prompt_token_ids, skip_special=True).endswith("hi\n")


def test_stream_contract() -> None:
    response = Server(says("hé!")).chat(stream=True, stream_options={"include_usage": True})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage, done = events(response)
    assert done == "[DONE]"
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(ids_of("hé!")) + 1
    assert all(chunk["usage"] is None for chunk in chunks)
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    middle = [chunk["choices"][0] for chunk in chunks[1:-1]]
    assert all(choice["delta"]["content"] for choice in middle), "no event without text"
    assert all(choice["finish_reason"] is None and choice["logprobs"] is None for choice in middle)
    assert "".join(choice["delta"]["content"] for choice in middle) == "hé!"
    assert chunks[-1]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert len({chunk["id"] for chunk in (*chunks, usage)}) == 1


def test_no_usage_unless_asked() -> None:
    assert all("usage" not in chunk for chunk in events(Server(says("ab")).chat(stream=True))[:-1])


def test_continuous_usage() -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(Server(says("abc")).chat(stream=True, stream_options=options))[1:-1]
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [1, 2, 3, 4, 4]


def test_n_choices_have_derived_seeds() -> None:
    server = Server(says("abc"))
    body = server.chat(n=3, seed=2**63 - 1).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2]
    requests = server.client.requests
    assert [request.sampling.seed for request in requests] == [2**63 - 1, 2**63, 2**63 + 1]
    assert [request.parent_id for request in requests] == [None, *[requests[0].request_id] * 2]
    assert body["usage"]["completion_tokens"] == 12


def test_n_streams_carry_their_index() -> None:
    chunks = events(Server(says("abc")).chat(n=2, stream=True))[:-1]
    for index in (0, 1):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert own[0]["delta"]["role"] == "assistant"
        assert "".join(choice["delta"].get("content", "") for choice in own) == "abc"
        assert own[-1]["finish_reason"] == "stop"


def test_stop_string_ends_and_aborts() -> None:
    server = Server(says("hello END more"))
    choice = server.chat(stop=" END").json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"], choice["stop_reason"]) == ("hello", "stop", " END")
    assert server.client.aborted == [server.client.requests[0].request_id]


@pytest.mark.parametrize("stream", [False, True])
def test_stop_string_of_one_of_many_ends_only_that_one(stream: bool) -> None:
    server = Server(lambda r: speak(r, ids_of("a END b" if r.sampling.seed == 0 else "abcdefghij")))
    response = server.chat(stop=["END"], n=2, seed=0, stream=stream)
    assert len(server.client.aborted) == 1
    assert server.client.num_open == 0
    if not stream:
        assert [c["message"]["content"] for c in response.json()["choices"]] == ["a ", "abcdefghij"]


def test_stop_string_stays_when_asked() -> None:
    choice = Server(says("a END b")).chat(stop=["END"], include_stop_str_in_output=True).json()["choices"][0]
    assert choice["message"]["content"] == "a END"


def test_stop_token_and_ignore_eos() -> None:
    comma = ids_of(",")[0]
    server = Server(says("a,b"))
    choice = server.chat(stop_token_ids=[comma]).json()["choices"][0]
    assert (choice["message"]["content"], choice["stop_reason"]) == ("a", comma)
    server.chat(ignore_eos=True)
    assert server.client.requests[0].sampling.stop_token_ids == tuple(sorted({comma, *TOKENIZER.eog_ids}))
    assert server.client.requests[1].sampling.stop_token_ids == ()


def test_special_tokens_shown_when_asked() -> None:
    choice = Server(lambda r: speak(r, [0, *ids_of("a")])).chat(skip_special_tokens=False).json()["choices"][0]
    assert choice["message"]["content"] == "<|im_start|>a"


def test_logprobs() -> None:
    content = Server(says("é")).chat(logprobs=True, top_logprobs=2).json()["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [list("é".encode()), list(b"<|im_end|>")]
    assert content[0]["token"] == "é"
    assert content[0]["logprob"] == -0.5
    assert [top["logprob"] for top in content[0]["top_logprobs"]] == [-0.5, -1.5]


def test_streamed_logprobs_travel_with_their_text() -> None:
    snowman = "☃"  # three tokens of one byte each
    chunks = events(Server(says(snowman + "a")).chat(stream=True, logprobs=True))[1:-1]
    counts = [len((c["choices"][0]["logprobs"] or {"content": []})["content"]) for c in chunks]
    texts = [c["choices"][0]["delta"].get("content", "") for c in chunks]
    assert texts == [snowman, "a", ""]
    assert counts == [3, 1, 1]


def test_stop_strings_do_not_leak_through_logprobs() -> None:
    body = Server(says("ab#!c")).chat(stop="#!", logprobs=True).json()
    assert [entry["token"] for entry in body["choices"][0]["logprobs"]["content"]] == ["a", "b"]
    assert body["usage"]["completion_tokens"] == 4


def test_prompt_logprobs_and_token_ids() -> None:
    server = Server(says("a"))
    body = server.chat(prompt_logprobs=1, return_token_ids=True).json()
    prompt = server.client.requests[0].prompt_token_ids
    assert body["prompt_token_ids"] == prompt
    assert body["choices"][0]["token_ids"] == [*ids_of("a"), TOKENIZER.eos_id]
    assert body["prompt_logprobs"][0] is None
    assert len(body["prompt_logprobs"]) == len(prompt)
    assert body["prompt_logprobs"][1][str(prompt[1])]["rank"] == 1


def test_streamed_prompt_logprobs_and_token_ids() -> None:
    chunks = events(Server(says("a")).chat(prompt_logprobs=0, return_token_ids=True, stream=True))[:-1]
    assert chunks[0]["prompt_token_ids"]
    assert sum("prompt_logprobs" in chunk for chunk in chunks) == 1
    assert [i for c in chunks[1:] for i in c["choices"][0]["token_ids"]] == [*ids_of("a"), TOKENIZER.eos_id]


def test_sampling_parameters_reach_the_engine() -> None:
    server = Server(says("a"))
    server.chat(temperature=0.5, top_p=0.9, top_k=-1, min_p=0.1, seed=-1, max_completion_tokens=7)
    sampling = server.client.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.min_p) == (0.5, 0.9, 0, 0.1)
    assert (sampling.seed, sampling.max_tokens) == (2**64 - 1, 7)


def test_max_tokens_defaults_to_the_rest_of_the_context() -> None:
    server = Server(says("a"))
    server.chat()
    request = server.client.requests[0]
    assert request.sampling.max_tokens == 512 - len(request.prompt_token_ids)


def test_engine_failure_before_the_first_byte_is_a_status() -> None:
    response = Server(lambda r: [EngineDied("the engine died")]).chat(stream=True)
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_died"


def test_engine_failure_mid_stream_is_an_error_event() -> None:
    first = Output(request_id="", token_ids=tuple(ids_of("a")))
    failed = Output(request_id="", finish_reason="error", error="it broke")
    *_, last = events(Server(lambda r: [first, failed]).chat(stream=True))
    assert last == {"error": {"message": "it broke", "type": "server_error", "param": None, "code": "engine_fault"}}


def test_stream_that_ends_without_reason_is_an_error() -> None:
    first = Output(request_id="", token_ids=tuple(ids_of("a")))
    assert "error" in events(Server(lambda r: [first]).chat(stream=True))[-1]
    assert Server(lambda r: [first]).chat(n=2).status_code == 500


def test_deadline_is_408() -> None:
    late = Output(request_id="", finish_reason="deadline")
    assert Server(lambda r: [late]).chat().status_code == 408


def test_internal_error_tells_nothing() -> None:
    response = Server(lambda r: [ValueError("secret")]).chat()
    assert response.status_code == 500
    assert "secret" not in response.text
    assert response.headers["x-request-id"] in response.text
