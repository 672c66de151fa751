"""Single files by URL, and files of this machine, into the store."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from llmserve.checkpoints import open_checkpoint, pull
from llmserve.cli.main import main
from llmserve.errors import CheckpointError, InvalidRequest, LLMServeError, ModelNotFound
from tests.unit.checkpoint_files import write_gguf, write_hf
from tests.unit.hub_stub import Fault, HubStub

GGUF = b"GGUF" + bytes(range(256)) * 40
DIGEST = hashlib.sha256(GGUF).hexdigest()


def test_a_url(hub: HubStub, home: Path) -> None:
    hub.blobs["/models/m.gguf"] = GGUF
    model = f"{hub.url}/models/m.gguf?key=secret#sha256={DIGEST}"
    seen: list[tuple[str, int, int]] = []
    path = pull.resolve(model, progress=lambda *args: seen.append(args))
    assert path == home / "views/file+m.gguf" / DIGEST / "m.gguf"
    assert path.read_bytes() == GGUF
    assert seen[-1] == ("download", len(GGUF), len(GGUF))
    index = (home / "views/file+m.gguf/index.json").read_text()
    assert json.loads(index)["versions"][DIGEST]["url"] == f"{hub.url}/models/m.gguf"
    assert "secret" not in index
    hub.requests.clear()
    assert pull.resolve(model, refresh=True) == path
    assert hub.requests == []


def test_a_url_with_another_hash(hub: HubStub, home: Path) -> None:
    hub.blobs["/m.gguf"] = GGUF
    with pytest.raises(CheckpointError, match=rf"/m\.gguf: its sha256 is {DIGEST}, it should be 000.*removed"):
        pull.resolve(f"{hub.url}/m.gguf?key=secret#sha256={'0' * 64}")
    assert list((home / "partial").iterdir()) == []
    assert not (home / "views").exists()


@pytest.mark.parametrize(
    ("status", "error"), [(404, ModelNotFound), (410, ModelNotFound), (401, CheckpointError), (403, CheckpointError)]
)
def test_a_url_that_is_refused(hub: HubStub, status: int, error: type[Exception]) -> None:
    hub.fail("api", "m.gguf", Fault(status=status))
    with pytest.raises(error, match=rf"^http://127\.0\.0\.1:?\d*/m\.gguf: 127\.0\.0\.1 answered {status}$"):
        pull.resolve(f"{hub.url}/m.gguf?key=secret#sha256={DIGEST}")


def test_the_hub_token_is_not_sent_to_urls(hub: HubStub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub.blobs["/m.gguf"] = GGUF
    pull.resolve(f"{hub.url}/m.gguf#sha256={DIGEST}")
    assert "Authorization" not in hub.requests[0].headers


def test_a_file_is_copied(hub: HubStub, home: Path, tmp_path: Path) -> None:
    source = write_gguf(tmp_path / "a b.gguf")
    data = source.read_bytes()
    seen: list[tuple[str, int, int]] = []
    path = pull.resolve(f"file://{str(source).replace(' ', '%20')}", progress=lambda *args: seen.append(args))
    assert path == home / "views/file+a b.gguf" / hashlib.sha256(data).hexdigest() / "a b.gguf"
    assert not path.samefile(source)
    assert seen[-1] == ("copy", len(data), len(data))
    source.unlink()
    checkpoint = open_checkpoint(path)
    assert len(checkpoint.tensors) == 20
    checkpoint.close()


def test_a_file_is_copied_again_only_when_it_changed(hub: HubStub, tmp_path: Path) -> None:
    source = tmp_path / "m.gguf"
    source.write_bytes(GGUF)
    first = pull.resolve(f"file://{source}")
    seen: list[str] = []
    assert pull.resolve(f"file://{source}", progress=lambda phase, *_: seen.append(phase)) == first
    assert seen == []
    source.write_bytes(GGUF + b"2")
    os.utime(source, ns=(0, time.time_ns()))
    second = pull.resolve(f"file://{source}")
    assert (first.read_bytes(), second.read_bytes()) == (GGUF, GGUF + b"2")


def test_files_of_the_same_name_are_told_apart(hub: HubStub, tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "m.gguf").write_bytes(GGUF + folder.encode())
    for folder in ("a", "b", "a"):
        assert pull.resolve(f"file://{tmp_path / folder}/m.gguf").read_bytes() == GGUF + folder.encode()


def test_a_folder_is_copied(hub: HubStub, tmp_path: Path) -> None:
    folder = write_hf(tmp_path / "tiny", num_shards=2)
    names = {file.name for file in folder.iterdir()}
    for name in ("evil.py", "pytorch_model.bin", "optimizer.pt"):
        (folder / name).write_bytes(b"x")
    (folder / "sub").mkdir()
    path = pull.resolve(f"file://{folder}")
    shutil.rmtree(folder)
    assert {file.name for file in path.iterdir()} == names
    checkpoint = open_checkpoint(path)
    assert len(checkpoint.tensors) == 20
    checkpoint.close()


def test_a_file_with_its_hash(hub: HubStub, home: Path, tmp_path: Path) -> None:
    source = tmp_path / "m.gguf"
    source.write_bytes(GGUF)
    assert pull.resolve(f"file://{source}#sha256={DIGEST}").read_bytes() == GGUF
    with pytest.raises(CheckpointError, match=rf"{source}: its sha256 is {DIGEST}, it should be 000"):
        pull.resolve(f"file://{source}#sha256={'0' * 64}")
    seen: list[str] = []
    pull.resolve(f"file://{source}#sha256={DIGEST}", progress=lambda phase, *_: seen.append(phase))
    assert seen == []
    source.write_bytes(GGUF + b"2")
    with pytest.raises(CheckpointError, match=rf"{source}: its sha256 is \w+, it should be {DIGEST}"):
        pull.resolve(f"file://{source}#sha256={DIGEST}")
    assert len([path for path in (home / "blobs").rglob("*") if path.is_file()]) == 1


def test_files_that_are_refused(hub: HubStub, tmp_path: Path) -> None:
    (tmp_path / "m.bin").write_bytes(b"P")
    (tmp_path / "empty").mkdir()
    several = tmp_path / "several"
    several.mkdir()
    for name in ("a.gguf", "b.gguf"):
        (several / name).write_bytes(GGUF)
    cases: list[tuple[str, str, type[LLMServeError], str]] = [
        (f"file://{tmp_path}/no.gguf", "", ModelNotFound, "no such file or folder"),
        (f"file://{tmp_path}/m.bin", "", InvalidRequest, "name a GGUF file or a folder"),
        (f"file://{tmp_path}/empty", "", CheckpointError, "holds no .gguf file"),
        (f"file://{several}", "", ModelNotFound, "holds 2 GGUF files, choose one"),
        (f"file://{several}#sha256={DIGEST}", "", InvalidRequest, "this is a folder"),
        (f"file://{several}/a.gguf", "a*", InvalidRequest, "--file chooses in a folder"),
    ]
    for model, file, error, message in cases:
        with pytest.raises(error, match=message):
            pull.resolve(model, file=file)
    assert pull.resolve(f"file://{several}", file="b*").name == "b.gguf"


def test_offline_does_not_concern_files(hub: HubStub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMSERVE_OFFLINE", "1")
    (tmp_path / "m.gguf").write_bytes(GGUF)
    assert pull.resolve(f"file://{tmp_path}/m.gguf").read_bytes() == GGUF


def test_the_command(hub: HubStub, capsys: pytest.CaptureFixture[str]) -> None:
    repository = hub.add("org/tiny", {"a.gguf": GGUF, "b.gguf": b"GGUF"})
    assert main(["pull", "org/tiny", "--file", "a*"]) == 0
    output = capsys.readouterr()
    assert Path(output.out.strip()).read_bytes() == GGUF
    assert "download: 10 KiB, done" in output.err
    repository.commit({"a.gguf": GGUF + b"2"})
    assert main(["pull", "org/tiny"]) == 0
    assert Path(capsys.readouterr().out.strip()).read_bytes() == GGUF + b"2"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["pull", "org/several"], "choose one"),
        (["pull", "hf://org/no"], "set HF_TOKEN"),
        (["pull", "org/pickle"], "pickled weights alone"),
        (["pull", "smollm2", "--file", "x"], "--file chooses"),
        (["serve", "org/no"], "no such file or folder, and http"),
        (["doctor", "https://127.0.0.1:9/m.gguf"], "add #sha256=HEX"),
        (["chat", "https://127.0.0.1:9/m.gguf", "--prompt", "x"], "add #sha256=HEX"),
    ],
)
def test_errors_of_the_command_are_one_line(
    hub: HubStub, capsys: pytest.CaptureFixture[str], args: list[str], message: str
) -> None:
    hub.add("org/several", {"a.gguf": GGUF, "b.gguf": GGUF})
    hub.add("org/pickle", {"pytorch_model.bin": b"P"})
    assert main(args) == 2
    output = capsys.readouterr()
    assert output.out == ""
    lines = output.err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("llmserve: ")
    assert message in lines[0]
