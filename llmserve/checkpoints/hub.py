"""Repositories of a Hugging Face hub, over its HTTP API: what a revision holds, and why a hub refuses.

    GET /api/models/ORG/NAME/revision/REVISION?blobs=true   commit, names, sizes; sha256 of large files, git's
                                                             SHA-1 of others
    GET /ORG/NAME/resolve/COMMIT/FILE                       the bytes, mostly by way of another host

`HF_ENDPOINT` names another hub than huggingface.co, `HF_TOKEN` is sent to the hub alone. Invariant: files are asked for
by commit, so that a branch that moves meanwhile cannot mix two states.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final
from urllib.parse import quote

import httpx
import msgspec

from llmserve.checkpoints import download
from llmserve.checkpoints.download import RemoteFile
from llmserve.checkpoints.sources import HubSource, is_trusted_transport
from llmserve.errors import CheckpointError, LLMServeError, ModelNotFound

_DEFAULT_ENDPOINT: Final = "https://huggingface.co"
_COMMIT: Final = re.compile(r"[0-9a-f]{40}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_BAD_TOKEN: Final = "Invalid credentials in Authorization header"


class _LargeFile(msgspec.Struct):
    sha256: str
    size: int


class _Sibling(msgspec.Struct):
    rfilename: str
    size: int | None = None
    blobId: str | None = None
    lfs: _LargeFile | None = None


class _Answer(msgspec.Struct):
    sha: str
    siblings: list[_Sibling]


@dataclass(frozen=True, slots=True)
class Repository:
    """One commit of a repository and all its files."""

    url: str
    """What a file's name is appended to."""
    commit: str
    files: Mapping[str, RemoteFile]

    @property
    def sizes(self) -> dict[str, int]:
        return {name: file.num_bytes or 0 for name, file in self.files.items()}


class Hub:
    """A hub and how to speak to it. Raises `CheckpointError` for an endpoint or a token that cannot be used."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client
        self.endpoint = (os.environ.get("HF_ENDPOINT") or _DEFAULT_ENDPOINT).rstrip("/")
        if not is_trusted_transport(self.endpoint):
            raise CheckpointError(f"HF_ENDPOINT={self.endpoint}: write https://HOST; http is for this machine alone")
        token = os.environ.get("HF_TOKEN", "").strip()
        if not token.isascii() or not token.isprintable():
            raise CheckpointError("HF_TOKEN holds characters that a token cannot have")
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def repository(self, source: HubSource) -> Repository:
        """The commit that a revision stands for now, and its files."""
        url = f"{self.endpoint}/api/models/{source.repository}/revision/{quote(source.revision, safe='')}?blobs=true"
        prefix = _no_path(source) or f"{source.repository}: "
        response = download.get(self._client, url, self._headers, explain=self.explain(source), prefix=prefix)
        try:
            answer = msgspec.json.decode(response.content, type=_Answer)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{self.endpoint} answered what no hub answers: {error}") from error
        if _COMMIT.fullmatch(answer.sha) is None:
            raise CheckpointError(f"{self.endpoint} answered {answer.sha[:60]!r} as the commit of {source.repository}")
        base = f"{self.endpoint}/{source.repository}/resolve/{answer.sha}/"
        files = {sibling.rfilename: self._file(source, base, sibling) for sibling in answer.siblings}
        return Repository(base, answer.sha, files)

    def explain(self, source: HubSource) -> download.Explain:
        """Says what a person can do about an answer that refuses `source`."""
        page = f"{self.endpoint}/{source.repository}"

        def error(response: httpx.Response) -> LLMServeError:
            code = response.headers.get("X-Error-Code", "")
            message = response.headers.get("X-Error-Message", "")
            status = response.status_code
            if response.url.netloc != httpx.URL(self.endpoint).netloc:
                return CheckpointError(f"{source.repository}: {response.url.host} answered {status}")
            if code == "GatedRepo":
                return CheckpointError(f"{source.repository} is gated: accept its terms at {page}, {self._and_token()}")
            if code == "RevisionNotFound":
                return ModelNotFound(f"{source.repository} has no revision {source.revision!r} (see {page})")
            if code == "EntryNotFound":
                return ModelNotFound(f"{source.repository} has no such file: {response.url.path}")
            if self._headers and status == httpx.codes.UNAUTHORIZED and (message == _BAD_TOKEN or not code):
                return CheckpointError(f"{self.endpoint} does not accept the token in HF_TOKEN: set a valid one")
            if code == "RepoNotFound" or status in (httpx.codes.UNAUTHORIZED, httpx.codes.NOT_FOUND):
                return ModelNotFound(self._describe_missing(source))
            if status == httpx.codes.FORBIDDEN:
                reason = f": {message}" if message else ""
                return CheckpointError(f"{page} may not be read{reason}; {self._and_token()}")
            return CheckpointError(f"{source.repository}: {self.endpoint} answered {status} {message}".rstrip())

        return error

    def _file(self, source: HubSource, base: str, sibling: _Sibling) -> RemoteFile:
        name, large = sibling.rfilename, sibling.lfs
        if large is not None and _SHA256.fullmatch(large.sha256) is None:
            raise CheckpointError(f"{source.repository}/{name}: the hub's sha256 {large.sha256[:80]!r} is none")
        return RemoteFile(
            url=base + quote(name),
            name=f"{source.repository}/{name}",
            num_bytes=large.size if large is not None else sibling.size,
            sha256=large.sha256 if large is not None else None,
            git_blob=sibling.blobId if large is None else None,  # of a large file it is the pointer's
            headers=self._headers,
        )

    def _and_token(self) -> str:
        if self._headers:
            return "with the account of the token in HF_TOKEN, which must be allowed to read it"
        return f"then set HF_TOKEN to a token of your account (see {self.endpoint}/settings/tokens)"

    def _describe_missing(self, source: HubSource) -> str:
        private = "the account of HF_TOKEN cannot see it" if self._headers else "it is private: then set HF_TOKEN"
        return f"{_no_path(source)}{self.endpoint} has no repository {source.repository}, or {private}"


def _no_path(source: HubSource) -> str:
    """Begins the message about a name that may have been meant as a path."""
    return f"{source.repository}: no such file or folder, and " if source.bare else ""
