"""Multiple choice: batches of choices, sums held against a hand's arithmetic, SWAG's files and every bad row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, Value
from sklearn.metrics import accuracy_score
from torch import nn

from dtrain.config.schema import Config, Data
from dtrain.config.task import MultipleChoice
from dtrain.data.choices import CHOICES
from dtrain.data.resolve_source import source_kind
from dtrain.data.sources import Source, load_sources
from dtrain.data.split_readers import hub_name
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.errors import ConfigError, DataError
from dtrain.tasks.multiple_choice import MultipleChoiceTask, prepare_multiple_choice
from dtrain.tasks.protocol import Targets
from tests.support import tiny
from tests.support.tiny import Table

LOGITS = [[2.0, 0.0, 1.0], [0.5, 1.5, -1.0]]
HEADER = ",video-id,fold-ind,startphrase,sent1,sent2,gold-source,ending0,ending1,ending2,ending3,label\n"
ROW = '0,v,1,"the cat. a",the cat,a,gold,dog runs,"bird sleeps, ""never""",old cat,big dog,2\n'


class Says(nn.Module):
    def __init__(self, logits: Sequence[Sequence[float]]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, **inputs: torch.Tensor) -> Any:
        assert inputs["input_ids"].dim() == 3
        return SimpleNamespace(logits=self.logits)


def task(labels: Sequence[int | None] = (2, 1)) -> MultipleChoiceTask:
    rows = Table({"input_ids": [[[2, 5, 3], [2, 6, 3], [2, 3]]] * len(labels), "label": list(labels)})
    return MultipleChoiceTask({"train": rows, "validation": rows}, tiny.tokenizer(), max_length=8)


def batch(labels: Sequence[int | None]) -> dict[str, torch.Tensor]:
    return task().collate(task(labels).splits["train"][list(range(len(labels)))], tiny.HERE)


def nll(logits: Sequence[float], label: int) -> float:
    return math.log(sum(math.exp(logit) for logit in logits)) - logits[label]


# Batches and sums


def test_choices_of_all_examples_are_padded_to_the_longest() -> None:
    made = task().collate(
        {"input_ids": [[[2, 3], [2, 5, 3]], [[2, 5, 6, 3], [2, 3]]], "label": [1, None], "line": [1, 2]}, tiny.HERE
    )

    assert made["input_ids"].tolist() == [[[2, 3, 0, 0], [2, 5, 3, 0]], [[2, 5, 6, 3], [2, 3, 0, 0]]]
    assert made["attention_mask"].tolist() == [[[1, 1, 0, 0], [1, 1, 1, 0]], [[1, 1, 1, 1], [1, 1, 0, 0]]]
    assert made["labels"].tolist() == [1, -100]
    assert set(made) == {"input_ids", "attention_mask", "labels"}


