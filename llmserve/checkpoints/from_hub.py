"""Models out of repositories of a hub, into the store.

    views/ORG--NAME/COMMIT/…               a folder of safetensors
    views/ORG--NAME/COMMIT--FILE.gguf/…    a GGUF file of it

Invariant: a reference (a branch, perhaps with a file) stands for the commit that it was pulled at, until it is pulled
again; a commit stands for itself.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final
from urllib.parse import quote

from llmserve.checkpoints.sources import HubSource
from llmserve.checkpoints.store import Progress, Store, StoredFile, StoredVersion

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")


def find_in_store(store: Store, source: HubSource, *, pinned: bool = False) -> Path | None:
    """What was pulled as `source`; with `pinned` only what cannot have changed since."""
    if pinned and _COMMIT.fullmatch(source.revision) is None:
        return None
    return store.find_reference(_folder(source), _reference(source.revision, source.file))


def fetch_repository(store: Store, source: HubSource, progress: Progress) -> Path:
    """Fetch what `source` stands for now, return the path to open."""
    # Here, since httpx takes a while to import and a model that is in the store does without.
    from llmserve.checkpoints import download, selection
    from llmserve.checkpoints.hub import Hub

    with download.open_client() as client:
        hub = Hub(client)
        repository = hub.repository(source)
        chosen = selection.select(f"hf://{source.repository}", repository.sizes, source.file)
        wanted = [repository.files[name] for name in chosen.names]
        download.check_space(store, wanted)
        total, before = sum(file.num_bytes or 0 for file in wanted), 0
        files: dict[str, StoredFile] = {}
        for name, file in zip(chosen.names, wanted, strict=True):

            def on_position(done: int, _size: int, before: int = before) -> None:
                progress("download", before + done, max(total, before + done))

            files[name] = download.fetch(client, file, store, explain=hub.explain(source), on_position=on_position)
            before += files[name].num_bytes
    commit, entry = repository.commit, chosen.entry
    version = f"{commit}--{quote(entry, safe='')}" if entry else commit
    stored = StoredVersion(
        source=f"hf://{source.repository}@{commit}" + (f"/{entry}" if entry else ""),
        entry=entry,
        files=files,
        url=repository.url,
        commit=commit,
    )
    references = {_reference(revision, file) for revision in (source.revision, commit) for file in (source.file, entry)}
    return store.add_version(_folder(source), version, stored, sorted(references))


def _folder(source: HubSource) -> str:
    return source.repository.replace("/", "--")


def _reference(revision: str, file: str) -> str:
    return f"{revision}/{file}" if file else revision
