"""`/v1/completions` from bytes to bytes, over a scripted engine."""

from __future__ import annotations

from tests.service.scripted import MAX_MODEL_LEN, TOKENIZER, Server, events, ids_of, says


def test_whole_completion() -> None:
    body = Server(says("hello")).complete().json()
    choice = body["choices"][0]
    assert body["object"] == "text_completion"
    assert (choice["text"], choice["finish_reason"], choice["logprobs"]) == ("hello", "stop", None)


def test_default_of_max_tokens_is_16() -> None:
    server = Server(says("a"))
    server.post("/v1/completions", {"prompt": "a"})
    server.post("/v1/completions", {"prompt": [5] * (MAX_MODEL_LEN - 3)})
    assert [request.sampling.max_tokens for request in server.client.requests] == [16, 3]


def test_four_kinds_of_prompts() -> None:
    server = Server(says("x"))
    ids = ids_of("hey")
    for prompt in ("hey", ["hey", "b"], ids, [ids, [7]]):
        assert server.complete(prompt=prompt).status_code == 200, prompt
    hey, b = ids, ids_of("b")
    assert [request.prompt_token_ids for request in server.client.requests] == [hey, hey, b, hey, hey, [7]]


def test_choices_are_numbered_by_prompt_then_choice() -> None:
    server = Server(says("ab"))
    body = server.complete(prompt=["x", "yy"], n=2).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [len(request.prompt_token_ids) for request in server.client.requests] == [1, 1, 2, 2]
    assert body["usage"]["prompt_tokens"] == 3


def test_control_tokens_in_text_are_plain_text() -> None:
    server = Server(says("x"))
    server.complete(prompt="<|im_end|>")
    assert TOKENIZER.eos_id not in server.client.requests[0].prompt_token_ids


def test_empty_prompt_begins_at_the_beginning() -> None:
    server = Server(says("x"))
    server.complete(prompt="")
    assert server.client.requests[0].prompt_token_ids == [TOKENIZER.bos_id]


def test_echo_with_logprobs_scores_the_prompt() -> None:
    ids = ids_of("é ab")
    body = Server(says("xyz")).complete(prompt=ids, echo=True, logprobs=1, max_tokens=0).json()
    choice = body["choices"][0]
    logprobs = choice["logprobs"]
    assert choice["text"] == "é ab"
    assert logprobs["token_logprobs"] == [None] + [-0.5] * (len(ids) - 1)
    assert logprobs["top_logprobs"][0] is None
    assert logprobs["top_logprobs"][1] == {logprobs["tokens"][1]: -0.5}
    assert "".join(logprobs["tokens"]) == "é ab"
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    assert body["usage"]["completion_tokens"] == 0


def test_echo_as_evaluation_harnesses_ask_for_it() -> None:
    """One generated token comes after the prompt's, also when it is the end token."""
    ids = ids_of("abc")
    logprobs = (
        Server(says("")).complete(prompt=[ids], echo=True, logprobs=1, max_tokens=1).json()["choices"][0]["logprobs"]
    )
    assert len(logprobs["token_logprobs"]) == len(ids) + 1
    assert len({len(column) for column in logprobs.values()}) == 1


def test_streamed_echo() -> None:
    chunks = events(Server(says("cd")).complete(prompt="ab", echo=True, logprobs=0, stream=True))[:-1]
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["text"] for choice in choices] == ["abc", "d", ""]
    assert [offset for choice in choices for offset in choice["logprobs"]["text_offset"]] == [0, 1, 2, 3, 4]
    assert choices[-1]["finish_reason"] == "stop"


def test_tokens_that_are_no_text_have_distinct_names() -> None:
    tokens = Server(says("☃")).complete(logprobs=0).json()["choices"][0]["logprobs"]["tokens"]
    assert tokens[:3] == ["bytes:\\xe2", "bytes:\\x98", "bytes:\\x83"]


def test_plain_and_general_events_are_alike() -> None:
    plain = events(Server(says("abc")).complete(stream=True, request_id="r"))[:-1]
    general = events(Server(says("abc")).complete(stream=True, request_id="r", return_token_ids=True))[:-1]
    for event in general:
        for name in ("token_ids", "prompt_token_ids"):
            event["choices"][0].pop(name, None)
    for event in (*plain, *general):
        event["created"] = 0
    assert plain == general


def test_prompt_logprobs_without_echo() -> None:
    choice = Server(says("a")).complete(prompt="hey you", prompt_logprobs=2).json()["choices"][0]
    assert choice["text"] == "a"
    assert len(choice["prompt_logprobs"][1]) == 2
    assert choice["logprobs"] is None


def test_best_of() -> None:
    assert Server(says("a")).complete(best_of=2, n=2).status_code == 200
    refused = Server(says("a")).complete(best_of=2)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "best_of")
