"""What reaches the engine of each sampling parameter, from a request or from the checkpoint's generation config."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from llmserve.service.model import ModelText
from llmserve.service.sampling import GenerationDefaults
from llmserve.types import SamplingParams
from tests.service import scripted
from tests.service.scripted import TOKENIZER, Server, ids_of, says


def sampling_of(server: Server | None = None, **body: Any) -> SamplingParams:
    """The sampling parameters that a chat request gives its sequence."""
    server = server or Server(says("a"))
    response = server.chat(**body)
    assert response.status_code == 200, response.text
    completion = server.complete(**body)
    assert completion.status_code == 200, completion.text
    chat, other = (request.sampling for request in server.client.requests[-2:])
    names = set(SamplingParams.__struct_fields__) - {"seed", "max_tokens"}
    assert {name: getattr(chat, name) for name in names} == {name: getattr(other, name) for name in names}
    return chat


def test_nothing_is_on_by_default() -> None:
    expected = SamplingParams()
    neutral: list[dict[str, Any]] = [{}, {"repetition_penalty": None, "bad_words": [], "logit_bias": {}}]
    for asked in neutral:
        found = sampling_of(None, **asked)
        for name in (
            "repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias", "min_tokens", "bad_words",
            "allowed_token_ids", "typical_p",
        ):  # fmt: skip
            assert getattr(found, name) == getattr(expected, name), name


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("repetition_penalty", 1.25, 1.25),
        ("frequency_penalty", -0.5, -0.5),
        ("presence_penalty", 2, 2.0),
        ("typical_p", 0.5, 0.5),
        ("typical_p", 0, 1e-9),
        ("min_tokens", 3, 3),
        ("allowed_token_ids", [7, 5], (7, 5)),
        ("logit_bias", {"5": 2.5, "7": -1000, "8": 1000}, ((5, 2.5), (7, -100.0), (8, 100.0))),
    ],
)
def test_a_parameter_reaches_the_engine(name: str, value: object, expected: object) -> None:
    assert getattr(sampling_of(None, **{name: value}), name) == expected


def test_bad_words_are_written_with_and_without_a_space() -> None:
    for asked in (["hello"], [" hello"], ["hello", " hello"]):
        assert set(sampling_of(bad_words=asked).bad_words) == {tuple(ids_of("hello")), tuple(ids_of(" hello"))}


def test_bad_words_are_no_control_tokens() -> None:
    (bare, spaced) = sampling_of(bad_words=["<|im_end|>"]).bad_words
    assert TOKENIZER.eos_id not in (*bare, *spaced)


def test_each_choice_gets_the_same() -> None:
    server = Server(says("a"))
    server.chat(n=3, logit_bias={"5": 1}, bad_words=["hello"], repetition_penalty=1.5)
    first, *others = [request.sampling for request in server.client.requests]
    assert len(others) == 2
    for other in others:
        assert (other.logit_bias, other.bad_words, other.repetition_penalty) == (
            first.logit_bias, first.bad_words, first.repetition_penalty,
        )  # fmt: skip


def with_defaults(config: dict[str, Any]) -> Server:
    text: ModelText = replace(scripted.TEXT, defaults=GenerationDefaults.from_config(config))
    server = Server(says("a"))
    server.model._load_text = lambda: text
    return server


def test_defaults_of_the_checkpoint_are_honoured_and_a_request_overrides_them() -> None:
    config = {"repetition_penalty": 1.1, "typical_p": 0.9, "temperature": 0.6}
    found = sampling_of(with_defaults(config))
    assert (found.repetition_penalty, found.typical_p, found.temperature) == (1.1, 0.9, 0.6)
    found = sampling_of(with_defaults(config), repetition_penalty=1, typical_p=1)
    assert (found.repetition_penalty, found.typical_p, found.temperature) == (1.0, 1.0, 0.6)


@pytest.mark.parametrize("value", [0, -1, "1.1", True, float("nan"), None])
def test_defaults_of_the_checkpoint_that_make_no_sense_are_left_out(value: object) -> None:
    assert GenerationDefaults.from_config({"repetition_penalty": value}).repetition_penalty == 1.0
