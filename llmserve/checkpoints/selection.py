"""Which files of a repository or folder are taken. Owns the allow-list; opens no file.

A model is either a folder (`config.json` with safetensors at the top, and what a tokenizer needs) or one GGUF file.
Invariants: no pickle and no code is ever taken; every name that is taken is a plain relative path.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from llmserve.checkpoints.store import safe_relative
from llmserve.errors import CheckpointError, ModelNotFound

_COMPANIONS: Final = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|chat_template|vocab)\.json"
    r"|model\.safetensors\.index\.json|merges\.txt|vocab\.txt|.+\.jinja"
    r"|tokenizer\.model(\.v\d+)?|spiece\.model|sentencepiece\.bpe\.model"
)
"""What goes with weights: configuration, tokenizer, chat templates."""
_NOTICES: Final = re.compile(r"(LICEN[CS]E|NOTICE|README)(\.(md|txt))?", re.IGNORECASE | re.ASCII)
_PICKLES: Final = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_SHARD: Final = re.compile(r"model(-\d+-of-\d+)?\.safetensors")
_SPLIT_GGUF: Final = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_NO_LANGUAGE_MODEL: Final = re.compile(r"(mmproj|imatrix)", re.IGNORECASE)
_MAX_LISTED: Final = 30


@dataclass(frozen=True, slots=True)
class Selection:
    """Names to take, and the one to open ("" for the folder)."""

    entry: str
    names: tuple[str, ...]


def select(where: str, sizes: Mapping[str, int], file: str) -> Selection:
    """Choose among the files of `where`, whose sizes are given. `file` is a GGUF file's name or a pattern; or empty.

    Raises `ModelNotFound` for a choice that fits no file or several, `CheckpointError` where there is no model, or one
    whose files cannot be taken.
    """
    notices = [name for name in sizes if "/" not in name and _NOTICES.fullmatch(name)]
    ggufs = sorted(name for name in sizes if name.lower().endswith(".gguf"))
    if file:
        return _one_gguf(_matching(where, ggufs, sizes, file), notices)
    weights = _weights(sizes)
    if weights and "config.json" in sizes:
        companions = [name for name in sizes if _COMPANIONS.fullmatch(name)]
        return Selection("", tuple(map(safe_relative, [*companions, *weights, *notices])))
    candidates = [name for name in ggufs if not _NO_LANGUAGE_MODEL.match(PurePosixPath(name).name)]
    if len(candidates) > 1:
        raise ModelNotFound(
            f"{where} holds {len(candidates)} GGUF files, choose one ({where}/FILE.gguf, or `llmserve pull --file "
            f"PATTERN`): {_listed(candidates, sizes)}"
        )
    if not candidates:
        raise CheckpointError(_describe_nothing(where, sizes))
    return _one_gguf(candidates[0], notices)


def _weights(names: Iterable[str]) -> list[str]:
    """Safetensors at the top; those of other formats (`consolidated`) only where there are no others."""
    found = sorted(name for name in names if name.endswith(".safetensors") and "/" not in name)
    return [name for name in found if _SHARD.fullmatch(name)] or found


def _matching(where: str, ggufs: list[str], sizes: Mapping[str, int], file: str) -> str:
    if file in ggufs:
        return file
    wanted = file.lower()
    found = [
        name
        for name in ggufs
        if fnmatch.fnmatchcase(name.lower(), wanted) or fnmatch.fnmatchcase(PurePosixPath(name).name.lower(), wanted)
    ]
    if len(found) == 1:
        return found[0]
    which = f"{len(found)} GGUF files fit {file!r}" if found else f"no GGUF file is called {file!r}"
    others = _listed(found or ggufs, sizes)
    raise ModelNotFound(f"{where}: {which}" + (f"; it holds: {others}" if others else ""))


def _one_gguf(name: str, notices: list[str]) -> Selection:
    if _SPLIT_GGUF.search(name):
        raise CheckpointError(f"{name}: models split over several GGUF files are not supported yet")
    return Selection(safe_relative(name), (*map(safe_relative, notices), name))


def _listed(names: list[str], sizes: Mapping[str, int]) -> str:
    listed = [f"{name} ({sizes[name] / (1 << 20):.0f} MiB)" for name in names[:_MAX_LISTED]]
    more = [f"and {len(names) - _MAX_LISTED} more"] if len(names) > _MAX_LISTED else []
    return ", ".join(listed + more)


def _describe_nothing(where: str, names: Iterable[str]) -> str:
    pickles = sorted(name for name in names if name.lower().endswith(_PICKLES))
    if pickles:
        return (
            f"{where} holds pickled weights alone ({pickles[0]}); they can run code when they are opened and are never "
            "taken: look for the model in safetensors or GGUF"
        )
    return f"{where} holds no .gguf file and no config.json with safetensors"
