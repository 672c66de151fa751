"""One file over HTTP into the store: resumed, retried, hashed on the way. Knows nothing of hubs.

    partial/<key>        the bytes so far
    partial/<key>.json   which state of the file they belong to (its validator)

A process that is killed leaves these two, and the next one goes on from there. Invariants: bytes of two states of a
file are never mixed (`If-Range`, or a hash that is known beforehand); what does not have the promised size and hash is
removed and never becomes a blob; no byte comes over a connection that others can change.
"""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import logging
import random
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Final, TypeVar

import httpx
import msgspec

from llmserve.checkpoints.sources import is_trusted_transport
from llmserve.checkpoints.store import Store, StoredFile
from llmserve.errors import CheckpointError, LLMServeError

_CHUNK_BYTES: Final = 1 << 20
_TIMEOUT: Final = httpx.Timeout(60.0, connect=15.0)
_MAX_FRUITLESS: Final = 5
"""Attempts in a row that brought no byte further."""
_BACKOFF_S: Final = 0.5
_MAX_BACKOFF_S: Final = 30.0
_MAX_RETRY_AFTER_S: Final = 300.0
_RETRIED: Final = frozenset({408, 429, 500, 502, 503, 504})
_CONTENT_RANGE: Final = re.compile(r"bytes (\d+)-\d+/(\d+|\*)")

_T = TypeVar("_T")

_log = logging.getLogger(__name__)

Explain = Callable[[httpx.Response], LLMServeError]
"""The error for an answer that is neither the file nor worth another attempt."""


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file to fetch. What is not known beforehand is None."""

    url: str
    name: str
    """What messages call it."""
    num_bytes: int | None = None
    sha256: str | None = None
    git_blob: str | None = None
    """The SHA-1 by which git knows the content."""
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def key(self) -> str:
        """Names its partial download."""
        return self.sha256 or hashlib.sha256(self.url.encode()).hexdigest()


class _Validator(msgspec.Struct):
    """What a server calls a state of a file; empty where it cannot tell states apart."""

    url: str = ""
    if_range: str = ""


class _CannotResume(Exception):
    """The server's answer does not continue the bytes that are there."""