def test_token_types_are_padded_and_one_example_is_a_batch() -> None:
    made = task().collate(
        {"input_ids": [[[2, 5, 3, 6, 3], [2, 3]]], "token_type_ids": [[[0, 0, 0, 1, 1], [0, 0]]], "label": [0]},
        tiny.HERE,
    )

    assert made["token_type_ids"].tolist() == [[[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]]
    assert made["labels"].shape == (1,)


def test_the_loss_is_the_sum_over_examples_not_over_choices() -> None:
    loss = task().loss(Says(LOGITS), batch([2, 1]))

    assert float(loss) == pytest.approx(nll(LOGITS[0], 2) + nll(LOGITS[1], 1), rel=1e-6)
    assert task().targets(batch([2, 1])) == Targets(2.0, 2)


def test_an_example_without_a_label_is_predicted_but_is_not_a_target() -> None:
    judge = task([2, None])

    scored = judge.score(Says(LOGITS), batch([2, None]), lock_step=False)

    assert judge.targets(batch([2, None])) == Targets(1.0, 1)
    assert scored.loss.dtype == torch.float64
    assert scored.loss.tolist() == pytest.approx([nll(LOGITS[0], 2), 0.0], rel=1e-6)
    assert scored.targets.tolist() == [1, 0]
    assert scored.prediction is not None
    assert scored.prediction.tolist() == [0, 1]
    assert judge.metrics("validation", loss=0.0, predictions=[2, 1]) == {"accuracy": 1.0}
    assert judge.records("validation", [0, 1]) == [
        {"prediction": 0, "reference": 2},
        {"prediction": 1, "reference": None},
    ]
    assert task([None]).metrics("validation", loss=0.0, predictions=[1]) == {}


@pytest.mark.parametrize("found", [[2, 1, 0], [0, 0, 0], [2, 1, 1]])
def test_accuracy_is_that_of_scikit_learn(found: list[int]) -> None:
    accuracy = task([2, 1, 1]).metrics("validation", loss=0.0, predictions=found)["accuracy"]

    assert accuracy == pytest.approx(accuracy_score([2, 1, 1], found), abs=1e-12)


# From files


def write(folder: Path, **splits: str) -> Path:
    for split, text in splits.items():
        (folder / f"{split}.csv").write_text(text, encoding="utf-8")
    return folder


def load(folder: Path, **data: Any) -> dict[str, Source]:
    return load_sources(Data.model_validate({"path": str(folder), **data}), CHOICES)


def test_swag_is_read_from_its_files_and_pairs_are_tokenized(tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "bert"}')
    write(tmp_path, train=HEADER + ROW, val=HEADER + ROW.replace(",2\n", ",0\n"))
    config = Config.model_validate(
        {
            "task": {"name": "multiple_choice"},
            "data": {"name": "swag", "path": str(tmp_path), "cache_dir": str(tmp_path / "cache"), "max_length": 7},
            "model": {"name_or_path": str(tmp_path / "model"), "from_scratch": True},
        }
    )
    assert isinstance(config.task, MultipleChoice)

    made = prepare_multiple_choice(config, config.task, ONE_PROCESS)

    rows = made.splits["train"][[0]]
    words = {word: 5 + number for number, word in enumerate(tiny.WORDS)}
    first = [2, words["the"], words["cat"], 3, words["a"], words["dog"], 3]  # the longer text is cut first
    assert rows["label"] == [2]
    assert len(rows["input_ids"][0]) == 4
    assert rows["input_ids"][0][0] == first
    assert rows["token_type_ids"][0][0] == [0, 0, 0, 0, 1, 1, 1]
    assert made.splits["validation"][[0]]["label"] == [0]
    assert made.collate(rows, tiny.HERE)["input_ids"].shape == (1, 4, 7)


def test_quotes_and_commas_belong_to_an_ending(tmp_path: Path) -> None:
    row = load(write(tmp_path, train=HEADER + ROW))["train"].rows[0]

    assert row["endings"] == ["dog runs", 'bird sleeps, "never"', "old cat", "big dog"]
    assert (row["sent1"], row["sent2"], row["label"], row["line"]) == ("the cat", "a", 2, 2)


def test_without_a_path_swag_comes_from_the_hub() -> None:
    assert source_kind(Data(name="swag")) == "hub"
    assert hub_name(Data(name="swag")) == ("allenai/swag", "regular")
    assert hub_name(Data(name="swag", config="full")) == ("allenai/swag", "full")


def test_the_number_of_choices_is_read_from_the_columns_which_may_have_other_names(tmp_path: Path) -> None:
    write(tmp_path, train="context,sent2,a,b,label\nthe cat,,runs,sleeps,1\n")

    row = load(tmp_path, columns={"sent1": "context", "ending0": "a", "ending1": "b"})["train"].rows[0]

    assert row["endings"] == ["runs", "sleeps"]
    assert row["label"] == 1


@pytest.mark.parametrize("test", [HEADER.replace(",label", "") + ROW.replace(",2\n", "\n"), HEADER + ROW[:-2] + "\n"])
def test_a_test_split_has_no_labels(tmp_path: Path, test: str) -> None:
    write(tmp_path, train=HEADER + ROW, test=test)

    rows = load(tmp_path, splits={"train": "train.csv", "test": "test.csv"})["test"].rows

    assert rows.column_names == ["sent1", "sent2", "endings", "line"]


def test_class_numbers_of_a_saved_data_set_are_choices(tmp_path: Path) -> None:
    features = Features(
        {name: Value("string") for name in ("sent1", "sent2", "ending0", "ending1")}
        | {"label": ClassLabel(names=["0", "1"])}
    )
    columns = {"sent1": ["a"], "sent2": ["b"], "ending0": ["c"], "ending1": ["d"], "label": [1]}
    Dataset.from_dict(columns, features=features).save_to_disk(tmp_path / "saved")

    assert load(tmp_path / "saved")["train"].rows[0]["label"] == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (HEADER + ROW + ROW.replace("old cat", ""), r"train.csv, line 3: ending2 is missing: each of the 4 endings"),
        (HEADER + ROW[:-2] + "4\n", r"line 2: label is '4', expected the number of the right ending, 0 to 3 for 4"),
        (HEADER + ROW[:-2] + "-1\n", r"line 2: label is '-1', expected the number"),
        (HEADER + ROW[:-2] + "1.5\n", r"line 2: label is '1.5', expected the number"),
        (HEADER + ROW[:-2] + "gold\n", r"line 2: label is 'gold', expected the number"),
        (HEADER + ROW + ROW[:-2] + "\n", r"line 3: no label \(label is ''\)"),
        ("sent1,sent2,ending0,label\na,b,c,0\n", r"train.csv has no column ending1\. .*at least two endings.*ending0"),
        ("sent1,sent2,ending0,ending2,label\na,b,c,d,0\n", r"has no column ending1"),
        ("sent1,sent2,ending1,ending2,label\na,b,c,d,0\n", r"has no column ending0"),
        ("sent1,ending0,ending1,label\na,b,c,0\n", r"has no column sent2"),
        ("sent1,sent2,ending0,ending1\na,b,c,d\n", r"has no column label"),
    ],
)
def test_faults_in_a_file_are_named_by_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        load(write(tmp_path, train=text))


def test_a_bad_row_can_be_skipped(tmp_path: Path) -> None:
    write(tmp_path, train=HEADER + ROW + ROW[:-2] + "7\n" + ROW)

    found = load(tmp_path, max_bad_rows=1)["train"]

    assert found.rows["line"][:] == [2, 4]
    assert found.skipped == 1


def test_a_column_that_is_not_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data.columns.text is not a column that this task reads"):
        load(write(tmp_path, train=HEADER + ROW), columns={"text": "sent1"})
