"""Downloads over connections that break, servers that misbehave, processes that die."""

from __future__ import annotations

import email.utils
import gzip
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llmserve.checkpoints import download, pull
from llmserve.checkpoints.store import Store
from llmserve.errors import CheckpointError, ModelNotFound
from tests.ops.seeds import fresh_seed
from tests.unit.hub_stub import Fault, HubStub

DATA = os.urandom(3_000_000)
DIGEST = hashlib.sha256(DATA).hexdigest()
BLOB = f"blobs/sha256/{DIGEST[:2]}/{DIGEST}"


def ranges(hub: HubStub, host: str = "cdn") -> list[str | None]:
    return [one.headers.get("Range") for one in hub.requests if one.host == host]


@pytest.fixture
def remote(hub: HubStub) -> str:
    """A model of one large file."""
    hub.add("org/tiny", {"m.gguf": DATA})
    return "org/tiny"


def fetch(url: str, *, sha256: str | None = None, num_bytes: int | None = None) -> bytes:
    """One file without a hub; its bytes."""
    store = Store()
    seen: list[tuple[int, int]] = []
    with download.open_client() as client:
        file = download.RemoteFile(url=url, name="file", num_bytes=num_bytes, sha256=sha256)
        stored = download.fetch(
            client,
            file,
            store,
            explain=lambda response: ModelNotFound(f"status {response.status_code}"),
            on_position=lambda *args: seen.append(args),
        )
    assert seen[-1][0] == stored.num_bytes
    return (store.home / "blobs/sha256" / stored.sha256[:2] / stored.sha256).read_bytes()


def test_a_cut_connection_is_resumed(hub: HubStub, remote: str, home: Path) -> None:
    hub.fail("cdn", "", Fault(cut_after=1_000_000), Fault(cut_after=500_000))
    seen: list[int] = []
    assert pull.resolve(remote, progress=lambda _, done, total: seen.append(done)).read_bytes() == DATA
    first, second, third = ranges(hub)
    assert first is None
    assert second is not None
    assert third is not None
    assert 0 < int(second[6:-1]) < int(third[6:-1]) <= 1_500_000
    assert seen == sorted(seen)
    assert list((home / "partial").iterdir()) == []


def test_a_server_that_ignores_ranges(hub: HubStub, remote: str) -> None:
    hub.fail("cdn", "", Fault(cut_after=1_000_000), Fault(ignore_range=True))
    assert pull.resolve(remote).read_bytes() == DATA
    assert len(hub.asked(DIGEST, "cdn")) == 2


@pytest.mark.parametrize("content_range", ["bytes 7-9/3000000", "bytes nonsense", "bytes 0-2999999/3000000"])
def test_another_range_than_asked_for(hub: HubStub, remote: str, content_range: str) -> None:
    hub.fail("cdn", "", Fault(cut_after=1_000_000), Fault(content_range=content_range))
    assert pull.resolve(remote).read_bytes() == DATA
    assert ranges(hub)[2] is None


def test_a_file_that_changes_between_two_connections_is_not_mixed(hub: HubStub) -> None:
    hub.blobs["/f"] = DATA
    new = DATA[::-1]
    hub.fail("api", "/f", Fault(cut_after=1_000_000))
    hub.faults["api /f"].append(Fault(edit=lambda _: new))
    assert fetch(hub.url + "/f") == new
    assert hub.requests[1].headers.get("If-Range", "").startswith('"')


def test_without_validator_and_hash_it_starts_again(hub: HubStub) -> None:
    hub.blobs["/f"] = DATA
    hub.fail("api", "/f", Fault(cut_after=1_000_000, no_validator=True), Fault(no_validator=True))
    assert fetch(hub.url + "/f") == DATA
    assert ranges(hub, "api") == [None, None]


def test_a_weak_validator_is_none(hub: HubStub) -> None:
    hub.blobs["/f"] = DATA
    weak = Fault(cut_after=1_000_000, no_validator=True, headers={"ETag": 'W/"1"', "Last-Modified": "x"})
    hub.fail("api", "/f", weak)
    assert fetch(hub.url + "/f") == DATA
    assert ranges(hub, "api") == [None, None]


def test_a_known_hash_resumes_without_validator(hub: HubStub) -> None:
    hub.blobs["/f"] = DATA
    hub.fail("api", "/f", Fault(cut_after=1_000_000, no_validator=True))
    assert fetch(hub.url + "/f", sha256=DIGEST) == DATA
    assert ranges(hub, "api")[1] is not None


