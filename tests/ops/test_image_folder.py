"""The folder of images by itself: room, locks, leftovers."""

from __future__ import annotations

import fcntl
import os
import threading
import time
from pathlib import Path

import pytest

from llmserve.ops.image_folder import ImageFolder


def put(folder: ImageFolder, key: str, num_bytes: int, *, age_s: int) -> Path:
    with folder.new_file(key, num_bytes):
        pass
    path = folder.place_of(key)
    os.utime(path, (time.time() - age_s,) * 2)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> ImageFolder:
    return ImageFolder(tmp_path, 10_000)


def test_room_is_made_by_removing_what_was_used_longest_ago(folder: ImageFolder) -> None:
    old, older, new = (put(folder, key, 3000, age_s=age) for key, age in (("a", 20), ("b", 30), ("c", 10)))
    assert list(folder.images()) == [older, old, new]
    put(folder, "d", 3000, age_s=0)
    assert (old.exists(), older.exists(), new.exists()) == (True, False, True)
    folder.note_use("a")
    put(folder, "e", 3000, age_s=0)
    assert (old.exists(), new.exists()) == (True, False)


def test_an_image_in_use_is_not_removed(folder: ImageFolder) -> None:
    used, unused = put(folder, "a", 4000, age_s=30), put(folder, "b", 4000, age_s=20)
    with used.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        put(folder, "c", 4000, age_s=0)
        assert (used.exists(), unused.exists()) == (True, False)
    put(folder, "d", 4000, age_s=0)
    assert not used.exists()


def test_what_is_too_large_is_refused_and_nothing_removed(folder: ImageFolder) -> None:
    kept = put(folder, "a", 4000, age_s=30)
    with pytest.raises(OSError, match="more than all images may have"):
        put(folder, "b", 10_001, age_s=0)
    assert kept.exists()


def test_leftovers_of_writers_that_died_are_removed(folder: ImageFolder) -> None:
    left, written = folder.path / "a.1.tmp", folder.path / "b.2.tmp"
    left.write_bytes(b"x")
    with written.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        put(folder, "c", 10, age_s=0)
        assert (left.exists(), written.exists()) == (False, True)


def test_a_body_that_fails_leaves_nothing(folder: ImageFolder) -> None:
    with pytest.raises(ValueError, match="no"), folder.new_file("a", 10):
        raise ValueError("no")
    assert not list(folder.path.iterdir())


def test_the_second_writer_waits_for_the_first(folder: ImageFolder) -> None:
    order: list[str] = []
    waits = threading.Event()

    def second() -> None:
        with folder.writing("a", on_wait=waits.set):
            order.append("second")

    with folder.writing("a", on_wait=lambda: None):
        thread = threading.Thread(target=second)
        thread.start()
        assert waits.wait(5)
        order.append("first")
    thread.join(5)
    assert order == ["first", "second"]
