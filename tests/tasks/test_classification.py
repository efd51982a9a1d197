"""Classification: batches, sums held against a hand's arithmetic, metrics in every degenerate case, data from files."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch import nn

from dtrain.config.schema import Config
from dtrain.config.task import Classification
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.engine.forward_only import ForwardOnly
from dtrain.errors import ConfigError, DataError
from dtrain.tasks.classification import ClassificationTask, prepare_classification
from dtrain.tasks.protocol import Targets
from dtrain.training.evaluation import evaluate
from tests.support import tiny
from tests.support.fixed_logits import Says
from tests.support.tiny import Table

LOGITS = [[2.0, 0.0], [0.5, 1.5], [-1.0, 1.0]]


def task(
    labels: Sequence[int | None] = (0, 1, 1), *, names: Sequence[str] = ("no", "yes"), **settings: Any
) -> ClassificationTask:
    rows = Table({"input_ids": [[2, 5, 3]] * len(labels), "label": list(labels)})
    options = Classification(name="classification", **settings)
    return ClassificationTask({"train": rows, "validation": rows}, tiny.tokenizer(), names, options, max_length=8)


def batch(labels: Sequence[int | None]) -> dict[str, torch.Tensor]:
    return task().collate({"input_ids": [[2, 5, 3]] * len(labels), "label": list(labels)}, tiny.HERE)


def nll(logits: Sequence[float], label: int) -> float:
    return math.log(sum(math.exp(logit) for logit in logits)) - logits[label]


# Batches


def test_a_batch_is_padded_to_its_longest_and_the_mask_says_where() -> None:
    made = task().collate({"input_ids": [[2, 5, 3], [2, 5, 6, 7, 3]], "label": [1, None], "line": [1, 2]}, tiny.HERE)

    assert made["input_ids"].tolist() == [[2, 5, 3, 0, 0], [2, 5, 6, 7, 3]]
    assert made["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert made["labels"].tolist() == [1, -100]
    assert "line" not in made


def test_token_types_of_a_pair_are_padded_along() -> None:
    made = task().collate(
        {"input_ids": [[2, 5, 3, 6, 3], [2, 3]], "token_type_ids": [[0, 0, 0, 1, 1], [0, 0]], "label": [0, 1]},
        tiny.HERE,
    )

    assert made["token_type_ids"].tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]
    assert set(made) == {"input_ids", "token_type_ids", "attention_mask", "labels"}


def test_a_batch_of_one_is_a_batch() -> None:
    made = task().collate({"input_ids": [[2, 9, 3]], "label": [0]}, tiny.HERE)

    assert {name: tuple(tensor.shape) for name, tensor in made.items()} == {
        "input_ids": (1, 3),
        "attention_mask": (1, 3),
        "labels": (1,),
    }


# Sums


def test_the_loss_is_the_sum_over_examples_and_the_weight_their_number() -> None:
    labels = [0, 0, 1]

    loss = task().loss(Says(LOGITS), batch(labels))

    assert float(loss) == pytest.approx(sum(map(nll, LOGITS, labels)), rel=1e-6)
    assert task().targets(batch(labels)) == Targets(3.0, 3)


def test_class_weights_apply_to_the_loss_and_the_divisor_as_in_torch() -> None:
    weighted, labels = task(class_weights={"yes": 2.5, "no": 0.5}), [0, 0, 1]

    loss = weighted.loss(Says(LOGITS), batch(labels))

    by_hand = 0.5 * nll(LOGITS[0], 0) + 0.5 * nll(LOGITS[1], 0) + 2.5 * nll(LOGITS[2], 1)
    assert float(loss) == pytest.approx(by_hand, rel=1e-6)
    assert weighted.targets(batch(labels)) == Targets(3.5, 3)
    torchs = nn.functional.cross_entropy(torch.tensor(LOGITS), torch.tensor(labels), weight=torch.tensor([0.5, 2.5]))
    assert float(loss / 3.5) == pytest.approx(float(torchs), rel=1e-6)
    assert float(loss / 3.5) != pytest.approx(by_hand / 3, rel=1e-2)


def test_balanced_weights_are_those_of_scikit_learn() -> None:
    labels = [0, 0, 0, 0, 1, 2, 2]
    balanced = task(labels, names=("a", "b", "c"), class_weights="balanced")

    found = [balanced.targets(batch([label])).weight for label in (0, 1, 2)]

    expected = compute_class_weight("balanced", classes=torch.arange(3).numpy(), y=labels)
    assert found == pytest.approx(expected.tolist(), rel=1e-6)
    assert found == pytest.approx([7 / 12, 7 / 3, 7 / 6], rel=1e-6)


def test_a_label_without_rows_does_not_break_balanced_weights() -> None:
    balanced = task([0, 0], class_weights="balanced")

    assert balanced.targets(batch([0])).weight == 0.5


def test_balanced_weights_need_no_training_split_in_an_evaluation() -> None:
    rows = Table({"input_ids": [[2, 5, 3]], "label": [None]})
    options = Classification(name="classification", class_weights="balanced")

    judge = ClassificationTask({"test": rows}, tiny.tokenizer(), ["no", "yes"], options, max_length=8)

    assert judge.targets(batch([0])).weight == 1.0


def test_class_weights_must_name_every_label() -> None:
    with pytest.raises(ConfigError, match=r"task.class_weights names \['maybe', 'no'\].*labels are \['no', 'yes'\]"):
        task(class_weights={"no": 1.0, "maybe": 2.0})


def test_label_smoothing_is_for_training_only() -> None:
    smooth, labels = task(label_smoothing=0.2), [0, 0, 1]

    loss = smooth.loss(Says(LOGITS), batch(labels))
    scored = smooth.score(Says(LOGITS), batch(labels), lock_step=False)

    plain = [nll(logits, label) for logits, label in zip(LOGITS, labels, strict=True)]
    spread = [(nll(logits, 0) + nll(logits, 1)) / 2 for logits in LOGITS]
    assert float(loss) == pytest.approx(0.8 * sum(plain) + 0.2 * sum(spread), rel=1e-6)
    assert smooth.targets(batch(labels)).weight == 3.0
    assert scored.loss.tolist() == pytest.approx(plain, rel=1e-6)


def test_scores_are_unweighted_and_per_example() -> None:
    scored = task(class_weights={"yes": 2.5, "no": 0.5}).score(Says(LOGITS), batch([1, None, 1]), lock_step=False)

    assert scored.loss.dtype == torch.float64
    assert scored.loss.tolist() == pytest.approx([nll(LOGITS[0], 1), 0.0, nll(LOGITS[2], 1)], rel=1e-6)
    assert scored.targets.tolist() == [1, 0, 1]
    assert scored.prediction is not None
    assert scored.prediction.tolist() == [0, 1, 1]


@pytest.mark.parametrize("settings", [{}, {"class_weights": {"no": 2.0, "yes": 3.0}, "label_smoothing": 0.1}])
def test_an_example_without_a_label_is_not_a_target(settings: dict[str, Any]) -> None:
    judge = task(**settings)

    alone, some = judge.loss(Says([LOGITS[0]]), batch([0])), judge.loss(Says(LOGITS), batch([0, None, None]))
    none = judge.loss(Says(LOGITS), batch([None, None, None]))

    assert float(some) == pytest.approx(float(alone), rel=1e-6)
    assert judge.targets(batch([0, None, None])).weight == judge.targets(batch([0])).weight
    assert float(none) == 0.0
    assert judge.targets(batch([None, None, None])) == Targets(0.0, 0)


@pytest.mark.parametrize(
    ("given", "summed"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_sums_are_taken_in_float32_and_float64_stays(given: torch.dtype, summed: torch.dtype) -> None:
    judge = task(class_weights={"no": 2.0, "yes": 3.0})

    assert judge.loss(Says(LOGITS, given), batch([0, 0, 1])).dtype == summed


def test_training_and_evaluation_have_the_same_loss_without_weights() -> None:
    loss = task().loss(Says(LOGITS), batch([0, 1, 1]))
    scored = task().score(Says(LOGITS), batch([0, 1, 1]), lock_step=False).loss

    assert float(loss) == pytest.approx(math.fsum(scored.tolist()), rel=1e-6)


# Metrics


def metrics(
    truth: Sequence[int | None], found: Sequence[int], names: Sequence[str] = ("no", "yes")
) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # each rank would print them
        return task(truth, names=names).metrics("validation", loss=0.0, predictions=found)


def test_metrics_of_two_labels_by_hand() -> None:
    # tp 2, fp 1, fn 1, tn 1
    found = metrics([1, 1, 1, 0, 0], [1, 1, 0, 1, 0])

    assert found["accuracy"] == pytest.approx(3 / 5, abs=1e-12)
    assert found["precision"] == pytest.approx(2 / 3, abs=1e-12)
    assert found["recall"] == pytest.approx(2 / 3, abs=1e-12)
    assert found["f1"] == pytest.approx(2 / 3, abs=1e-12)
    assert found["matthews_correlation"] == pytest.approx((2 * 1 - 1 * 1) / math.sqrt(3 * 3 * 2 * 2), abs=1e-12)


@pytest.mark.parametrize(
    ("truth", "found", "expected"),
    [
        ([1, 1, 1], [1, 1, 1], {"accuracy": 1.0, "f1": 1.0, "precision": 1.0, "recall": 1.0}),
        ([0, 0, 0], [0, 0, 0], {"accuracy": 1.0, "f1": 0.0, "precision": 0.0, "recall": 0.0}),
        ([0, 1, 0, 1], [1, 1, 1, 1], {"accuracy": 0.5, "f1": 2 / 3, "precision": 0.5, "recall": 1.0}),
        ([0, 1, 0, 1], [0, 0, 0, 0], {"accuracy": 0.5, "f1": 0.0, "precision": 0.0, "recall": 0.0}),
        ([0, 0], [1, 1], {"accuracy": 0.0, "f1": 0.0, "precision": 0.0, "recall": 0.0}),
        ([1], [1], {"accuracy": 1.0, "f1": 1.0, "precision": 1.0, "recall": 1.0}),
    ],
)
def test_degenerate_predictions_have_metrics_and_matthews_is_zero(
    truth: list[int], found: list[int], expected: dict[str, float]
) -> None:
    assert metrics(truth, found) == pytest.approx({**expected, "matthews_correlation": 0.0}, abs=1e-12)


def test_with_three_labels_f1_precision_and_recall_are_macro_averages() -> None:
    # a: tp 1, fp 1, fn 1. b: tp 1, fp 1, fn 0. c: tp 1, fp 0, fn 1.
    found = metrics([0, 0, 1, 2, 2], [0, 1, 1, 2, 0], names=("a", "b", "c"))

    assert found["accuracy"] == pytest.approx(3 / 5, abs=1e-12)
    assert found["precision"] == pytest.approx((1 / 2 + 1 / 2 + 1) / 3, abs=1e-12)
    assert found["recall"] == pytest.approx((1 / 2 + 1 + 1 / 2) / 3, abs=1e-12)
    assert found["f1"] == pytest.approx((1 / 2 + 2 / 3 + 2 / 3) / 3, abs=1e-12)


def test_a_label_that_never_occurs_is_left_out_of_the_average() -> None:
    found = metrics([0, 1, 0, 1], [0, 1, 0, 1], names=("a", "b", "c"))

    assert found["accuracy"] == 1.0
    assert found["f1"] == 1.0


def test_rows_without_a_label_are_predicted_but_not_in_the_metrics() -> None:
    assert metrics([1, None, 0], [1, 0, 0])["accuracy"] == 1.0
    assert metrics([None, None], [1, 0]) == {}
    assert task([None, 1]).records("validation", [1, 0]) == [
        {"prediction": "yes", "reference": None},
        {"prediction": "no", "reference": "yes"},
    ]


# From files


def config(folder: Path, **sections: Any) -> Config:
    data = {"path": str(folder), "cache_dir": str(folder / "cache"), "max_length": 6, **sections.pop("data", {})}
    model = {"name_or_path": str(folder / "model"), **sections.pop("model", {})}
    return Config.model_validate({"task": {"name": "classification"}, "data": data, "model": model, **sections})


def prepare(folder: Path, **sections: Any) -> ClassificationTask:
    settings = config(folder, **sections)
    assert isinstance(settings.task, Classification)
    return prepare_classification(settings, settings.task, ONE_PROCESS)


def write(folder: Path, **splits: str) -> Path:
    for split, text in splits.items():
        (folder / f"{split}.csv").write_text(text)
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three splits of labelled sentences and a tokenizer."""
    tiny.tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "bert"}')
    (tmp_path / "model" / "model.safetensors").touch()
    header = "sentence,label\n"
    return write(
        tmp_path,
        train=f"{header}the cat runs,yes\na dog sleeps,no\nold birds near the big red cat,yes\n",
        dev=f"{header}a cat,no\n",
    )


