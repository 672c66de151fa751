"""Pulls from a hub on loopback: what is taken, pinned, refused, and said."""

from __future__ import annotations

import hashlib
import json
import stat
from pathlib import Path

import pytest

from llmserve.checkpoints import open_checkpoint, open_text, pull
from llmserve.checkpoints.store import Store
from llmserve.errors import CheckpointError, InvalidRequest, ModelNotFound
from tests.unit.checkpoint_files import write_gguf, write_hf
from tests.unit.hub_stub import Fault, Files, HubStub, nothing_is_there

GGUF = b"GGUF" + bytes(range(256)) * 40
CONFIG = b'{"model_type": "llama"}'


def folder_files(tmp_path: Path) -> dict[str, bytes]:
    folder = write_hf(tmp_path / "source", num_shards=2)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"temperature": 0.5}')
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_a_folder_end_to_end(hub: HubStub, home: Path, tmp_path: Path) -> None:
    files = folder_files(tmp_path)
    others = {
        "README.md": b"read", "LICENSE": b"free", "tokenizer.model": b"spm", "merges.txt": b"a b",
        "chat_template.jinja": b"x",
    }  # fmt: skip
    never = {
        "pytorch_model.bin": b"P", "modeling_x.py": b"import os", "model.pth": b"P", "consolidated.safetensors": b"S",
        "onnx/model.safetensors": b"S", "original/params.json": b"{}", ".gitattributes": b"", "m.gguf": GGUF,
        "x.json": b"{}",
    }  # fmt: skip
    commit = hub.add("org/tiny", {**files, **others, **never}).branches["main"]
    seen: list[tuple[str, int, int]] = []
    path = pull.resolve("org/tiny", progress=lambda *args: seen.append(args))
    assert path == home / "views/org--tiny" / commit
    assert {file.name for file in path.iterdir()} == set(files) | set(others)
    assert all((path / name).read_bytes() == data for name, data in {**files, **others}.items())
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.iterdir()} == {0o444}
    with_tensors = open_checkpoint(path)
    assert len(with_tensors.tensors) == 20
    with_tensors.close()
    assert open_text(path).generation_config == {"temperature": 0.5}
    total = sum(map(len, {**files, **others}.values()))
    assert seen[-1] == ("download", total, total)
    assert [one[1] for one in seen] == sorted(one[1] for one in seen)
    assert list((home / "partial").iterdir()) == []


def test_an_empty_file(hub: HubStub) -> None:
    hub.add("org/tiny", {"config.json": CONFIG, "model.safetensors": b"S", "merges.txt": b"", "tokenizer.model": b""})
    path = pull.resolve("org/tiny")
    assert [(path / name).read_bytes() for name in ("merges.txt", "tokenizer.model")] == [b"", b""]


def test_the_manifest_says_where_everything_came_from(hub: HubStub, home: Path) -> None:
    commit = hub.add("org/tiny", {"m.gguf": GGUF}).branches["main"]
    path = pull.resolve("hf://org/tiny")
    index = json.loads((home / "views/org--tiny/index.json").read_text())
    digest = hashlib.sha256(GGUF).hexdigest()
    assert index["versions"][f"{commit}--m.gguf"] == {
        "source": f"hf://org/tiny@{commit}/m.gguf",
        "entry": "m.gguf",
        "files": {"m.gguf": {"sha256": digest, "num_bytes": len(GGUF)}},
        "url": f"{hub.url}/org/tiny/resolve/{commit}/",
        "commit": commit,
    }
    assert path.samefile(home / "blobs/sha256" / digest[:2] / digest)
    assert Store().sha256_of(path, path.stat()) == digest


def test_the_second_call_opens_no_connection(hub: HubStub) -> None:
    commit = hub.add("org/tiny", {"m.gguf": GGUF}).branches["main"]
    path = pull.resolve("org/tiny")
    hub.requests.clear()
    assert pull.resolve("org/tiny") == path
    assert pull.resolve("hf://org/tiny@main") == path
    assert pull.resolve(f"hf://org/tiny@{commit}") == path
    assert pull.resolve(f"hf://org/tiny@{commit}", refresh=True) == path
    assert pull.resolve("hf://org/tiny/m.gguf") == path
    assert hub.requests == []