def test_an_encoded_answer(hub: HubStub) -> None:
    hub.blobs["/f"] = DATA
    encoded = Fault(edit=gzip.compress, headers={"Content-Encoding": "gzip"})
    hub.fail("api", "/f", encoded)
    assert fetch(hub.url + "/f", num_bytes=len(DATA)) == DATA
    assert hub.requests[0].headers["Accept-Encoding"] == "identity"


def test_a_partial_file_that_is_already_complete(hub: HubStub, home: Path) -> None:
    hub.blobs["/f"] = DATA
    Store().partial(DIGEST).write_bytes(DATA)
    assert fetch(hub.url + "/f", sha256=DIGEST) == DATA
    assert hub.requests == []


@pytest.mark.parametrize("size", [len(DATA) + 1, len(DATA)])
def test_a_partial_file_that_is_too_long_or_wrong(hub: HubStub, home: Path, size: int) -> None:
    hub.blobs["/f"] = DATA
    Store().partial(DIGEST).write_bytes(bytes(size))
    if size > len(DATA):
        assert fetch(hub.url + "/f", sha256=DIGEST, num_bytes=len(DATA)) == DATA
    else:
        with pytest.raises(CheckpointError, match="what came was removed"):
            fetch(hub.url + "/f", sha256=DIGEST, num_bytes=len(DATA))
        assert list((home / "partial").iterdir()) == []


def test_a_range_past_the_end(hub: HubStub) -> None:
    hub.blobs["/f"] = DATA
    Store().partial(DIGEST).write_bytes(bytes(len(DATA)))
    assert fetch(hub.url + "/f", sha256=DIGEST) == DATA
    assert ranges(hub, "api") == [f"bytes={len(DATA)}-", None]


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_statuses_that_pass(hub: HubStub, remote: str, status: int) -> None:
    hub.fail("api", "main", Fault(status=status))
    hub.fail("api", "m.gguf", Fault(status=status))
    hub.fail("cdn", "", Fault(status=status), Fault(status=status))
    assert pull.resolve(remote).read_bytes() == DATA


@pytest.mark.parametrize("as_date", [False, True])
def test_retry_after_is_kept(hub: HubStub, remote: str, as_date: bool) -> None:
    date = email.utils.formatdate(time.time() + 2, usegmt=True)  # in whole seconds
    started_s = time.monotonic()
    hub.fail("cdn", "", Fault(status=429, headers={"Retry-After": date if as_date else "1"}))
    pull.resolve(remote)
    assert 0.9 <= time.monotonic() - started_s < 10


def test_retry_after_that_is_too_long(hub: HubStub, remote: str) -> None:
    hub.fail("api", "main", Fault(status=429, headers={"Retry-After": "3600"}))
    with pytest.raises(CheckpointError, match=r"answered 429; the server asks to wait for 3600 s"):
        pull.resolve(remote)


@pytest.mark.parametrize("value", ["soon", "-1", ""])
def test_retry_after_that_is_none(hub: HubStub, remote: str, value: str) -> None:
    hub.fail("api", "main", Fault(status=503, headers={"Retry-After": value}))
    assert pull.resolve(remote).read_bytes() == DATA


def test_a_server_that_stays_broken(hub: HubStub, remote: str) -> None:
    hub.fail("api", "main", *[Fault(status=503)] * 10)
    with pytest.raises(CheckpointError, match=r"127\.0\.0\.1 answered 503 \(5 attempts\)$"):
        pull.resolve(remote)
    assert len(hub.requests) == 5


def test_attempts_that_get_further_do_not_count(hub: HubStub, remote: str) -> None:
    hub.fail("cdn", "", *[Fault(cut_after=200_000)] * 12)
    assert pull.resolve(remote).read_bytes() == DATA


def test_a_server_that_always_cuts_at_the_same_place(hub: HubStub) -> None:
    hub.blobs["/f"] = DATA
    hub.fail("api", "/f", *[Fault(cut_after=100_000, ignore_range=True)] * 20)
    with pytest.raises(CheckpointError, match=r"127\.0\.0\.1 broke off: .*\(5 attempts\); what came is kept"):
        fetch(hub.url + "/f")
    assert len(hub.requests) == 5


def test_any_mixture_of_faults_yields_the_file(hub: HubStub) -> None:
    seed = fresh_seed()
    draws = random.Random(seed)
    data = DATA[:300_000]
    hub.blobs["/f"] = data
    for _ in range(25):
        length = draws.randint(1, len(data))
        hub.blobs["/f"] = data[:length]
        faults = [
            Fault(
                cut_after=draws.randint(0, length - 1),
                ignore_range=draws.random() < 0.3,
                no_validator=draws.random() < 0.3,
                content_range=draws.choice(["", "", "bytes 1-2/3"]),
            )
            for _ in range(draws.randint(0, 3))
        ]
        hub.fail("api", "/f", *faults)
        sha256 = hashlib.sha256(data[:length]).hexdigest() if draws.random() < 0.5 else None
        assert fetch(hub.url + "/f", sha256=sha256) == data[:length], (seed, faults)
        hub.faults.clear()
        shutil.rmtree(Store().home / "blobs")


