"""Each sampling parameter, seen in the answers of the real model over HTTP."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from tests.e2e.real_server import RealServer

pytestmark = pytest.mark.model
PROMPT = "The capital of France is"
SHORT_CHAT: dict[str, Any] = {
    "messages": [{"role": "user", "content": "What is the capital of France? Answer in one word."}],
    "temperature": 0,
}


def complete(served: RealServer, **body: Any) -> Any:
    """One greedy completion with its token ids."""
    asked = {"prompt": PROMPT, "max_tokens": 24, "temperature": 0, "return_token_ids": True, "ignore_eos": True} | body
    response = httpx.post(f"{served.url}/v1/completions", json=asked, timeout=120)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def chat(served: RealServer, **body: Any) -> Any:
    response = httpx.post(
        f"{served.url}/v1/chat/completions", json=SHORT_CHAT | {"return_token_ids": True} | body, timeout=120
    )
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def num_repeated(ids: list[int]) -> int:
    return len(ids) - len(set(ids))


def test_allowed_token_ids_are_all_there_is(served: RealServer) -> None:
    allowed = complete(served, max_tokens=6)["token_ids"][::2]
    found = complete(served, allowed_token_ids=allowed, temperature=1, seed=5)["token_ids"]
    assert len(found) == 24
    assert set(found) <= set(allowed)


def test_logit_bias_forces_and_forbids(served: RealServer) -> None:
    usual = complete(served, max_tokens=1)["token_ids"][0]
    forced = (usual + 1000) % 49_000
    assert complete(served, max_tokens=5, logit_bias={str(forced): 100})["token_ids"] == [forced] * 5
    assert usual not in complete(served, logit_bias={str(usual): -100})["token_ids"]


def test_min_tokens_puts_off_the_end(served: RealServer) -> None:
    usual = chat(served)
    num_usual = len(usual["token_ids"])
    assert usual["finish_reason"] == "stop"
    longer = chat(served, min_tokens=num_usual + 10, max_tokens=num_usual + 60)
    assert len(longer["token_ids"]) >= num_usual + 10
    assert usual["token_ids"][-1] not in longer["token_ids"][: num_usual + 9]


def test_bad_words_never_appear(served: RealServer) -> None:
    words = [word.strip(".,") for word in complete(served)["text"].split()[:4]]
    assert "Paris" in words
    text = complete(served, bad_words=words, max_tokens=48)["text"]
    assert not set(words) & {word.strip(".,") for word in text.split()}


@pytest.mark.parametrize("name", ["repetition_penalty", "frequency_penalty", "presence_penalty"])
def test_penalties_make_repetition_rarer(served: RealServer, name: str) -> None:
    body = {"prompt": "one two one two one two one two", "max_tokens": 40}
    usual = num_repeated(complete(served, **body)["token_ids"])
    assert usual > 20
    assert num_repeated(complete(served, **body, **{name: 2.0})["token_ids"]) < usual / 2


def test_frequency_and_presence_do_not_count_the_prompt(served: RealServer) -> None:
    first = complete(served, prompt=[7, 7, 7, 7, 7, 7], max_tokens=1)["token_ids"]
    for name in ("frequency_penalty", "presence_penalty"):
        assert complete(served, prompt=[7, 7, 7, 7, 7, 7], max_tokens=1, **{name: 2.0})["token_ids"] == first


def test_typical_p_of_nearly_nothing_leaves_one_token(served: RealServer) -> None:
    answers = [
        complete(served, typical_p=1e-6, temperature=1, seed=seed, max_tokens=6)["token_ids"] for seed in range(3)
    ]
    assert answers[0] == answers[1] == answers[2]
    free = [complete(served, temperature=2, seed=seed, max_tokens=6)["token_ids"] for seed in range(3)]
    assert len({tuple(ids) for ids in free}) > 1


def test_logprobs_stay_raw(served: RealServer) -> None:
    """A forced token is as unlikely as it was."""
    answer = complete(served, max_tokens=1, logit_bias={"4000": 100}, logprobs=1)
    assert answer["token_ids"] == [4000]
    assert answer["logprobs"]["token_logprobs"][0] < -2


def test_parameters_that_leave_no_token_are_an_error_and_not_an_answer(served: RealServer) -> None:
    body = {"prompt": PROMPT, "allowed_token_ids": [260, 281], "logit_bias": {"260": 100}, "min_tokens": 1}
    response = httpx.post(f"{served.url}/v1/completions", json=body | {"stop_token_ids": [260, 281]}, timeout=120)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "allowed_token_ids"
