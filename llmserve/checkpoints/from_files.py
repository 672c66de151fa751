"""Models that are single files of a web server, or files of this machine, into the store.

    views/file+FILE.gguf/SHA256/FILE.gguf    one GGUF file
    views/file+FOLDER/SHA256/…               a folder; its version is the hash of the names and hashes of its files

Invariant: a file of this machine is copied, never linked: what its owner writes to it later is not in the store.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

from llmserve.checkpoints import selection
from llmserve.checkpoints.selection import Selection
from llmserve.checkpoints.sources import FileSource, UrlSource
from llmserve.checkpoints.store import Progress, Store, StoredFile, StoredVersion, safe_relative
from llmserve.errors import CheckpointError, InvalidRequest, ModelNotFound


def find_url_in_store(store: Store, source: UrlSource) -> Path | None:
    """The file with the hash of `source`, if it was pulled under its name."""
    return store.find(f"file+{source.file}", source.sha256)


def fetch_url(store: Store, source: UrlSource, progress: Progress) -> Path:
    """Fetch one file, return its path in the store."""
    # Here, since httpx takes a while to import and a model that is in the store does without.
    import httpx

    from llmserve.checkpoints import download

    def explain(response: httpx.Response) -> CheckpointError | ModelNotFound:
        missing = response.status_code in (httpx.codes.NOT_FOUND, httpx.codes.GONE)
        kind = ModelNotFound if missing else CheckpointError
        return kind(f"{source.public_url}: {response.url.host} answered {response.status_code}")

    name = safe_relative(source.file)
    with download.open_client() as client:
        remote = download.RemoteFile(url=source.url, name=source.public_url, sha256=source.sha256)
        file = download.fetch(
            client, remote, store, explain=explain, on_position=lambda done, total: progress("download", done, total)
        )
    stored = StoredVersion(source=source.public_url, entry=name, files={name: file}, url=source.public_url)
    return store.add_version(f"file+{name}", file.sha256, stored)


def copy_files(store: Store, source: FileSource, file: str, progress: Progress) -> Path:
    """Copy a GGUF file or a folder's model into the store, unless it is there as it is now; the path to open."""
    if not source.path.exists():
        raise ModelNotFound(f"{source.path}: no such file or folder")
    root, chosen = _choose(source, file)
    model = f"file+{safe_relative(source.path.name)}"
    reference = _state(root, chosen)
    found = store.find_reference(model, reference)
    if found is not None and source.sha256 in ("", found.parent.name):
        return found
    total = sum((root / name).stat().st_size for name in chosen.names)
    store.check_space(total)
    done, files = 0, {}

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        progress("copy", done, total)

    for name in chosen.names:
        try:
            with (root / name).open("rb") as stream:
                files[name] = store.add_blob(stream, on_bytes, sha256=source.sha256)
        except CheckpointError as error:
            raise CheckpointError(f"{root / name}: {error}") from error
    stored = StoredVersion(source=f"file://{source.path}", entry=chosen.entry, files=files)
    return store.add_version(model, _version(files), stored, [reference])


def _choose(source: FileSource, file: str) -> tuple[Path, Selection]:
    if source.path.is_dir():
        if source.sha256:
            raise InvalidRequest(f"{source.path}: a sha256 is of one file, this is a folder")
        sizes = {path.name: path.stat().st_size for path in source.path.iterdir() if path.is_file()}
        return source.path, selection.select(f"file://{source.path}", sizes, file)
    if file or source.path.suffix.lower() != ".gguf":
        raise InvalidRequest(f"{source.path}: name a GGUF file or a folder; --file chooses in a folder")
    return source.path.parent, Selection(source.path.name, (source.path.name,))


def _state(root: Path, chosen: Selection) -> str:
    """Changes whenever somebody writes to one of the files: reading them all at each start would take long."""
    digest = hashlib.blake2b(f"{root.resolve()}\n{chosen.entry}\n".encode(), digest_size=20)
    for name in chosen.names:
        stat = (root / name).stat()
        digest.update(f"{name} {stat.st_ino} {stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}\n".encode())
    return digest.hexdigest()


def _version(files: Mapping[str, StoredFile]) -> str:
    if len(files) == 1:
        return next(iter(files.values())).sha256
    listed = "".join(f"{file.sha256}  {name}\n" for name, file in sorted(files.items()))
    return hashlib.sha256(listed.encode()).hexdigest()