def test_a_branch_that_moves(hub: HubStub) -> None:
    repository = hub.add("org/tiny", {"m.gguf": GGUF})
    first = pull.resolve("org/tiny")
    old, new = repository.branches["main"], repository.commit({"m.gguf": GGUF + b"2"})
    assert pull.resolve("org/tiny") == first
    second = pull.resolve("org/tiny", refresh=True)
    assert (second.parent.name, second.read_bytes()) == (f"{new}--m.gguf", GGUF + b"2")
    assert pull.resolve("org/tiny") == second
    assert pull.resolve(f"org/tiny@{old}") == first
    assert first.read_bytes() == GGUF


def test_files_are_asked_for_by_commit(hub: HubStub) -> None:
    repository = hub.add("org/tiny", {"config.json": CONFIG, "model.safetensors": b"old"})
    old = repository.branches["main"]
    hub.fail("api", "config.json", Fault(status=503, headers={"Retry-After": "0"}))
    pull.resolve("org/tiny")
    assert all(f"/resolve/{old}/" in one.path for one in hub.requests if "/resolve/" in one.path)


@pytest.mark.parametrize("revision", ["v1.0", "refs/pr/3", "feature/x"])
def test_revisions(hub: HubStub, revision: str) -> None:
    repository = hub.add("org/tiny", {"m.gguf": b"other"})
    commit = repository.commit({"m.gguf": GGUF}, branch=revision)
    path = pull.resolve(f"hf://org/tiny@{revision.replace('feature/', 'feature%2F')}")
    assert (path.parent.name, path.read_bytes()) == (f"{commit}--m.gguf", GGUF)


def several() -> Files:
    return {
        "a-Q4_K_M.gguf": GGUF, "sub/a-Q8_0.gguf": GGUF + b"8", "mmproj-f16.gguf": b"GGUF", "README.md": b"read",
        "big-00001-of-00002.gguf": b"GGUF1",
    }  # fmt: skip


def test_several_gguf_files_need_a_choice(hub: HubStub, home: Path) -> None:
    hub.add("org/tiny", several())
    with pytest.raises(ModelNotFound, match=r"holds 3 GGUF files, choose one .*a-Q4_K_M\.gguf \(0 MiB\)") as caught:
        pull.resolve("org/tiny")
    assert "\n" not in str(caught.value)
    nothing_is_there(home)


@pytest.mark.parametrize(
    ("model", "file", "entry"),
    [
        ("hf://org/tiny/a-Q4_K_M.gguf", "", "a-Q4_K_M.gguf"),
        ("hf://org/tiny@main/sub/a-Q8_0.gguf", "", "sub/a-Q8_0.gguf"),
        ("org/tiny", "a-Q4_K_M.gguf", "a-Q4_K_M.gguf"),
        ("org/tiny", "*q8*", "sub/a-Q8_0.gguf"),
        ("org/tiny", "mmproj*", "mmproj-f16.gguf"),
    ],
)
def test_choices(hub: HubStub, home: Path, model: str, file: str, entry: str) -> None:
    hub.add("org/tiny", several())
    path = pull.resolve(model, file=file)
    assert path.read_bytes() == several()[entry]
    root = home / "views/org--tiny" / path.relative_to(home / "views/org--tiny").parts[0]
    assert path == root / entry
    assert sorted(p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()) == sorted(
        ["README.md", entry]
    )
    hub.requests.clear()
    assert pull.resolve(model, file=file) == path
    assert pull.resolve(f"hf://org/tiny/{entry}") == path
    assert hub.requests == []


