"""An engine whose cached blocks move to the host: what is generated, what counts as cached, what is refused."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmserve.cli.options import engine_config
from llmserve.config import EngineConfig
from llmserve.engine import loader
from llmserve.engine.loader import load_engine
from llmserve.errors import InvalidRequest, OutOfMemory
from tests.engine.test_engine import (
    assert_nothing_held,
    expected_tokens,
    make_engine,
    make_request,
    run,
    tokens_of,
)
from tests.ops.seeds import fresh_seed

CONFIG = EngineConfig(model_path=Path("no such model"), device="cuda", host_kv_cache_bytes=1 << 20)


def test_a_prompt_that_returns_finds_on_the_host_what_the_device_lost() -> None:
    prompt, others = list(range(40, 57)), [[number] * 30 for number in range(3)]
    cached = {}
    for num_host_blocks in (0, 32):
        engine, executor = make_engine(num_blocks=10, num_host_blocks=num_host_blocks)
        for index, text in enumerate([prompt, *others, prompt]):
            engine.submit(make_request(f"r{index}", text, max_tokens=3))
            outputs = run(engine)[f"r{index}"]
            assert tokens_of(outputs) == expected_tokens(text, 3)
        cached[num_host_blocks] = outputs[0].num_cached_tokens
        assert engine.stats().num_host_cache_hits == outputs[0].num_cached_tokens
        assert_nothing_held(engine, executor)
    assert cached == {0: 0, 32: 16}


@pytest.mark.parametrize("num_host_blocks", [1, 4, 50])
def test_what_is_generated_does_not_depend_on_where_blocks_were(num_host_blocks: int) -> None:
    seed = fresh_seed()
    choose = random.Random(seed)
    engine, executor = make_engine(num_blocks=20, num_host_blocks=num_host_blocks)
    heads = [choose.choices(range(90), k=choose.randint(4, 30)) for _ in range(6)]
    for turn in range(12):
        prompts = {
            f"{turn}.{index}": [*choose.choice(heads), *choose.choices(range(90), k=choose.randint(1, 6))]
            for index in range(choose.randint(1, 6))
        }
        for name, prompt in prompts.items():
            engine.submit(make_request(name, prompt, max_tokens=5))
        first = [output for _ in range(choose.randint(0, 4)) for output in engine.step()]
        aborted = choose.sample(sorted(prompts), k=choose.randint(0, 1))
        engine.abort(aborted)
        outputs = run(engine)
        for name in prompts.keys() - {*aborted}:
            found = [output for output in first if output.request_id == name] + outputs.get(name, [])
            assert tokens_of(found) == expected_tokens(prompts[name], 5), f"seed {seed}"
    assert executor.num_moved["to_host"] > 0
    assert executor.num_moved["to_device"] > 0 or num_host_blocks == 1
    assert_nothing_held(engine, executor)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"device": "cpu"}, "in host memory already"),
        ({"device": "reference"}, "in host memory already"),
        ({"enable_prefix_cache": False}, "the prefix cache is off"),
    ],
)
def test_a_host_cache_that_nothing_would_use_is_refused(change: dict[str, Any], part: str) -> None:
    with pytest.raises(InvalidRequest, match=f"^host_kv_cache_bytes: .*{part}"):
        load_engine(replace(CONFIG, **change), progress=lambda *_: None)


def test_a_host_cache_larger_than_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "available_bytes", lambda: (1 << 20) - 1)
    with pytest.raises(OutOfMemory, match=f"{1 << 20} bytes does not fit"):
        load_engine(CONFIG, progress=lambda *_: None)


def test_the_command_line_takes_a_size() -> None:
    assert engine_config(Path("m"), device="cuda", host_kv_cache="16GiB").host_kv_cache_bytes == 16 << 30
    assert engine_config(Path("m")).host_kv_cache_bytes == 0
    with pytest.raises(InvalidRequest, match="--host-kv-cache"):
        engine_config(Path("m"), host_kv_cache="much")
