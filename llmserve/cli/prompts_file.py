"""What `llmserve generate` is given: one prompt, or a file with one JSON line for each."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from llmserve.errors import InvalidRequest


@dataclass(frozen=True, slots=True)
class NumberedPrompt:
    """A prompt, its place in the input, and the name its author gave it."""

    index: int
    text: str
    id: str | int | None = None


def read_prompts(file: Path) -> list[NumberedPrompt]:
    """Read JSON lines: a string, or an object with `prompt` and perhaps `id`. `-` is stdin; blank lines are skipped.

    Raises `InvalidRequest` that names the line.
    """
    try:
        lines = sys.stdin.readlines() if str(file) == "-" else file.read_text("utf-8").splitlines()
    except OSError as error:
        raise InvalidRequest(f"--file {file}: {(error.strerror or str(error)).lower()}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"--file {file}: not UTF-8 text") from error
    prompts = list(_parse(lines, file))
    if not prompts:
        raise InvalidRequest(f"--file {file}: there is no prompt in it")
    return prompts


def _parse(lines: list[str], file: Path) -> Iterator[NumberedPrompt]:
    index = 0
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            yield _prompt(index, json.loads(line))
        except ValueError as error:
            raise InvalidRequest(f"--file {file}, line {number}: {error}") from error
        index += 1


def _prompt(index: int, value: object) -> NumberedPrompt:
    """Raises `ValueError`, as `json.loads` does."""
    if isinstance(value, str):
        return NumberedPrompt(index, value)
    if not isinstance(value, dict) or not isinstance(value.get("prompt"), str):
        raise ValueError('expected a string, or an object with the string "prompt"')
    unknown = sorted(value.keys() - {"prompt", "id"})
    if unknown:
        raise ValueError(f"unknown key {unknown[0]!r}; there are: prompt, id")
    name = value.get("id")
    if name is not None and (isinstance(name, bool) or not isinstance(name, (str, int))):
        raise ValueError("id must be a string or an integer")
    return NumberedPrompt(index, value["prompt"], name)