def test_sentences_of_a_file_become_ids_and_labels_in_order(folder: Path) -> None:
    made = prepare(folder)

    words = {word: 5 + number for number, word in enumerate(tiny.WORDS)}
    rows = made.splits["train"][[0, 1, 2]]
    assert list(made.splits) == ["train", "validation"]
    assert made.labels == ("no", "yes")
    assert rows["input_ids"][0] == [2, words["the"], words["cat"], words["runs"], 3]
    assert rows["label"] == [1, 0, 1]
    assert len(rows["input_ids"][2]) == 6  # cut to data.max_length
    assert made.head_config == {"num_labels": 2, "id2label": {0: "no", 1: "yes"}, "label2id": {"no": 0, "yes": 1}}
    assert made.tokenizer.get_vocab() == tiny.tokenizer().get_vocab()
    assert made.collate(made.splits["train"][[0, 1]], tiny.HERE)["labels"].tolist() == [1, 0]


def test_a_trained_models_label_order_is_kept_by_name(folder: Path) -> None:
    (folder / "model" / "config.json").write_text(
        '{"model_type": "bert", "id2label": {"0": "yes", "1": "no"}, "label2id": {"yes": 0, "no": 1}}'
    )

    made = prepare(folder)

    assert made.labels == ("yes", "no")
    assert made.splits["train"][[0, 1, 2]]["label"] == [0, 1, 0]
    assert made.head_config["id2label"] == {0: "yes", 1: "no"}


