"""The engine and its kept weights: second starts, what makes a checkpoint another one, how to switch it off."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llmserve.checkpoints import open_checkpoint
from llmserve.checkpoints.store import Store, StoredVersion
from llmserve.cli import options
from llmserve.cli.checkup import Finding, check_installation, check_model
from llmserve.config import EngineConfig
from llmserve.engine.engine import Engine
from llmserve.engine.images import VARIABLE
from llmserve.engine.loader import load_engine
from llmserve.errors import InvalidRequest
from llmserve.types import Request, SamplingParams
from tests.tiny.checkpoints import write
from tests.tiny.models import TinyModel

pytest.importorskip("llmserve._C", reason="the extension is not built")

MODEL = TinyModel(name="kept", model_type="qwen3", storage="q8_0", hidden_size=128, intermediate_size=192)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMSERVE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv(VARIABLE, raising=False)
    return tmp_path / "home"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(MODEL, tmp_path)


def load(path: Path, **options: Any) -> Engine:
    config = EngineConfig(model_path=path, num_threads=2, **{"packed_cache_min_bytes": 0, **options})
    return load_engine(config, progress=lambda phase, done, total: None)


def answer(engine: Engine) -> list[tuple[Sequence[int], str]]:
    """Sampled tokens and the bits of their log-probabilities."""
    sampling = SamplingParams(max_tokens=24, temperature=0.8, seed=5, num_logprobs=2)
    engine.submit(Request(request_id="1", prompt_token_ids=list(range(2, 30)), sampling=sampling))
    outputs = [output for _ in range(60) if engine.has_work for output in engine.step()]
    assert outputs[-1].finish_reason == "length"
    return [
        (output.token_ids, str([(p.logprob.hex(), p.top_ids) for p in output.logprobs or ()])) for output in outputs
    ]


def test_the_second_start_maps_and_answers_bit_by_bit_alike(home: Path, path: Path) -> None:
    first, second, plain = load(path), load(path), load(path, packed_cache_bytes=0)
    assert [engine.info.weights_origin for engine in (first, second, plain)] == ["written", "mapped", "memory"]
    (image,) = (home / "packed").glob("*.image")
    assert [engine.info.image_path for engine in (first, second, plain)] == [str(image), str(image), ""]
    assert answer(first) == answer(second) == answer(plain)


def test_weights_that_are_quick_to_pack_are_not_kept(home: Path, path: Path) -> None:
    assert load(path, packed_cache_min_bytes=EngineConfig(model_path=path).packed_cache_min_bytes).info.image_path == ""
    assert not home.exists()


def test_the_environment_bounds_the_folder_and_switches_it_off(
    home: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "0")
    assert load(path).info.weights_origin == "memory"
    monkeypatch.setenv(VARIABLE, "0.5")
    assert load(path).info.weights_origin == "written"
    monkeypatch.setenv(VARIABLE, "many")
    with pytest.raises(InvalidRequest, match=f"{VARIABLE}: 'many' is not a number of GiB"):
        load(path)


def test_a_checkpoint_that_changes_is_another_one(home: Path, path: Path, tmp_path: Path) -> None:
    before = open_checkpoint(path).identity
    assert open_checkpoint(path).identity == before
    stat, content = path.stat(), path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # a writer that hides what it did
    changed = open_checkpoint(path).identity
    copy = tmp_path / "copy" / path.name
    copy.parent.mkdir()
    shutil.copy2(path, copy)
    assert len({before, changed, open_checkpoint(copy).identity}) == 3


def test_the_tick_of_the_clock_in_which_a_file_was_written_passes_first(
    home: Path, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or a second write in it would leave the same times."""
    naps: list[float] = []
    path.write_bytes(path.read_bytes())
    checkpoint = open_checkpoint(path)
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", naps.append)
        assert checkpoint.identity
        assert len(naps) == 1
        assert 0 < naps[0] <= 0.05
    time.sleep(0.06)
    monkeypatch.setattr(time, "sleep", naps.append)
    assert checkpoint.identity
    assert len(naps) == 1


def test_a_folder_is_all_of_its_files(home: Path, tmp_path: Path) -> None:
    folder = write(replace(MODEL, storage="hf_f32"), tmp_path)
    before = open_checkpoint(folder).identity
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes())
    assert open_checkpoint(folder).identity != before


def pulled(store: Store, path: Path) -> Path:
    """The file as it lies in a store."""
    with path.open("rb") as file:
        blob = store.add_blob(file, lambda count: None)
    return store.add_version("tiny", "1", StoredVersion("test", "model.gguf", {"model.gguf": blob}))


def test_a_pulled_file_is_its_digest_wherever_it_lies(
    home: Path, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = open_checkpoint(pulled(Store(), path)).identity
    monkeypatch.setenv("LLMSERVE_HOME", str(tmp_path / "elsewhere"))
    view = pulled(Store(), path)
    assert Store().sha256_of(view, view.stat()) == hashlib.sha256(path.read_bytes()).hexdigest()
    assert open_checkpoint(view).identity == here


def test_the_store_does_not_vouch_for_what_was_changed_or_is_not_its_own(home: Path, path: Path) -> None:
    store = Store()
    view = pulled(store, path)
    assert store.sha256_of(path, path.stat()) is None
    assert store.sha256_of(view.with_name("other"), view.stat()) is None
    view.chmod(0o644)
    with view.open("r+b") as file:
        file.write(b"GGUF")
    index = home / "views" / "tiny" / "index.json"
    os.utime(index, ns=(0, view.stat().st_mtime_ns - 1))
    assert store.sha256_of(view, view.stat()) is None
    json.loads(index.read_text())  # the index is whole: the time alone decided


def packed_lines(findings: Iterable[Finding]) -> list[str]:
    return [finding.text for finding in findings if finding.topic == "packed weights"]


def test_doctor_says_where_the_image_is_and_whether_it_was_there(home: Path, path: Path) -> None:
    config = EngineConfig(model_path=path, packed_cache_min_bytes=0)
    assert packed_lines(check_installation()) == [f"{home / 'packed'}: 0 images, 0 B of at most 64 GiB"]
    texts = [packed_lines(check_model(config)) for _ in range(2)]
    (image,) = (home / "packed").glob("*.image")
    assert texts == [
        [f"packed now and kept in {image} for the next start"],
        [f"mapped from {image}, which was there"],
    ]
    assert packed_lines(check_model(replace(config, packed_cache_bytes=0))) == [
        "in memory; keeping them is switched off"
    ]
    (text,) = packed_lines(check_installation())
    assert "1 image, " in text


def test_the_option_switches_it_off() -> None:
    assert options.engine_config(Path("x")).packed_cache_bytes is None
    assert options.engine_config(Path("x"), packed_cache=False).packed_cache_bytes == 0
