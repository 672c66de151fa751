"""SmolLM2's tokenizer and template against transformers (`scripts/make_tokenizer_golden.py`), with no transformers."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from llmserve.checkpoints import TextAssets, open_text
from llmserve.errors import LLMServeError
from llmserve.text import Detokenizer, Tokenizer, load_chat_template, load_tokenizer

GOLDEN: dict[str, list[dict[str, Any]]] = json.loads(
    (Path(__file__).parent.parent / "data" / "tokenizer_golden.json").read_text()
)


@pytest.fixture(scope="module")
def assets() -> TextAssets:
    from llmserve.checkpoints import pull

    try:
        given = os.environ.get("LLMSERVE_TEST_MODEL")
        return open_text(Path(given) if given else pull.resolve("smollm2"))
    except (LLMServeError, OSError) as error:
        pytest.skip(f"no SmolLM2 here: {error}")


@pytest.fixture(scope="module")
def tokenizer(assets: TextAssets) -> Tokenizer:
    return load_tokenizer(assets)


@pytest.mark.parametrize("row", GOLDEN["encode"], ids=lambda row: ascii(row["text"])[:40])
def test_encoding(tokenizer: Tokenizer, row: dict[str, Any]) -> None:
    plain = tokenizer.encode(row["text"], add_special=True)
    assert plain == row["plain"]
    assert tokenizer.encode(row["text"], add_special=True, allow_control=True) == row["control"]
    assert tokenizer.decode(plain, skip_special=False) == row["text"]
    assert tokenizer.decode(row["control"], skip_special=False) == row["text"]


@pytest.mark.parametrize("row", GOLDEN["decode"], ids=lambda row: str(len(row["ids"])))
def test_decoding(tokenizer: Tokenizer, row: dict[str, Any]) -> None:
    for skip_special, expected in ((False, row["full"]), (True, row["skipped"])):
        assert tokenizer.decode(row["ids"], skip_special=skip_special) == expected
        stream = Detokenizer(tokenizer, skip_special=skip_special)
        assert "".join([stream.push([i]) for i in row["ids"]]) + stream.finish() == expected


@pytest.mark.parametrize("row", GOLDEN["chat"])
def test_chat(assets: TextAssets, tokenizer: Tokenizer, row: dict[str, Any]) -> None:
    template = load_chat_template(assets, tokenizer)
    assert template is not None
    text = template.render(row["messages"], add_generation_prompt=row["add_generation_prompt"])
    assert text == row["text"]
    assert tokenizer.encode_chat(text) == row["ids"]


def test_end_of_generation_set(tokenizer: Tokenizer) -> None:
    assert tokenizer.eog_ids == {0, 2}
    assert {tokenizer.token_bytes(i) for i in tokenizer.eog_ids} == {b"<|endoftext|>", b"<|im_end|>"}
    assert tokenizer.vocab_size == 49152


def test_loading_is_fast(assets: TextAssets) -> None:
    times_s = []
    for _ in range(3):
        start = time.perf_counter()
        load_tokenizer(assets)
        times_s.append(time.perf_counter() - start)
    assert min(times_s) < 0.25