@pytest.mark.parametrize("names", [("LABEL_0", "LABEL_1"), ("yes", "perhaps")])
def test_other_labels_of_a_model_do_not_replace_those_of_the_data(folder: Path, names: tuple[str, str]) -> None:
    (folder / "model" / "config.json").write_text(
        f'{{"model_type": "bert", "id2label": {{"0": "{names[0]}", "1": "{names[1]}"}}}}'
    )

    assert prepare(folder).labels == ("no", "yes")


def test_the_texts_of_a_pair_have_different_token_types(folder: Path) -> None:
    write(folder, train="a,b,label\nthe cat,runs,yes\na dog,sleeps,no\n")
    columns = {"data": {"columns": {"text": "a", "text_pair": "b"}, "splits": {"train": "train.csv"}}}

    rows = prepare(folder, **columns).splits["train"][[0]]

    assert rows["token_type_ids"] == [[0, 0, 0, 0, 1, 1]]


def test_a_character_tokenizer_has_the_characters_of_both_texts_and_a_pad_token(folder: Path) -> None:
    write(folder, train="a,b,label\nxy,z,yes\nx,zw,no\n")
    columns = {"columns": {"text": "a", "text_pair": "b"}, "splits": {"train": "train.csv"}}

    made = prepare(folder, data=columns, model={"tokenizer": "char"})

    assert set("xyzw") <= set(made.tokenizer.get_vocab())
    rows = made.splits["train"][[0, 1]]["input_ids"]
    assert all(made.tokenizer.unk_token_id not in ids for ids in rows)
    assert made.collate(made.splits["train"][[0, 1]], tiny.HERE)["input_ids"].shape[0] == 2


