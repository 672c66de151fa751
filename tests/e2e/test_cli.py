"""The commands as a user types them, but for `serve`: real processes, a real terminal, the real model."""

from __future__ import annotations

import json
import re
import socket
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from llmserve import __version__
from tests.e2e.real_server import LLMSERVE, ROOT, RealServer, default_model

COMMANDS = ("serve", "chat", "generate", "pull", "doctor", "bench")


def run(*args: str, stdin: str = "", timeout_s: float = 60) -> subprocess.CompletedProcess[str]:
    """Run `llmserve` to its end."""
    return subprocess.run(
        [*LLMSERVE, *args], cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=timeout_s, check=False
    )


@pytest.fixture(scope="module")
def model() -> str:
    """The real model's path."""
    return str(default_model())


def test_version() -> None:
    assert run("--version").stdout == f"llmserve {__version__}\n"


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command: str) -> None:
    result = run(command, "--help")
    assert result.returncode == 0
    assert f"llmserve {command} " in result.stdout.split("Examples:")[1]


def test_help_lists_all_commands() -> None:
    result = run("--help")
    assert result.returncode == 0
    assert all(re.search(rf"^\W*{command}\s", result.stdout, re.MULTILINE) for command in COMMANDS)


BAD_INPUT = {
    "no such file": (["serve", "./missing.gguf"], "no such file"),
    "no such name": (["serve", "smolm2"], "did you mean smollm2"),
    "other scheme": (["serve", "s3://a/b"], "s3://"),
    "file to fetch without its hash": (["serve", "https://h/m.gguf"], "#sha256=HEX"),
    "choice where there is none": (["pull", "smollm2", "--file", "x"], "--file"),
    "no model": (["serve"], "MODEL"),
    "no such command": (["frobnicate"], "frobnicate"),
    "no such option": (["serve", "x", "--nope"], "--nope"),
    "port out of range": (["serve", "x", "--port", "99999"], "--port"),
    "no number": (["chat", "x", "--temperature", "hot"], "--temperature"),
    "two sources of prompts": (["generate", "x", "a", "--file", "b"], "--file"),
    "no prompt": (["generate", "x"], "PROMPT"),
    "no template": (["serve", "x", "--chat-template", "missing.jinja"], "missing.jinja"),
}


def assert_one_line(result: subprocess.CompletedProcess[str], part: str, *, code: int = 2) -> None:
    """The command failed with one line about `part`, and nothing on stdout."""
    lines = [line for line in result.stderr.splitlines() if not line.startswith("packing weights")]
    assert result.returncode == code, result.stderr
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("llmserve: ")
    assert part in lines[0]
    assert result.stdout == ""


@pytest.mark.parametrize(("args", "part"), BAD_INPUT.values(), ids=BAD_INPUT.keys())
def test_bad_input_is_one_line(args: Sequence[str], part: str) -> None:
    assert_one_line(run(*args), part)