class _Interrupted(Exception):
    """An attempt ended early; `retry_after_s` is the server's wish."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


def open_client() -> httpx.Client:
    """A client that follows redirects, to trusted transports alone, and identifies itself.

    Headers of authorization are not sent on to another host. Proxies and certificates are those of the environment.
    """
    return httpx.Client(
        follow_redirects=True,
        timeout=_TIMEOUT,
        headers={"User-Agent": "llmserve", "Accept-Encoding": "identity"},
        event_hooks={"request": [_check_transport]},
    )


def get(client: httpx.Client, url: str, headers: Mapping[str, str], *, explain: Explain, prefix: str) -> httpx.Response:
    """A small answer, with the same retries as a file. Raises `explain`'s error, `CheckpointError`.

    `prefix` begins the message of one that could not be had.
    """

    def attempt() -> httpx.Response:
        with _connection_errors():
            response = client.get(url, headers=dict(headers))
        if response.status_code in _RETRIED:
            raise _interruption(response)
        if response.status_code != httpx.codes.OK:
            raise explain(response)
        return response

    return _retrying(attempt, prefix, lambda: 0)


def fetch(
    client: httpx.Client, file: RemoteFile, store: Store, *, explain: Explain, on_position: Callable[[int, int], None]
) -> StoredFile:
    """Bring a file into the store. `on_position(done, total)` is told its bytes; total 0 while unknown.

    Raises `CheckpointError` for what cannot be fetched or is not what was promised, and `explain`'s errors.
    """
    with store.lock(f"download {file.key}", lambda: on_position(0, file.num_bytes or 0)):
        stored = store.find_blob(file.sha256, file.num_bytes) if file.sha256 is not None else None
        if stored is None:
            return _Transfer(client, file, store, explain, on_position).run()
    on_position(stored.num_bytes, stored.num_bytes)
    return stored


def shown(url: str) -> str:
    """A URL as messages have it: a query may hold a secret."""
    return url.partition("?")[0]


class _Transfer:
    """One file on its way, over any number of connections."""

    def __init__(
        self,
        client: httpx.Client,
        file: RemoteFile,
        store: Store,
        explain: Explain,
        on_position: Callable[[int, int], None],
    ) -> None:
        self._client = client
        self._file = file
        self._store = store
        self._explain = explain
        self._on_position = on_position
        self._path = store.partial(file.key)
        self._validator_path = self._path.with_suffix(".json")
        self._digest = hashlib.sha256()
        self._position = 0
        self._furthest = 0

    def run(self) -> StoredFile:
        try:
            with self._path.open("ab+") as out:
                self._read_partial(out)
                _retrying(lambda: self._attempt(out), f"{self._file.name}: ", lambda: self._furthest)
        except BaseException:
            if self._position == 0:
                self._remove()
            raise
        stored = StoredFile(self._digest.hexdigest(), self._position)
        self._verify(stored)
        self._store.publish(self._path, stored)
        self._on_position(stored.num_bytes, stored.num_bytes)
        self._validator_path.unlink(missing_ok=True)
        return stored

    def _read_partial(self, out: IO[bytes]) -> None:
        """Hash what an earlier process left, if it can be continued."""
        if not self._can_resume():
            self._restart(out)
            return
        out.seek(0)
        while chunk := out.read(_CHUNK_BYTES):
            self._digest.update(chunk)
            self._position += len(chunk)
        self._furthest = self._position

    def _is_complete(self) -> bool:
        return self._position == self._file.num_bytes or self._digest.hexdigest() == self._file.sha256

    def _can_resume(self) -> bool:
        return self._file.sha256 is not None or bool(self._validator().if_range)

    def _validator(self) -> _Validator:
        try:
            validator = msgspec.json.decode(self._validator_path.read_bytes(), type=_Validator)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            return _Validator()
        return validator if validator.url == shown(self._file.url) else _Validator()

    def _restart(self, out: IO[bytes]) -> None:
        out.seek(0)
        out.truncate()
        self._digest, self._position = hashlib.sha256(), 0

    def _attempt(self, out: IO[bytes]) -> None:
        if self._position and not self._can_resume():
            self._restart(out)
        if self._position and self._is_complete():
            return  # an earlier process was killed between the last byte and the renaming
        try:
            self._stream(out)
        except _CannotResume as error:
            self._restart(out)
            raise _Interrupted(str(error), 0.0) from error
        finally:
            out.flush()

    def _stream(self, out: IO[bytes]) -> None:
        headers = dict(self._file.headers)
        if self._position:
            headers["Range"] = f"bytes={self._position}-"
            if validator := self._validator().if_range:
                headers["If-Range"] = validator
        with _connection_errors(), self._client.stream("GET", self._file.url, headers=headers) as response:
            total = self._begin(response, out)
            self._on_position(self._position, total)
            # As they come: chunks of a given size would be held back until they are full, and lost with the connection.
            for chunk in response.iter_bytes():
                out.write(chunk)
                self._digest.update(chunk)
                self._position += len(chunk)
                self._furthest = max(self._furthest, self._position)
                if self._file.num_bytes is not None and self._position > self._file.num_bytes:
                    raise self._wrong(f"the server sends more than the {self._file.num_bytes} bytes that it announced")
                self._on_position(self._position, max(total, self._position) if total else 0)

    def _begin(self, response: httpx.Response, out: IO[bytes]) -> int:
        """Decide by the head of the answer where its bytes go; the file's size, 0 if unknown."""
        if response.status_code in _RETRIED:
            raise _interruption(response)
        if response.status_code == httpx.codes.REQUESTED_RANGE_NOT_SATISFIABLE and self._position:
            raise _CannotResume("the file is shorter than what is there of it")
        if response.status_code == httpx.codes.PARTIAL_CONTENT and self._position:
            match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if match is None or int(match[1]) != self._position or _is_encoded(response):
                raise _CannotResume("the server sent another range than the one asked for")
            return int(match[2]) if match[2] != "*" else self._file.num_bytes or 0
        if response.status_code != httpx.codes.OK:
            raise self._explain(response)
        self._restart(out)
        self._remember(response)
        length = response.headers.get("Content-Length", "")
        size = int(length) if length.isdecimal() and not _is_encoded(response) else self._file.num_bytes or 0
        if self._file.num_bytes is None:
            self._store.check_space(size)
        return size

    def _remember(self, response: httpx.Response) -> None:
        """Keep a strong validator: a weak one says nothing about bytes."""
        etag, modified = response.headers.get("ETag", ""), response.headers.get("Last-Modified", "")
        if_range = etag if etag.startswith('"') else "" if etag else modified
        validator = _Validator(shown(self._file.url), "" if _is_encoded(response) else if_range)
        self._validator_path.write_bytes(msgspec.json.encode(validator))

    def _verify(self, stored: StoredFile) -> None:
        wanted = self._file
        if wanted.num_bytes is not None and stored.num_bytes != wanted.num_bytes:
            raise self._wrong(f"{stored.num_bytes} bytes came, {wanted.num_bytes} were announced")
        if wanted.sha256 is not None and stored.sha256 != wanted.sha256:
            raise self._wrong(f"its sha256 is {stored.sha256}, it should be {wanted.sha256}")
        if wanted.git_blob is not None and (blob := _git_blob(self._path)) != wanted.git_blob:
            raise self._wrong(f"its git blob is {blob}, it should be {wanted.git_blob}")

    def _wrong(self, message: str) -> CheckpointError:
        self._remove()
        return CheckpointError(f"{self._file.name}: {message}; what came was removed")

    def _remove(self) -> None:
        self._path.unlink(missing_ok=True)
        self._validator_path.unlink(missing_ok=True)


