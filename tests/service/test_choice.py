"""An answer does not tell by how many tokens a step yielded."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import msgspec
import pytest

from llmserve.service.choice import Choice
from llmserve.service.options import RequestOptions
from llmserve.types import Output, Request, SamplingParams
from tests.service.scripted import TOKENIZER, ids_of, speak

TEXT = "One two, three. Four STOP five six seven"
ENDS = {"stop string": ("STOP",), "stop token": (), "length": (), "stop string at the end": ("seven",)}


def outputs_of(end: str) -> list[Output]:
    """One output a token."""
    eos_id = TOKENIZER.eos_id
    assert eos_id is not None
    sampling = SamplingParams(max_tokens=100, num_logprobs=1, stop_token_ids=(eos_id,))
    ids = [*ids_of(TEXT), *([eos_id] if end != "length" else [])]
    return list(speak(Request(request_id="a", prompt_token_ids=[1], sampling=sampling), ids))


def grouped(outputs: list[Output], size: int) -> list[Output]:
    """The same with several tokens in an output, as steps with accepted drafts yield them."""
    joined = []
    for part in batches(outputs[1:], size):
        logprobs = tuple(entry for output in part for entry in output.logprobs or ())
        token_ids = tuple(token for output in part for token in output.token_ids)
        joined.append(msgspec.structs.replace(part[-1], token_ids=token_ids, logprobs=logprobs))
    return [outputs[0], *joined]


def batches(outputs: list[Output], size: int) -> list[list[Output]]:
    return [outputs[start : start + size] for start in range(0, len(outputs), size)]


def answer(outputs: list[Output], stop: tuple[str, ...]) -> dict[str, Any]:
    """All that a client gets, and the usage."""
    options = RequestOptions(stop=stop, num_logprobs=1)
    choice = Choice(0, TOKENIZER, options)
    deltas = []
    for output in outputs:
        delta = choice.push(output)
        if delta is not None:
            deltas.append(delta)
        if choice.finished:
            break
    assert choice.finished
    return {
        "text": "".join(delta.text for delta in deltas),
        "token_ids": [token for delta in deltas for token in delta.token_ids],
        "logprobs": [entry for delta in deltas for entry in delta.logprobs or ()],
        "num_tokens": choice.num_tokens,
        "end": asdict(deltas[-1]) | {"text": "", "token_ids": [], "logprobs": []},
    }


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("size", [2, 3, 5, 100])
def test_grouped_tokens_give_the_same_answer(end: str, size: int) -> None:
    outputs = outputs_of(end)
    expected = answer(outputs, ENDS[end])
    assert answer(grouped(outputs, size), ENDS[end]) == expected
    assert (expected["num_tokens"] < len(outputs)) == (end.startswith("stop string"))