@pytest.mark.parametrize("content", [b"", b"hello, I am no model", b"GGUF\x03\x00\x00\x00garbage"])
def test_file_that_is_no_model(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    assert_one_line(run("serve", str(path), "--port", "0"), "bad.gguf")


@pytest.mark.model
@pytest.mark.parametrize(
    ("args", "part"),
    [
        (["--kv-cache-memory", "banana"], "banana"),
        (["--kv-cache-memory", "1KiB"], "KV cache"),
        (["--max-model-len", "999999"], "8192"),
        (["--max-num-seqs", "600"], "max_num_batched_tokens"),
        (["--host", "no.such.host.invalid"], "no.such.host.invalid"),
    ],
)
def test_bad_options_of_a_good_model(model: str, args: Sequence[str], part: str) -> None:
    assert_one_line(run("serve", model, "--port", "0", *args), part)


@pytest.mark.model
def test_broken_template(model: str, tmp_path: Path) -> None:
    (tmp_path / "bad.jinja").write_text("{% for m in messages %}{{ m.content }}")
    assert_one_line(run("serve", model, "--port", "0", "--chat-template", str(tmp_path / "bad.jinja")), "template")


@pytest.mark.model
def test_port_in_use(model: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert_one_line(run("serve", model, "--port", port), f"port {port}")


def test_unreachable_server_is_a_fault() -> None:
    assert_one_line(run("chat", "http://127.0.0.1:9", "--prompt", "x"), "cannot be reached", code=1)


@pytest.mark.model
def test_pull_prints_the_path_alone(model: str) -> None:
    assert run("pull", model).stdout == f"{model}\n"


@pytest.mark.model
def test_chat_prompt_prints_the_answer_alone(model: str) -> None:
    result = run("chat", model, "--prompt", "What is the capital of France?", "--temperature", "0")
    assert result.returncode == 0
    assert "Paris" in result.stdout
    assert "tok/s" in result.stderr


@pytest.mark.model
def test_chat_with_a_server_is_as_with_the_model(model: str, served: RealServer) -> None:
    args = ("--prompt", "Name a fruit.", "--system", "Be brief.", "--temperature", "0", "--max-tokens", "12")
    here, there = run("chat", model, *args), run("chat", served.url, *args)
    assert here.returncode == there.returncode == 0, here.stderr + there.stderr
    assert here.stdout == there.stdout


@pytest.mark.model
def test_chat_reads_a_pipe_line_by_line(served: RealServer) -> None:
    lines = "My name is Alice.\nWhat is my name?\n/reset\n/nonsense\n/exit\nnever sent\n"
    result = run("chat", served.url, "--temperature", "0", "--max-tokens", "16", stdin=lines)
    assert result.returncode == 0
    assert result.stderr.count("tok/s") == 2
    assert "no such command" in result.stderr


@pytest.mark.model
def test_chat_longer_than_the_context_is_refused(model: str) -> None:
    result = run("chat", model, "--max-model-len", "64", "--prompt", "word " * 100)
    assert_one_line(result, "the context holds 64")


@pytest.mark.model
def test_generate_one(model: str) -> None:
    args = ("--max-tokens", "4", "--temperature", "0")
    assert run("generate", model, "The capital of France is", *args).stdout.startswith(" Paris")
    piped = run("generate", model, "-", "--json", *args, stdin="The capital of France is")
    line = json.loads(piped.stdout)
    assert line["text"].startswith(" Paris")
    assert (line["index"], line["finish_reason"], line["completion_tokens"]) == (0, "length", 4)


@pytest.mark.model
def test_generate_many_keeps_the_order_and_goes_on_after_errors(model: str, tmp_path: Path) -> None:
    prompts = [json.dumps({"prompt": f"{number} plus one is", "id": f"p{number}"}) for number in range(40)]
    prompts[7] = json.dumps("word " * 9000)
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts) + "\n\n")
    result = run("generate", model, "--file", str(tmp_path / "prompts.jsonl"), "--max-tokens", "3")
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["index"] for line in lines] == list(range(40))
    assert lines[3]["id"] == "p3"
    assert "8192" in lines[7]["error"]
    assert sum("error" in line for line in lines) == 1
    assert result.returncode == 1
    assert "1 failed" in result.stderr


@pytest.mark.model
def test_output_to_a_reader_that_leaves(model: str) -> None:
    command = [*LLMSERVE, "generate", model, "Once upon a time", "--max-tokens", "400", "--ignore-eos"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.read(1)
        process.stdout.close()
        assert process.wait(30) == 1
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()


@pytest.mark.model
def test_doctor(model: str) -> None:
    result = run("doctor", model)
    assert result.returncode == 0, result.stdout
    for topic in (
        "instructions",
        "memory",
        "extension",
        "torch",
        "packed weights  in memory",
        "KV cache",
        "limited by",
        "to change it",
        "first step",
    ):
        assert topic in result.stdout


@pytest.mark.model
@pytest.mark.parametrize(
    ("args", "texts"),
    [
        (["--kv-cache-memory", "64MiB"], ["--kv-cache-memory (64 MiB)", "shortened", "takes up to"]),
        (["--max-num-seqs", "2", "--max-model-len", "512"], ["2 sequences of 512 tokens", "raise --max-num-seqs"]),
    ],
    ids=["as told", "sequences"],
)
def test_doctor_explains_the_memory(model: str, args: list[str], texts: list[str]) -> None:
    result = run("doctor", model, *args)
    assert result.returncode == 0, result.stdout
    for text in texts:
        assert text in result.stdout


def test_doctor_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMSERVE_CPU_ISA", "sse9")
    result = run("doctor")
    assert result.returncode == 1
    assert "unset it" in result.stdout
