"""A hub on loopback with the real one's HTTP shape: an API host, and a second host (port) that large files come from.

Real sockets: connections can be cut, answers delayed, headers ignored. Everything asked is in `requests`.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlsplit

Files = Mapping[str, bytes]


@dataclass
class Fault:
    """How one request is answered wrongly. The default is no fault at all."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    cut_after: int | None = None
    stall_after: int | None = None
    """Sends this many bytes, then waits for `HubStub.resume`."""
    ignore_range: bool = False
    no_validator: bool = False
    edit: Callable[[bytes], bytes] | None = None
    content_range: str = ""


@dataclass(frozen=True)
class Request:
    """One that came in, at `api` or `cdn`."""

    host: str
    path: str
    headers: Mapping[str, str]


@dataclass
class Repository:
    """Branches point to commits, commits hold files."""

    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, Files] = field(default_factory=dict)
    token: str = ""
    """Needed to read it, if set."""
    gated: bool = False
    advertised: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Entries of the listing that lie."""

    def commit(self, files: Files, branch: str = "main") -> str:
        sha = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha


class HubStub:
    """Use as a context manager."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.faults: dict[str, deque[Fault]] = defaultdict(deque)
        """By the end of a path, `api` or `cdn` before it: taken one a request."""
        self.requests: list[Request] = []
        self.blobs: dict[str, bytes] = {}
        self.stalled = threading.Event()
        self.resume = threading.Event()
        self._servers = {host: _Server(self, host) for host in ("api", "cdn")}
        self.url = self._servers["api"].url
        self.cdn_url = self._servers["cdn"].url

    def __enter__(self) -> Self:
        for server in self._servers.values():
            threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.resume.set()
        for server in self._servers.values():
            server.shutdown()
            server.server_close()

    def add(self, name: str, files: Files, **options: Any) -> Repository:
        repository = self.repositories[name] = Repository(**options)
        repository.commit(files)
        return repository

    def fail(self, host: str, end: str, *faults: Fault) -> None:
        self.faults[f"{host} {end}"].extend(faults)

    def asked(self, end: str, host: str = "") -> list[Request]:
        return [one for one in self.requests if one.path.endswith(end) and host in ("", one.host)]

    def take_fault(self, host: str, path: str) -> Fault:
        for key, faults in self.faults.items():
            wanted_host, end = key.split(" ")
            if host == wanted_host and path.endswith(end) and faults:
                return faults.popleft()
        return Fault()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, hub: HubStub, host: str) -> None:
        self.hub = hub
        self.host = host
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # clients that leave are part of the tests


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def do_GET(self) -> None:
        hub, parts = self.server.hub, urlsplit(self.path)
        path = unquote(parts.path)
        hub.requests.append(Request(self.server.host, path, dict(self.headers.items())))
        fault = hub.take_fault(self.server.host, path)
        if fault.status:
            self._answer(fault.status, b"{}", {"Content-Type": "application/json", **fault.headers})
        elif self.server.host == "cdn":
            self._file(hub.blobs[path.rpartition("/")[2]], fault)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/([^?]+)", parts.path):
            self._list(match[1], unquote(match[2]), with_blobs="blobs" in parse_qs(parts.query))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", parts.path):
            self._resolve(match[1], match[2], unquote(match[3]), fault)
        else:
            self._file(hub.blobs[path], fault) if path in hub.blobs else self._refuse(404, "EntryNotFound")

    def _may_read(self, name: str, *, content: bool) -> Repository | None:
        """The repository, unless it is refused. What a gated one holds is listed for everybody."""
        repository = self.server.hub.repositories.get(name)
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given == "bad":
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif repository is None or (repository.token and not repository.gated and given != repository.token):
            self._refuse(404 if given else 401, "RepoNotFound", "Repository not found")
        elif content and repository.gated and given != repository.token:
            self._refuse(403 if given else 401, "GatedRepo", "Access to model is restricted")
        else:
            return repository
        return None

    def _list(self, name: str, revision: str, *, with_blobs: bool) -> None:
        repository = self._may_read(name, content=False)
        if repository is None:
            return
        sha = repository.branches.get(revision, revision)
        if sha not in repository.commits:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            return
        siblings = []
        for file, data in repository.commits[sha].items():
            entry: dict[str, Any] = {"rfilename": file}
            if with_blobs:
                entry |= {"size": len(data), "blobId": hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()}
                if is_large(file):
                    digest = hashlib.sha256(data).hexdigest()
                    entry["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 130}
            siblings.append(entry | repository.advertised.get(file, {}))
        answer = {"_id": "1", "id": name, "modelId": name, "sha": sha, "gated": False, "siblings": siblings}
        self._answer(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _resolve(self, name: str, commit: str, file: str, fault: Fault) -> None:
        repository = self._may_read(name, content=True)
        if repository is None:
            return
        data = repository.commits[commit].get(file)
        if data is None:
            self._refuse(404, "EntryNotFound")
        elif is_large(file):
            digest = hashlib.sha256(data).hexdigest()
            self.server.hub.blobs[digest] = data
            linked = {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{digest}"', "X-Repo-Commit": commit}
            self._answer(302, b"", {"Location": f"{self.server.hub.cdn_url}/{digest}?Signature=secret", **linked})
        else:
            self._file(data, fault)

    def _refuse(self, status: int, code: str, message: str = "") -> None:
        self._answer(status, b'{"error": "x"}', {"X-Error-Code": code, "X-Error-Message": message})

    def _file(self, data: bytes, fault: Fault) -> None:
        data = fault.edit(data) if fault.edit is not None else data
        etag = f'"{hashlib.md5(data).hexdigest()}"'
        headers = {} if fault.no_validator else {"ETag": etag}
        status, start = 200, 0
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if wanted and not fault.ignore_range and self.headers.get("If-Range", etag) == etag:
            status, start = 206, int(wanted[1])
            if start >= len(data):
                self._answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
                return
            headers["Content-Range"] = fault.content_range or f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._answer(status, data[start:], {**headers, **fault.headers}, fault)

    def _answer(self, status: int, body: bytes, headers: Mapping[str, str], fault: Fault | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        fault = fault or Fault()
        stop = fault.cut_after if fault.cut_after is not None else fault.stall_after
        self.wfile.write(body[:stop])
        self.wfile.flush()
        if fault.stall_after is not None:
            self.server.hub.stalled.set()
            self.server.hub.resume.wait(30)
            self.wfile.write(body[stop:])
        self.close_connection = self.close_connection or fault.cut_after is not None

    def log_message(self, *args: Any) -> None:
        pass


def is_large(file: str) -> bool:
    """What `.gitattributes` puts into LFS."""
    return file.endswith((".safetensors", ".gguf", ".bin", ".model"))


def nothing_is_there(home: Path) -> None:
    """No view, no blob, no partial download."""
    assert not list(home.glob("views/**/*"))
    assert not [path for path in home.glob("blobs/**/*") if path.is_file()]
    assert list(home.glob("partial/*")) == []
    assert list(home.glob("tmp/*")) == []
