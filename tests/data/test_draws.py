"""Validation rows and limits are drawn by a hash of seed and row, by class where there are classes."""

from __future__ import annotations

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dtrain.config.schema import Data
from dtrain.data.draws import draw
from dtrain.data.scores import SCORED
from dtrain.data.sources import Source, load_sources, source_key, source_notes
from dtrain.data.tables import LABELED, TEXT, RowFormat
from dtrain.errors import ConfigError, DataError


def table(folder: Path, labels: list[str], name: str = "a.csv") -> Path:
    (folder / name).write_text("text,label\n" + "".join(f"t{k},{label}\n" for k, label in enumerate(labels)))
    return folder / name


def load(file: Path, row_format: RowFormat = LABELED, **settings: Any) -> dict[str, Source]:
    return load_sources(Data(path=file, **settings), row_format)


def counts(source: Source) -> Counter[str]:
    return Counter(source.rows["label"])


SORTED = ["neg"] * 60 + ["pos"] * 30 + ["rare"] * 10


def test_a_file_sorted_by_label_has_every_class_in_proportion_on_both_sides(tmp_path: Path) -> None:
    sources = load(table(tmp_path, SORTED), validation_fraction=0.1)

    assert counts(sources["validation"]) == {"neg": 6, "pos": 3, "rare": 1}
    assert counts(sources["train"]) == {"neg": 54, "pos": 27, "rare": 9}
    assert source_notes(sources) == []


def test_the_sides_share_no_row_lose_none_and_keep_the_order_of_the_file(tmp_path: Path) -> None:
    sources = load(table(tmp_path, SORTED), validation_fraction=0.3)
    lines = [list(source.rows["line"]) for source in sources.values()]

    assert sorted(lines[0] + lines[1]) == list(range(2, 102))
    assert lines == [sorted(lines[0]), sorted(lines[1])]


def test_a_limit_takes_rows_of_every_class_in_proportion(tmp_path: Path) -> None:
    limited = load(table(tmp_path, SORTED), limit=10)["train"]
    both = load(table(tmp_path, SORTED), limit=10, validation_fraction=0.5)

    assert counts(limited) == {"neg": 6, "pos": 3, "rare": 1}
    assert [counts(source) for source in both.values()] == [counts(limited)] * 2


def test_a_class_with_one_row_is_learned_and_its_absence_from_evaluation_is_said(tmp_path: Path) -> None:
    sources = load(table(tmp_path, ["a"] * 8 + ["b"] * 8 + ["only"]), validation_fraction=0.5)

    assert counts(sources["train"])["only"] == 1
    (note,) = source_notes(sources)
    assert "the split validation has no row of 1 class(es) that train has: only (1 rows)" in note


def test_a_class_that_only_the_validation_split_would_have_is_refused_with_the_cure(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"all rows of the label\(s\) rare into .*data\.split=stratified"):
        load(table(tmp_path, SORTED), validation_fraction=0.1, split="end")


def test_regression_draws_from_all_rows_and_language_models_keep_the_end(tmp_path: Path) -> None:
    file = table(tmp_path, [str(k) for k in range(100)])
    scores = load(file, SCORED, validation_fraction=0.5)["validation"].rows["label"][:]
    texts = load(file, TEXT, validation_fraction=0.5)["validation"].rows["text"][:]

    assert 15 < sum(score >= 50 for score in scores) < 35
    assert texts == [f"t{k}" for k in range(50, 100)]
    assert load(file, TEXT, limit=2)["train"].rows["text"][:] == ["t0", "t1"]


def test_a_draw_depends_on_seed_row_and_class_alone() -> None:
    rows = range(1000)
    first = draw(rows, 100, seed=0, classes=None).tolist()

    assert first == draw(rows, 100, seed=0, classes=["x"] * 1000).tolist()
    assert first != draw(rows, 100, seed=1, classes=None).tolist()
    assert set(draw(rows, 50, seed=0, classes=None).tolist()) <= set(first)  # a larger draw only adds
    kept = set(draw(range(990), 100, seed=0, classes=None).tolist())
    assert len(kept & set(first)) >= 98  # other rows hardly change it


def splitmix64(value: int) -> int:
    """Returns the published generator's first output for this state, in plain integers."""
    mask = 2**64 - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


@pytest.mark.parametrize("seed", [0, 7])
def test_the_draw_stays_what_it_is(seed: int) -> None:  # another one would move validation rows of users into training
    assert splitmix64(0) == 0xE220A8397B1DCDAF  # the generator's published first value
    key = int.from_bytes(hashlib.blake2b(f"{seed}/split".encode(), digest_size=8).digest(), "little")
    expected = sorted(range(2, 42), key=lambda line: splitmix64(line ^ key))[:9]

    assert [range(2, 42)[k] for k in draw(range(2, 42), 9, seed=seed, classes=None)] == sorted(expected)


@pytest.mark.parametrize("fraction", [0.05, 0.1, 0.37, 0.9])
def test_every_count_is_exact_and_shares_are_within_one_row_of_proportion(fraction: float) -> None:
    classes = ["a"] * 500 + ["b"] * 77 + ["c"] * 23
    count = int(600 * fraction)

    drawn = Counter(classes[k] for k in draw(range(600), count, seed=3, classes=classes, keeps_each=True))

    assert sum(drawn.values()) == count
    assert all(abs(drawn[name] - size * fraction) <= 1 for name, size in Counter(classes).items())


def test_rows_of_one_article_stay_together() -> None:
    numbers = [k // 5 for k in range(100)]

    taken = Counter(numbers[k] for k in draw(numbers, 50, seed=0, classes=None))

    assert set(taken.values()) == {5}


def test_what_cannot_be_drawn_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")

    with pytest.raises(ConfigError, match=r"data\.split=mixed: .*a\.txt is one text"):
        load(tmp_path / "a.txt", TEXT, split="mixed", validation_fraction=0.5)
    with pytest.raises(ConfigError, match=r"needs rows with one class each.*data\.split=mixed"):
        load(table(tmp_path, ["1", "2"]), SCORED, split="stratified", validation_fraction=0.5)
    with pytest.raises(DataError, match="each with another label"):
        load(table(tmp_path, ["1", "2"]), validation_fraction=0.5)


def test_the_cache_key_has_the_draw(tmp_path: Path) -> None:
    file = table(tmp_path, SORTED)
    keys = [source_key(Data(path=file, **more)) for more in ({}, {"split": "mixed"}, {"split_seed": 1})]

    assert keys[0] != keys[1] != keys[2] != keys[0]
