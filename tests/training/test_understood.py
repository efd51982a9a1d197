"""The banner says what was read: columns, rows, labels, baseline, tokens, and examples with their targets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dtrain.config.schema import Config
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.tasks.build import build_task
from dtrain.training.understood import describe_data
from tests.support import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_model(tmp_path_factory.mktemp("model"))


def described(folder: Path, model: Path, task: dict[str, Any], *, has_decoder: bool = False, **data: Any) -> list[str]:
    settings: dict[str, Any] = {"max_length": 16, "cache_dir": folder / "cache", "path": folder / "a.csv", **data}
    config = Config.model_validate({"task": task, "model": {"name_or_path": str(model)}, "data": settings})
    lines = [describe_data(build_task(config, ONE_PROCESS), has_decoder=has_decoder) for _ in range(2)]
    assert lines[0] == lines[1]  # the second start reads the cache
    return lines[0]


def write(folder: Path, rows: list[tuple[str, str]], header: str = "id,review,verdict") -> None:
    (folder / "a.csv").write_text(
        header + "\n" + "".join(f"{k},{text},{label}\n" for k, (text, label) in enumerate(rows))
    )


CLASSES = [("the cat sees a dog", "good")] * 30 + [("the old bird", "bad")] * 10
COLUMNS = {"text": "review", "label": "verdict"}


def test_columns_rows_labels_baseline_tokens_and_examples(tmp_path: Path, model: Path) -> None:
    write(tmp_path, [*CLASSES, ("no label", "")])

    found = described(
        tmp_path, model, {"name": "classification"}, columns=COLUMNS, validation_fraction=0.2, max_bad_rows=1
    )

    assert found == [
        "  columns  text: 'review', label: 'verdict'",
        "  train    32 of 40 rows, 1 bad rows skipped; labels 'good' 24, 'bad' 8",
        "  validation 8 of 40 rows, 1 bad rows skipped; labels 'good' 6, 'bad' 2",
        "  baseline accuracy 0.7500 on validation by always predicting 'good'",
        "  tokens   6.5 per example, at most 7 (of 32 examples), 0.0% unknown",
        "  example  '[CLS] the cat sees a dog [SEP]' -> [[good]]",
        "  example  '[CLS] the cat sees a dog [SEP]' -> [[good]]",
    ]


def test_a_text_in_a_language_that_the_tokenizer_does_not_know_is_said(tmp_path: Path, model: Path) -> None:
    write(tmp_path, [("\u8fd9\u4e2a\u7535\u5f71\u597d", "good"), ("\u4e0d\u597d", "bad")])

    found = described(tmp_path, model, {"name": "classification"}, columns=COLUMNS)

    (warning,) = [line for line in found if line.startswith("warning")]
    assert "does not know 100% of the tokens" in warning
    assert "model.name_or_path=bert-base-chinese" in warning


def test_the_share_of_texts_that_may_be_cut_is_said(tmp_path: Path, model: Path) -> None:
    write(tmp_path, [("the cat", "good")] * 3 + [("the cat " * 9, "bad")])

    found = described(tmp_path, model, {"name": "classification"}, columns=COLUMNS, max_length=8)

    assert any("25.0% fill max_length=8" in line for line in found)


def test_targets_inside_a_text_are_marked(tmp_path: Path, model: Path) -> None:
    rows = [{"tokens": ["the", "cat", "sees"], "tags": ["O", "B-X", "O"]}] * 2
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))

    found = described(tmp_path, model, {"name": "token_classification"}, path=tmp_path / "a.jsonl")

    assert found[-1] == "  example  [CLS][[the cat sees]][SEP]"


def test_a_number_is_shown_as_the_target(tmp_path: Path, model: Path) -> None:
    write(tmp_path, [("the cat", "2.5"), ("a dog", "-1")])

    found = described(tmp_path, model, {"name": "regression"}, columns=COLUMNS)

    assert found[-2:] == ["  example  '[CLS] the cat [SEP]' -> [[2.5]]", "  example  '[CLS] a dog [SEP]' -> [[-1]]"]


def test_the_users_own_task_has_nothing_to_show() -> None:
    class Own:
        def __init__(self) -> None:
            self.splits = {"train": tiny.sentences(3)}

    assert describe_data(Own(), has_decoder=False) == []  # type: ignore[arg-type]