@pytest.mark.parametrize(
    ("file", "error", "message"),
    [
        ("*q5*", ModelNotFound, r"no GGUF file is called '\*q5\*'; it holds: a-Q4_K_M"),
        ("*q*", ModelNotFound, r"2 GGUF files fit '\*q\*'; it holds: a-Q4_K_M.* sub/a-Q8_0"),
        ("README.md", ModelNotFound, "no GGUF file is called"),
        ("big*", CheckpointError, "split over several GGUF files"),
    ],
)
def test_bad_choices(hub: HubStub, file: str, error: type[Exception], message: str) -> None:
    hub.add("org/tiny", several())
    with pytest.raises(error, match=message):
        pull.resolve("org/tiny", file=file)


def test_a_choice_where_there_is_none(hub: HubStub, tmp_path: Path) -> None:
    for model in ("smollm2", "hf://org/tiny/m.gguf", str(tmp_path)):
        with pytest.raises(InvalidRequest, match="--file"):
            pull.resolve(model, file="*q4*")


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        (
            {"config.json": CONFIG, "pytorch_model.bin": b"P"},
            CheckpointError,
            r"pickled weights alone \(pytorch_model.bin\)",
        ),
        ({"model.pth": b"P"}, CheckpointError, "can run code when they are opened and are never taken"),
        ({"README.md": b"x"}, CheckpointError, r"holds no \.gguf file and no config\.json with safetensors"),
        ({"model.safetensors": b"x"}, CheckpointError, r"holds no \.gguf file and no config\.json"),
        ({}, CheckpointError, r"holds no \.gguf file"),
        ({"../m.gguf": GGUF}, CheckpointError, "not a plain relative path"),
        ({"/etc/m.gguf": GGUF}, CheckpointError, "not a plain relative path"),
        ({"a\\..\\m.gguf": GGUF}, CheckpointError, "not a plain relative path"),
        ({"config.json": CONFIG, "x\\..\\m.safetensors": b""}, CheckpointError, "not a plain relative path"),
    ],
)
def test_repositories_that_are_refused(
    hub: HubStub, home: Path, files: Files, error: type[Exception], message: str
) -> None:
    hub.add("org/tiny", files)
    with pytest.raises(error, match=message) as caught:
        pull.resolve("hf://org/tiny")
    assert "\n" not in str(caught.value)
    nothing_is_there(home)
    assert not hub.asked("", "cdn")


def spoiled(data: bytes) -> bytes:
    return data[:-1] + b"!"


def test_a_corrupted_file_is_found_and_removed(hub: HubStub, home: Path) -> None:
    hub.add("org/tiny", {"m.gguf": GGUF})
    hub.fail("cdn", "", Fault(edit=spoiled))
    with pytest.raises(
        CheckpointError, match=r"org/tiny/m\.gguf: its sha256 is \w+, it should be \w+; what came was re"
    ):
        pull.resolve("org/tiny")
    nothing_is_there(home)
    assert pull.resolve("org/tiny").read_bytes() == GGUF


def test_a_small_file_that_is_not_what_git_has(hub: HubStub, home: Path) -> None:
    hub.add("org/tiny", {"config.json": CONFIG, "model.safetensors": b"S"})
    hub.fail("api", "config.json", Fault(edit=spoiled))
    with pytest.raises(CheckpointError, match=r"org/tiny/config\.json: its git blob is \w{40}, it should be \w{40}"):
        pull.resolve("org/tiny")
    nothing_is_there(home)


def test_an_advertised_hash_that_does_not_match(hub: HubStub, home: Path) -> None:
    wrong = {"sha256": "0" * 64, "size": len(GGUF)}
    hub.add("org/tiny", {"m.gguf": GGUF}, advertised={"m.gguf": {"lfs": wrong}})
    with pytest.raises(CheckpointError, match=f"it should be {'0' * 64}"):
        pull.resolve("org/tiny")
    nothing_is_there(home)