def _retrying(attempt: Callable[[], _T], prefix: str, furthest: Callable[[], int]) -> _T:
    """Attempt again after what may pass, with longer and longer pauses while no attempt gets further."""
    fruitless, reached = 0, furthest()
    while True:
        try:
            return attempt()
        except _Interrupted as error:
            fruitless = 1 if furthest() > reached else fruitless + 1
            reached = max(reached, furthest())
            if fruitless >= _MAX_FRUITLESS:
                resumed = "; what came is kept, the next pull goes on from there" if reached else ""
                raise CheckpointError(f"{prefix}{error} ({fruitless} attempts){resumed}") from error
            pause_s = error.retry_after_s
            if pause_s is None:
                pause_s = min(_BACKOFF_S * 2 ** (fruitless - 1), _MAX_BACKOFF_S) * random.uniform(0.75, 1.25)
            if pause_s > _MAX_RETRY_AFTER_S:
                raise CheckpointError(f"{prefix}{error}; the server asks to wait for {pause_s:.0f} s") from error
            _log.info("%s%s, attempting again in %.1f s", prefix, error, pause_s)
            time.sleep(pause_s)


def _interruption(response: httpx.Response) -> _Interrupted:
    retry_after_s = _retry_after_s(response.headers.get("Retry-After", ""))
    return _Interrupted(f"{response.url.host} answered {response.status_code}", retry_after_s)


def _retry_after_s(value: str) -> float | None:
    """Seconds, or a date; None where the server does not say."""
    if value.strip().isdecimal():
        return float(value)
    try:
        until_s = email.utils.parsedate_to_datetime(value).timestamp()
    except ValueError:
        return None
    return max(0.0, until_s - time.time())


@contextlib.contextmanager
def _connection_errors() -> Iterator[None]:
    """What goes wrong on the way → `_Interrupted`, or `CheckpointError` where another attempt cannot help."""
    try:
        yield
    except httpx.TransportError as error:
        host = error.request.url.host
        reason = str(error) or type(error).__name__
        if isinstance(error, httpx.UnsupportedProtocol | httpx.ProxyError):
            raise CheckpointError(f"{host} cannot be reached: {reason}") from error
        what = "cannot be reached" if isinstance(error, httpx.ConnectError) else "broke off"
        raise _Interrupted(f"{host} {what}: {reason}") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise CheckpointError(f"the server's answer cannot be used: {error}") from error


def _check_transport(request: httpx.Request) -> None:
    if not is_trusted_transport(str(request.url)):
        where = f"{request.url.scheme}://{request.url.host}"
        raise CheckpointError(f"{where}: plain http is accepted from this machine alone; use https")


def _is_encoded(response: httpx.Response) -> bool:
    return bool(response.headers.get("Content-Encoding", "identity") != "identity")


def _git_blob(path: Path) -> str:
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def check_space(store: Store, files: Iterable[RemoteFile]) -> None:
    """Raise `CheckpointError` if what is still to come of `files` would not fit."""
    missing = 0
    for file in files:
        if file.sha256 is None or store.find_blob(file.sha256, file.num_bytes) is None:
            partial = store.partial(file.key)
            missing += max(0, (file.num_bytes or 0) - (partial.stat().st_size if partial.exists() else 0))
    store.check_space(missing)
