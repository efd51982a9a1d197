"""The store of frozen results: what is read is what was written, or it counts as missing."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from dtrain.data.frozen_store import FrozenStore, delete_damaged, in_groups, make_room, stored_bytes

SIZE = 8
KEYS = [bytes([number]) * 16 for number in range(3)]
COUNTS = [2, 1, 3]
VECTORS = np.arange(6 * SIZE, dtype=np.uint8).reshape(6, SIZE)


def written(folder: Path) -> FrozenStore:
    store = FrozenStore(folder, vector_bytes=SIZE)
    store.write(KEYS, COUNTS, VECTORS)
    return loaded(folder)


def loaded(folder: Path) -> FrozenStore:
    store = FrozenStore(folder, vector_bytes=SIZE)
    store.load()
    return store


def read(store: FrozenStore, *rows: int) -> npt.NDArray[np.uint8] | None:
    return store.read([KEYS[row] for row in rows], [COUNTS[row] for row in rows])


def test_rows_are_read_in_the_order_in_which_they_are_asked_for(tmp_path: Path) -> None:
    found = read(written(tmp_path), 2, 0)

    assert found is not None
    assert (found == VECTORS[[3, 4, 5, 0, 1]]).all()


def test_a_key_that_ends_in_zero_bytes_is_found(tmp_path: Path) -> None:
    store, key = FrozenStore(tmp_path, vector_bytes=SIZE), b"\x01" + bytes(15)
    store.write([key], [1], VECTORS[:1])
    store.load()

    assert key in store


def test_an_unknown_row_or_another_number_of_vectors_is_missing(tmp_path: Path) -> None:
    store = written(tmp_path)

    assert store.read([KEYS[0], b"x" * 16], [2, 1]) is None
    assert store.read([KEYS[0]], [1]) is None


def test_parts_of_several_writers_are_read_together_and_equal_ones_are_stored_once(tmp_path: Path) -> None:
    store = written(tmp_path)
    size = stored_bytes(tmp_path)
    store.write(KEYS, COUNTS, VECTORS)
    assert stored_bytes(tmp_path) == size
    store.write([b"y" * 16], [1], VECTORS[:1] + 100)
    store.load()

    found = store.read([b"y" * 16, KEYS[1]], [1, 1])

    assert found is not None
    assert (found == np.stack([VECTORS[0] + 100, VECTORS[2]])).all()


@pytest.mark.parametrize("position", [0, 17, 30, 50, 90, 140])
def test_one_changed_byte_anywhere_deletes_the_part(tmp_path: Path, position: int) -> None:
    written(tmp_path)
    file = next(tmp_path.glob("*.part"))
    content = bytearray(file.read_bytes())
    content[position] ^= 4
    file.write_bytes(content)

    damaged = delete_damaged(tmp_path, vector_bytes=SIZE)

    assert len(damaged) == 1
    assert str(file) in damaged[0]
    assert read(loaded(tmp_path), 0) is None


@pytest.mark.parametrize("size", [0, 10, 40, 150])
def test_a_part_that_is_cut_off_is_not_read(tmp_path: Path, size: int) -> None:
    written(tmp_path)
    file = next(tmp_path.glob("*.part"))
    os.truncate(file, size)

    assert read(loaded(tmp_path), 1) is None
    assert len(delete_damaged(tmp_path, vector_bytes=SIZE)) == 1
    assert not file.exists()


def test_a_sound_store_has_no_damage_and_an_old_unfinished_part_is_removed(tmp_path: Path) -> None:
    written(tmp_path)
    old, new = tmp_path / ".building-old", tmp_path / ".building-new"
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (time.time() - 1e6,) * 2)

    assert delete_damaged(tmp_path, vector_bytes=SIZE) == []
    assert (old.exists(), new.exists()) == (False, True)
    assert read(loaded(tmp_path), 0) is not None


@pytest.mark.parametrize("rows", [slice(0, 3), slice(1, 3)], ids=["same rows", "some of them"])
def test_of_a_row_that_two_jobs_wrote_what_was_written_first_is_read_by_both_and_later(
    tmp_path: Path, rows: slice
) -> None:
    first = written(tmp_path)
    (file,) = tmp_path.glob("*.part")
    os.utime(file, (1.0, 1.0))
    keys, counts = KEYS[rows], COUNTS[rows]

    second = FrozenStore(tmp_path, vector_bytes=SIZE)
    second.write(keys, counts, VECTORS[: sum(counts)] + 100)
    second.load()

    for store in (first, second, loaded(tmp_path)):
        found = read(store, 0, 1, 2)
        assert found is not None
        assert (found == VECTORS).all()
    assert not list(tmp_path.glob(".building*"))


def test_a_failed_write_leaves_nothing(tmp_path: Path) -> None:
    gone = tmp_path / "gone"

    with pytest.raises(FileNotFoundError):
        FrozenStore(gone, vector_bytes=SIZE).write(KEYS, COUNTS, VECTORS)


def test_the_stores_that_were_not_used_for_longest_make_room(tmp_path: Path) -> None:
    new, middle, old, kept = (letter * 32 for letter in "abcd")
    for age, name in enumerate([new, middle, old, kept]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.part").write_bytes(bytes(100))
        os.utime(tmp_path / name, (time.time() - 1000 * age,) * 2)

    deleted = make_room(tmp_path, tmp_path / kept, limit=150)

    assert [path.name for path in deleted] == [old, middle]
    assert sorted(path.name for path in tmp_path.iterdir()) == [new, kept]


def test_groups_have_rows_of_one_length_and_depend_on_the_lengths_alone() -> None:
    assert in_groups([3, 5, 3, 9, 3], tokens=6) == [[0, 2], [4], [1], [3]]


@pytest.mark.parametrize("missing", [1, 6 * SIZE, 6 * SIZE + 1, 6 * SIZE + 30, 6 * SIZE + 60, 6 * SIZE + 61])
def test_a_part_that_was_cut_off_anywhere_is_deleted(tmp_path: Path, missing: int) -> None:
    written(tmp_path)
    file = next(tmp_path.glob("*.part"))
    file.write_bytes(file.read_bytes()[:-missing])

    assert KEYS[0] not in loaded(tmp_path)
    assert len(delete_damaged(tmp_path, vector_bytes=SIZE)) == 1


def test_room_is_made_among_stores_only(tmp_path: Path) -> None:
    keep, thesis, mixed = tmp_path / ("a" * 32), tmp_path / "thesis", tmp_path / ("b" * 32)
    for folder in (keep, thesis, mixed):
        folder.mkdir()
    (thesis / "chapter.part").write_text("x" * 1000)
    (mixed / "notes.txt").write_text("x" * 1000)
    (tmp_path / ("c" * 32)).symlink_to(thesis)

    assert make_room(tmp_path, keep, limit=0) == []
    assert (thesis / "chapter.part").is_file()
