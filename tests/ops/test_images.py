"""Images of packed weights: a second load maps what the first one wrote; whatever ails a file, results are right."""

from __future__ import annotations

import errno
import hashlib
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from llmserve import ops
from llmserve.checkpoints import open_checkpoint
from llmserve.config import ExecutorConfig, ImageConfig
from llmserve.models.catalog import load_model
from llmserve.ops.compiler import Compiler, Plan
from llmserve.ops.image import DATA_OFFSET, DamagedImage, ImageHeader, image_key, open_image, write_header
from llmserve.ops.nodes import GemmNode
from tests.ops.running import prompt_logprobs
from tests.tiny.checkpoints import write
from tests.tiny.models import VOCAB_SIZE, TinyModel

_C = pytest.importorskip("llmserve._C", reason="the extension is not built")
weights = pytest.importorskip("llmserve.ops.weights")

MODEL = TinyModel(name="kept", model_type="llama", storage="q4_0", hidden_size=128, intermediate_size=192)
OTHER = replace(MODEL, name="other", intermediate_size=224)
PROMPT = list(range(3, 40))
HEADER = ImageHeader(layout_version=1, key="k", num_bytes=100, checksums=(1, 2**64 - 1))


class Loaded:
    """One load of a tiny model, what was said meanwhile, and its answers as bits."""

    def __init__(self, path: Path, images: ImageConfig | None, *, exact: bool = False) -> None:
        self.phases: list[str] = []
        checkpoint = open_checkpoint(path)
        config = ExecutorConfig(max_num_tokens=64, max_num_seqs=2, max_logit_rows=64, max_model_len=128,
                                num_threads=2, exact=exact, images=images)  # fmt: skip
        self.executor = ops.load("cpu").build(
            checkpoint.config, load_model(checkpoint), config, progress=lambda phase, *_: self.phases.append(phase)
        )
        self.executor.allocate_kv(8)
        table = prompt_logprobs(self.executor, PROMPT, chunks=[len(PROMPT)], vocab_size=VOCAB_SIZE)
        self.bits = table.view(np.uint32)

    @property
    def origin(self) -> str:
        return self.executor.weights_origin

    @property
    def image(self) -> Path:
        assert self.executor.image_path
        return Path(self.executor.image_path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write(MODEL, tmp_path)


@pytest.fixture
def images(tmp_path: Path) -> ImageConfig:
    return ImageConfig(folder=tmp_path / "packed", checkpoint_id="one", max_bytes=1 << 30)


@pytest.fixture
def first(path: Path, images: ImageConfig) -> Loaded:
    """The first load: it writes the image."""
    loaded = Loaded(path, images)
    assert loaded.origin == "written"
    return loaded


def digest(loaded: Loaded) -> str:
    return hashlib.sha256(loaded.bits.tobytes()).hexdigest()


def damage(image: Path, offset: int, count: int = 1) -> None:
    """Flip bits of the file."""
    image.chmod(0o600)
    with image.open("r+b") as file:
        file.seek(offset)
        old = file.read(count)
        file.seek(offset)
        file.write(bytes(byte ^ 0x20 for byte in old))


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("exact", [False, True])
def test_the_second_load_maps_what_the_first_one_wrote(path: Path, images: ImageConfig, exact: bool) -> None:
    plain = Loaded(path, None, exact=exact)
    packed, mapped = (Loaded(path, images, exact=exact) for _ in range(2))
    assert [plain.origin, packed.origin, mapped.origin] == ["memory", "written", "mapped"]
    assert set(packed.phases) == {"packing weights", "mapping packed weights"}
    assert set(mapped.phases) == {"mapping packed weights"}
    assert np.array_equal(plain.bits, packed.bits)
    assert np.array_equal(plain.bits, mapped.bits)
    assert packed.image == mapped.image
    assert sorted(file.name for file in images.folder.iterdir()) == [packed.image.name]
    assert packed.image.stat().st_size == DATA_OFFSET + packed.executor.weight_bytes


def test_a_mapped_image_lies_in_shared_pages_of_the_file(first: Loaded, path: Path, images: ImageConfig) -> None:
    """Two processes at once: each has the file's pages mapped, shared and read-only, and none of its own."""
    command = [sys.executable, "-m", "tests.ops.image_process", str(path), str(images.folder)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == f"mapped {digest(first)}\n"
        for process in processes:
            sections = mappings(process.pid, first.image)
            assert [kind for kind, _ in sections] == ["r--s"]
            values = sections[0][1]
            assert values["Rss"] * 1024 >= first.executor.weight_bytes
            assert values["Private_Dirty"] == values["Anonymous"] == 0
            assert values["Pss"] < values["Rss"], "another process maps the same pages"
    finally:
        for process in processes:
            process.communicate("\n", timeout=20)


def mappings(pid: int, image: Path) -> list[tuple[str, dict[str, int]]]:
    """Permissions and sizes (kB) of a process's mappings of a file."""
    found: list[tuple[str, dict[str, int]]] = []
    inside = False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        fields = line.split()
        if not fields[0].endswith(":"):
            inside = fields[-1] == str(image)
            if inside:
                found.append((fields[1], {}))
        elif inside and fields[-1] == "kB":
            found[-1][1][fields[0][:-1]] = int(fields[1])
    return found


def damaged_places(size: int) -> Iterator[int]:
    rng = np.random.default_rng(11)
    yield from (0, 8, 12, 25, 100, DATA_OFFSET, size - 1)
    yield from rng.integers(DATA_OFFSET, size, 12).tolist()


def test_damage_at_any_place_is_found_and_mended(
    first: Loaded, path: Path, images: ImageConfig, caplog: pytest.LogCaptureFixture
) -> None:
    for place in damaged_places(first.image.stat().st_size):
        caplog.clear()
        damage(first.image, place)
        again = Loaded(path, images)
        assert (again.origin, np.array_equal(again.bits, first.bits)) == ("written", True), place
        (line,) = warnings_of(caplog)
        assert "ignored and written anew" in line
        assert str(first.image) in line
    assert Loaded(path, images).origin == "mapped"


@pytest.mark.parametrize("size", [0, 5, 20, 100, DATA_OFFSET, DATA_OFFSET + 4096, -1, "more"])
def test_a_file_of_another_length_is_mended(first: Loaded, path: Path, images: ImageConfig, size: int | str) -> None:
    whole = first.image.stat().st_size
    os.truncate(first.image, whole + 1 if size == "more" else int(size) if int(size) >= 0 else whole - 1)
    again = Loaded(path, images)
    assert again.origin == "written"
    assert np.array_equal(again.bits, first.bits)


def test_foreign_files_are_mended(first: Loaded, path: Path, images: ImageConfig, tmp_path: Path) -> None:
    other = Loaded(write(OTHER, tmp_path), images)
    assert other.image != first.image
    first.image.write_bytes(other.image.read_bytes())
    again = Loaded(path, images)
    assert (again.origin, np.array_equal(again.bits, first.bits)) == ("written", True)


def test_exact_layout_checkpoint_and_plan_are_part_of_the_name(
    path: Path, images: ImageConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = write(replace(MODEL, name="dense", storage="f32"), tmp_path)
    places = [Loaded(dense, images).image, Loaded(dense, images, exact=True).image]
    places += [Loaded(path, images).image, Loaded(path, replace(images, checkpoint_id="two")).image]
    places.append(Loaded(write(OTHER, tmp_path), images).image)
    monkeypatch.setattr(_C, "LAYOUT_VERSION", _C.LAYOUT_VERSION + 1)
    places.append(Loaded(path, images).image)
    assert len(set(places)) == len(places) == 6


@pytest.mark.parametrize("tiles", [(0, 3), (1, 2)], ids=["at the ends", "inside, where no sample is"])
def test_a_compiler_that_orders_rows_otherwise_reads_no_stale_image(
    first: Loaded, path: Path, images: ImageConfig, monkeypatch: pytest.MonkeyPatch, tiles: tuple[int, int]
) -> None:
    original = Compiler.run

    def reordered(self: Compiler) -> Plan:
        plan = original(self)
        sources = next(node.matrix.sources for node in reversed(plan.nodes) if isinstance(node, GemmNode))
        one, other = tiles
        sources[one], sources[other] = sources[other], sources[one]
        return plan

    monkeypatch.setattr(Compiler, "run", reordered)
    assert Loaded(path, images).image != first.image


def test_a_checkpoint_with_other_content_under_the_same_identity_reads_no_stale_image(
    first: Loaded, path: Path, images: ImageConfig
) -> None:
    """The identity of a file may fail us; the samples are of the content itself."""
    whole = bytearray(path.read_bytes())
    tail = len(whole) - 4096
    whole[tail:] = bytes(byte ^ 1 for byte in whole[tail:])
    path.write_bytes(whole)
    assert Loaded(path, images).image != first.image


def test_packed_bytes_are_those_of_this_layout_version() -> None:
    """Whoever changes packed bytes finds this test, raises `kLayoutVersion` and writes the new sums down here."""
    sums = {kind: packed_sum(kind) for kind in GOLDEN_SUMS}
    assert (_C.LAYOUT_VERSION, sums) == (GOLDEN_VERSION, GOLDEN_SUMS)


GOLDEN_VERSION = 2
GOLDEN_SUMS = {
    ("q4_0", "q4_0"): 17588335491148585288,
    ("q4_1", "q4_1"): 17081123761344511943,
    ("q8_0", "q8_0"): 17840272104389377950,
    ("f32", "bf16"): 3307967639516512906,
    ("f32", "f32"): 3208210206539735250,
}
BLOCK_BYTES = {"q4_0": 18, "q4_1": 20, "q8_0": 34, "f32": 128}


def packed_sum(kind: tuple[str, str]) -> int:
    """Checksum of a random matrix of 100 rows and 64 columns, packed."""
    stored, packed_type = kind
    data = np.random.default_rng(1).integers(0, 256, 100 * 2 * BLOCK_BYTES[stored], np.uint8)
    if stored == "f32":
        data = np.random.default_rng(1).random(100 * 64, np.float32).view(np.uint8)
    program = _C.Program("", 1, max_num_tokens=1, max_num_seqs=1, max_logit_rows=1, max_position=1)
    program.reserve_weights(1 << 20)
    view = _C.TensorView(memoryview(data.tobytes()), stored, 100, 64, "test")
    matrix = program.add_matrix(packed_type, [view], np.array([[0, 0, 64], [0, 64, 36]], np.int32))
    program.pack(matrix)
    return int(program.checksum(matrix))


def test_a_full_disk_and_a_folder_that_cannot_be_written_cost_a_line(
    path: Path, images: ImageConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = Loaded(path, None)

    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    loaded = Loaded(path, images)
    assert warnings_of(caplog) == [f"{images.folder}: packed weights are not kept: No space left on device"]
    assert (loaded.origin, np.array_equal(loaded.bits, plain.bits)) == ("memory", True)
    assert not list(images.folder.glob("*.tmp"))
    caplog.clear()
    blocked = images.folder.parent / "a file"
    blocked.write_text("no folder")
    loaded = Loaded(path, replace(images, folder=blocked / "packed"))
    (line,) = warnings_of(caplog)
    assert "are not kept: Not a directory" in line
    assert (loaded.origin, np.array_equal(loaded.bits, plain.bits)) == ("memory", True)


def test_a_disk_that_fails_in_the_middle_costs_a_line(
    path: Path, images: ImageConfig, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int, header: ImageHeader) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(weights, "write_header", fail)
    loaded = Loaded(path, images)
    assert warnings_of(caplog) == [f"{images.folder}: packed weights are not kept: Input/output error"]
    assert np.array_equal(loaded.bits, Loaded(path, None).bits)
    assert [file.suffix for file in images.folder.iterdir()] == [".lock"], "what was begun is gone"


def test_weights_past_the_bounds_stay_in_memory(first: Loaded, path: Path, images: ImageConfig) -> None:
    size = first.executor.weight_bytes
    assert Loaded(path, replace(images, min_bytes=size)).origin == "mapped"
    assert Loaded(path, replace(images, min_bytes=size + 1)).origin == "memory"
    assert Loaded(path, replace(images, max_bytes=size - 1)).origin == "memory"


def test_two_that_start_at_once_pack_once(path: Path, images: ImageConfig) -> None:
    command = [sys.executable, "-m", "tests.ops.image_process", str(path), str(images.folder)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    answers = [process.communicate("\n", timeout=60)[0].split() for process in processes]
    assert sorted(answer[0] for answer in answers) == ["mapped", "mapped", "written"]
    assert len({answer[1] for answer in answers}) == 1


# The file format by itself.


def test_header_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "image"
    assert open_image(path, key="k", layout_version=1, num_bytes=100) is None
    with path.open("w+b") as file:
        write_header(file.fileno(), HEADER)
        file.truncate(DATA_OFFSET + 100)
    image = open_image(path, key="k", layout_version=1, num_bytes=100)
    assert image is not None
    assert image.header == HEADER
    for wanted in ({"key": "l"}, {"layout_version": 2}, {"num_bytes": 99}):
        with pytest.raises(DamagedImage, match="other weights"):
            open_image(path, **{"key": "k", "layout_version": 1, "num_bytes": 100, **wanted})  # type: ignore[arg-type]


def test_keys_differ() -> None:
    assert image_key(["a", 1, [("b", 2)]]) == image_key(["a", 1, [("b", 2)]])
    assert len({image_key(parts) for parts in (["a", 1], ["a", 2], ["b", 1], ["a1"], ["a", "1"])}) == 5