@pytest.mark.parametrize(
    ("file", "size", "message"),
    [
        ("config.json", len(CONFIG) + 5, f"{len(CONFIG)} bytes came, {len(CONFIG) + 5} were announced"),
        ("config.json", len(CONFIG) - 5, f"sends more than the {len(CONFIG) - 5} bytes"),
    ],
)
def test_a_size_that_does_not_match(hub: HubStub, home: Path, file: str, size: int, message: str) -> None:
    files = {"config.json": CONFIG, "model.safetensors": b"S"}
    hub.add("org/tiny", files, advertised={file: {"size": size}})
    with pytest.raises(CheckpointError, match=message):
        pull.resolve("org/tiny")
    nothing_is_there(home)


def test_a_listing_without_sizes(hub: HubStub) -> None:
    files = {"config.json": CONFIG, "model.safetensors": b"S" * 5000}
    hub.add("org/tiny", files, advertised={name: {"size": None, "lfs": None, "blobId": None} for name in files})
    path = pull.resolve("org/tiny")
    assert {file.name: file.read_bytes() for file in path.iterdir()} == files


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "LLMSERVE_OFFLINE"])
def test_offline(hub: HubStub, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    hub.add("org/tiny", {"m.gguf": GGUF})
    path = pull.resolve("org/tiny")
    hub.requests.clear()
    monkeypatch.setenv(variable, "1")
    assert pull.resolve("org/tiny", refresh=True) == path
    for model in ("org/other", "org/tiny@v1", "smollm2", f"{hub.url}/m.gguf?secret#sha256={'0' * 64}"):
        with pytest.raises(ModelNotFound, match=rf"is not in the store \(.*\), and {variable} forbids") as caught:
            pull.resolve(model)
        assert "secret" not in str(caught.value)
    assert hub.requests == []


def test_real_gguf_is_opened(hub: HubStub, tmp_path: Path) -> None:
    hub.add("org/tiny-GGUF", {"tiny.gguf": write_gguf(tmp_path / "m.gguf").read_bytes()})
    checkpoint = open_checkpoint(pull.resolve("org/tiny-GGUF"))
    assert len(checkpoint.tensors) == 20
    checkpoint.close()


def test_too_little_space_is_found_before_the_download(hub: HubStub, home: Path) -> None:
    hub.add("org/tiny", {"m.gguf": GGUF}, advertised={"m.gguf": {"lfs": {"sha256": "0" * 64, "size": 1 << 60}}})
    with pytest.raises(CheckpointError, match=r"MiB are needed and \d+ MiB are free"):
        pull.resolve("org/tiny")
    assert not hub.asked("", "cdn")
    nothing_is_there(home)


def test_content_that_is_there_is_not_fetched_again(hub: HubStub) -> None:
    hub.add("org/one", {"m.gguf": GGUF})
    hub.add("org/two", {"n.gguf": GGUF})
    first = pull.resolve("org/one")
    hub.requests.clear()
    assert pull.resolve("org/two").samefile(first)
    assert not hub.asked(".gguf")


def test_a_damaged_view_is_repaired(hub: HubStub) -> None:
    hub.add("org/tiny", {"config.json": CONFIG, "model.safetensors": b"S"})
    path = pull.resolve("org/tiny")
    (path / "config.json").unlink()
    assert pull.resolve("org/tiny") == path
    assert (path / "config.json").read_bytes() == CONFIG


def test_a_failure_before_the_index_is_written(hub: HubStub, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the process had died between the last file and the index."""
    hub.add("org/tiny", {"config.json": CONFIG, "model.safetensors": b"S"})

    def fail(*_: object) -> bytes:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("msgspec.json.format", fail)
        with pytest.raises(CheckpointError, match=r"cannot store org/tiny: No space left on device"):
            pull.resolve("org/tiny")
    monkeypatch.setenv("LLMSERVE_OFFLINE", "1")
    with pytest.raises(ModelNotFound, match="is not in the store"):
        pull.resolve("org/tiny")
    monkeypatch.delenv("LLMSERVE_OFFLINE")
    hub.requests.clear()
    assert (pull.resolve("org/tiny") / "config.json").read_bytes() == CONFIG
    assert not hub.asked("", "cdn")
    assert list((home / "tmp").iterdir()) == []