def test_a_blob_that_was_shortened_is_fetched_again(hub: HubStub, home: Path) -> None:
    hub.blobs["/m.gguf"] = DATA
    model = f"{hub.url}/m.gguf#sha256={DIGEST}"
    path = pull.resolve(model)
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.truncate(1000)
    assert pull.resolve(model).read_bytes() == DATA
    assert (home / BLOB).read_bytes() == DATA


def test_nobody_listens(hub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match=r"^org/tiny: 127\.0\.0\.1 cannot be reached: .*\(5 attempts\)$"):
        pull.resolve("hf://org/tiny")
    with pytest.raises(CheckpointError, match=r"^org/tiny: no such file or folder, and 127\.0\.0\.1 cannot be reached"):
        pull.resolve("org/tiny")


def test_redirects_without_end(hub: HubStub) -> None:
    hub.fail("api", "/f", *[Fault(status=302, headers={"Location": "/f"})] * 30)
    with pytest.raises(CheckpointError, match=r"cannot be used: .*redirects"):
        fetch(hub.url + "/f")


def test_unknown_size_that_does_not_fit(hub: HubStub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Store, num_bytes: int) -> None:
        raise CheckpointError(f"no room for {num_bytes}")

    hub.blobs["/f"] = DATA
    monkeypatch.setattr(Store, "check_space", refuse)
    with pytest.raises(CheckpointError, match=f"no room for {len(DATA)}"):
        fetch(hub.url + "/f")
    assert list((home / "partial").iterdir()) == []


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "llmserve", *args]


def test_a_killed_pull_leaves_nothing_visible_and_is_resumed(hub: HubStub, remote: str, home: Path) -> None:
    hub.fail("cdn", "", Fault(stall_after=2_000_000))
    process = subprocess.Popen(command("pull", remote), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    partial = home / "partial" / DIGEST
    try:
        assert hub.stalled.wait(30)
        deadline_s = time.monotonic() + 30
        while not (partial.exists() and partial.stat().st_size >= 1 << 20) and time.monotonic() < deadline_s:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert not (home / "views").exists()
    assert not (home / "blobs").exists()
    arrived = partial.stat().st_size
    assert arrived >= 1 << 20
    assert pull.resolve(remote).read_bytes() == DATA
    assert ranges(hub)[1:] == [f"bytes={arrived}-"]


def test_several_processes_fetch_it_once(hub: HubStub, remote: str, home: Path) -> None:
    hub.fail("cdn", "", Fault(stall_after=1_000_000))
    processes = [subprocess.Popen(command("pull", remote), stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert hub.stalled.wait(30)
    time.sleep(1)  # the others reach the lock; if they do not, they find the model, which is right as well
    hub.resume.set()
    outputs = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(set(outputs)) == 1
    assert Path(outputs[0]).read_bytes() == DATA
    assert len(hub.asked(DIGEST, "cdn")) == 1


def test_two_models_with_the_same_file_fetch_it_once(hub: HubStub, remote: str) -> None:
    hub.add("org/other", {"n.gguf": DATA})
    hub.fail("cdn", "", Fault(stall_after=1_000_000))
    paths: dict[str, Path] = {}
    threads = [
        threading.Thread(target=lambda name=name: paths.update({name: pull.resolve(name)}))
        for name in (remote, "org/other")
    ]
    threads[0].start()
    assert hub.stalled.wait(30)
    threads[1].start()
    while not hub.asked("/org/other/revision/main"):
        time.sleep(0.01)
    hub.resume.set()
    for thread in threads:
        thread.join(30)
    assert paths[remote].samefile(paths["org/other"])
    assert len(hub.asked(DIGEST, "cdn")) == 1


def test_a_wish_to_wait_is_reported(home: Path, hub: HubStub, remote: str) -> None:
    phases: list[str] = []
    released = threading.Event()

    def holder() -> None:
        with Store().lock("pull org/tiny"):
            held.set()
            released.wait(30)

    held = threading.Event()
    thread = threading.Thread(target=holder)
    thread.start()
    assert held.wait(30)

    def report(phase: str, done: int, total: int) -> None:
        phases.append(phase)
        released.set()

    pull.resolve(remote, progress=report)
    thread.join()
    assert phases[0] == "waiting for another process"
    assert phases[-1] == "download"