def test_a_second_start_uses_the_cache(folder: Path) -> None:
    first = prepare(folder)
    made = {path: path.stat().st_mtime_ns for path in (folder / "cache").rglob("*.arrow")}

    second = prepare(folder)

    assert made
    assert {path: path.stat().st_mtime_ns for path in (folder / "cache").rglob("*.arrow")} == made
    assert second.splits["train"][[2]] == first.splits["train"][[2]]


def test_changed_data_tokenizer_or_length_does_not_use_the_cache(folder: Path) -> None:
    prepare(folder)
    longer = prepare(folder, data={"max_length": 16})
    write(folder, train="sentence,label\nlikes,yes\nlikes,no\n")
    other = prepare(folder)

    assert len(longer.splits["train"][[2]]["input_ids"][0]) == 9
    assert len(other.splits["train"]) == 2


def test_a_label_unknown_in_training_is_named_by_line(folder: Path) -> None:
    write(folder, dev="sentence,label\na cat,no\na dog,maybe\n")

    with pytest.raises(DataError, match=r"dev.csv, line 3: 'maybe' is not one of the known labels: no, yes"):
        prepare(folder)


def test_a_test_split_without_labels_is_predicted_and_has_no_metrics(folder: Path) -> None:
    write(folder, test="sentence\na cat runs\na dog\n")
    splits = {"train": "train.csv", "validation": "dev.csv", "test": "test.csv"}

    made = prepare(folder, data={"splits": splits})
    result = evaluate(ForwardOnly(tiny.bert(), config(folder), ONE_PROCESS), made, micro_batch_size=4)

    assert set(result.metrics) == {"loss", "accuracy", "f1", "precision", "recall", "matthews_correlation"}
    assert result.splits["test"].metrics == {}
    records = result.splits["test"].records
    assert [record["reference"] for record in records] == [None, None]
    assert all(record["prediction"] in ("no", "yes") for record in records)
