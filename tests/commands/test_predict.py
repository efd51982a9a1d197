"""The predict command and the metrics of the GLUE tasks, end to end on tiny models and short files."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score

from dtrain.commands.evaluate import run_evaluate
from dtrain.commands.predict import data_to_predict, run_predict
from dtrain.config.load import load_config, to_yaml
from dtrain.config.schema import Config
from dtrain.data.glue import TASKS
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.errors import ConfigError, DataError
from tests.support import tiny

pytestmark = pytest.mark.ranks

MNLI_HEADER = [
    *["index", "promptID", "pairID", "genre", "b1", "b2", "p1", "p2", "sentence1", "sentence2", "label1", "gold_label"]
]


def write_model(folder: Path, labels: Sequence[str] | None, *, texts_for_bias: Sequence[list[str]] = ()) -> Path:
    """Writes a random BERT that predicts every label for some of the texts; `labels` None: a regression model."""
    module, tokenizer = tiny.bert(dropout=0.0, layers=1).eval(), tiny.tokenizer()
    size = len(labels) if labels else 1
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module.classifier = torch.nn.Linear(32, size)
        module.classifier.weight.data.mul_(100.0)
    with torch.no_grad():  # Centers the logits, so that each label is predicted for some texts.
        inputs = tokenizer(
            *(texts_for_bias or map(list, zip(*pairs(9), strict=True))), padding=True, return_tensors="pt"
        )
        logits = module(**inputs).logits
        module.classifier.bias.sub_(logits.mean(dim=0))
    module.num_labels = size
    module.config.id2label = dict(enumerate(labels or ["LABEL_0"]))
    module.config.label2id = {label: index for index, label in enumerate(labels or ["LABEL_0"])}
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write(file: Path, rows: Sequence[Sequence[Any]]) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("".join("\t".join(map(str, row)) + "\n" for row in rows))


def config(folder: Path, name: str | None, **sections: Any) -> Config:
    data = {"path": str(folder / "data"), "cache_dir": str(folder / "cache"), "max_length": 32, "name": name}
    sections["data"] = {**data, **sections.get("data", {})}
    return Config.model_validate(
        {
            "run": {"name": "predicted", "output_dir": str(folder)},
            "task": {"name": "regression" if name == "stsb" else "classification"},
            "model": {"name_or_path": str(folder / "model")},
            "evaluation": {"micro_batch_size": 4},
            **sections,
        }
    )


def records(folder: Path, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "predicted" / "predictions" / f"{split}.jsonl").open()]


def texts(count: int) -> list[str]:
    return [f"the {tiny.WORDS[index % 20]} {tiny.WORDS[(7 * index + 3) % 20]}" for index in range(count)]


def pairs(count: int) -> list[tuple[str, str]]:
    return list(zip(texts(count), reversed(texts(count)), strict=True))


# Metrics of the GLUE tasks


@pytest.mark.parametrize("name", ["mrpc", "qqp"])
def test_f1_of_paraphrases_is_scikit_learns_f1_of_the_positive_class(tmp_path: Path, name: str) -> None:
    names = tuple(TASKS[name].labels.values())
    write_model(tmp_path / "model", names)
    rows = [(index % 3 % 2, index, index, *pair) for index, pair in enumerate(pairs(13))]
    header = ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")
    if name == "qqp":
        header = ("is_duplicate", "qid1", "qid2", "question1", "question2")
    write(tmp_path / "data" / "dev.tsv", [header, *rows])

    found = run_evaluate(config(tmp_path, name, data={"splits": {"validation": "dev.tsv"}}), ONE_PROCESS).metrics

    written = records(tmp_path, "validation")
    truth, predicted = ([names.index(row[side]) for row in written] for side in ("reference", "prediction"))
    assert truth == [row[0] for row in rows]
    assert set(predicted) == {0, 1}
    assert found["f1"] == pytest.approx(f1_score(truth, predicted, pos_label=1, average="binary"), abs=1e-12)
    assert found["accuracy"] == pytest.approx(accuracy_score(truth, predicted), abs=1e-12)
    assert (
        abs(found["f1"] - f1_score(truth, predicted, average="macro")) > 0.01
    )  # Otherwise the test could not tell them apart.


def test_mnli_has_two_dev_sets_and_keeps_a_trained_models_order_of_labels(tmp_path: Path) -> None:
    labels = ["contradiction", "entailment", "neutral"]  # The order in older models; on the hub, entailment is 0.
    write_model(tmp_path / "model", labels)
    for split, shift in (("matched", 0), ("mismatched", 1)):
        rows = [[*"01234567", *pair, "x", labels[(n + shift) % 3]] for n, pair in enumerate(pairs(11))]
        write(tmp_path / "data" / f"dev_{split}.tsv", [MNLI_HEADER, *rows])
    splits = {"validation": "dev_matched.tsv", "validation_mismatched": "dev_mismatched.tsv"}

    found = run_evaluate(config(tmp_path, "mnli", data={"splits": splits}), ONE_PROCESS).metrics

    matched, mismatched = records(tmp_path, "validation"), records(tmp_path, "validation_mismatched")
    for prefix, written in (("", matched), ("mismatched_", mismatched)):
        right = [row["prediction"] == row["reference"] for row in written]
        assert found[f"{prefix}accuracy"] == pytest.approx(sum(right) / 11, abs=1e-12)
    assert [row["reference"] for row in mismatched] == [labels[(n + 1) % 3] for n in range(11)]
    assert found["loss"] != found["mismatched_loss"]
    assert [labels.index(row["prediction"]) for row in matched] == outputs(tmp_path / "model", pairs(11))


def outputs(folder: Path, inputs: Sequence[tuple[str, str]]) -> list[int]:
    """Returns the label with the highest logit in plain transformers, one pair at a time."""
    from transformers import AutoModelForSequenceClassification

    model, tokenizer = AutoModelForSequenceClassification.from_pretrained(folder), tiny.tokenizer()
    with torch.no_grad():
        return [int(model(**tokenizer(*pair, return_tensors="pt")).logits.argmax()) for pair in inputs]


# Splits


def test_predictions_for_a_glue_task_are_written_in_the_servers_format(tmp_path: Path) -> None:
    write_model(tmp_path / "model", ["acceptable", "unacceptable"], texts_for_bias=[texts(9)])
    write(tmp_path / "data" / "test.tsv", [("index", "sentence"), *enumerate(texts(9))])

    result = run_predict(config(tmp_path, "cola"), ONE_PROCESS)

    answers = [row["prediction"] for row in records(tmp_path, "test")]
    lines = (tmp_path / "predicted" / "submission" / "CoLA.tsv").read_text().splitlines()
    assert set(answers) == {"acceptable", "unacceptable"}
    assert lines == [
        "index\tprediction",
        *(f"{index}\t{int(answer == 'acceptable')}" for index, answer in enumerate(answers)),
    ]
    assert all(row["reference"] is None for row in records(tmp_path, "test"))
    summary = json.loads((tmp_path / "predicted" / "summary.json").read_text())
    assert (summary["command"], summary["eval"], summary["examples"]) == ("predict", result.metrics, 9)


def test_mnli_has_two_submissions(tmp_path: Path) -> None:
    write_model(tmp_path / "model", ["entailment", "neutral", "contradiction"])
    for split, count in (("matched", 5), ("mismatched", 1)):
        rows = [[*"01234567", *pair] for pair in pairs(count)]
        write(tmp_path / "data" / f"test_{split}.tsv", [MNLI_HEADER[:-2], *rows])

    run_predict(config(tmp_path, "mnli"), ONE_PROCESS)

    for split, file, count in (("matched", "MNLI-m", 5), ("mismatched", "MNLI-mm", 1)):
        lines = (tmp_path / "predicted" / "submission" / f"{file}.tsv").read_text().splitlines()
        labels = [row["prediction"] for row in records(tmp_path, f"test_{split}")]
        assert len(labels) == count
        assert lines[1:] == [f"{index}\t{label}" for index, label in enumerate(labels)]


def test_scores_are_evaluated_if_there_are_labels_and_clipped_only_for_the_server(tmp_path: Path) -> None:
    write_model(tmp_path / "model", None)
    columns = ("index", "sentence1", "sentence2", "score")
    dev = [(index, *pair, f"{index % 5}.250") for index, pair in enumerate(pairs(9))]
    write(tmp_path / "data" / "dev.tsv", [columns, *dev])
    write(tmp_path / "data" / "test.tsv", [columns[:-1], *(row[:-1] for row in dev)])
    splits = {"validation": "dev.tsv", "test": "test.tsv"}

    found = run_predict(config(tmp_path, "stsb", data={"splits": splits}), ONE_PROCESS).metrics

    written = records(tmp_path, "validation")
    values, truth = ([row[side] for row in written] for side in ("prediction", "reference"))
    assert truth == [float(row[-1]) for row in dev]
    assert found["pearson"] == pytest.approx(pearsonr(truth, values)[0], abs=1e-12)
    assert found["spearman"] == pytest.approx(spearmanr(truth, values)[0], abs=1e-12)
    squares = [(value - label) ** 2 for value, label in zip(values, truth, strict=True)]
    assert found["loss"] == pytest.approx(sum(squares) / 9, rel=1e-6)
    assert [row["prediction"] for row in records(tmp_path, "test")] == values
    assert min(values) < 0 or max(values) > 5  # Otherwise clipping would change nothing.
    lines = (tmp_path / "predicted" / "submission" / "STS-B.tsv").read_text().splitlines()
    assert lines[1:] == [f"{n}\t{sorted((0.0, value, 5.0))[1]:.3f}" for n, value in enumerate(values)]


def test_predictions_for_a_file_are_in_its_order_and_need_no_labels(tmp_path: Path) -> None:
    write_model(tmp_path / "model", ["no", "yes"])
    (tmp_path / "new.csv").write_text("review\n" + "\n".join(texts(5)) + "\n")
    columns = {"text": "review", "label": "stars"}

    run_predict(config(tmp_path, None, data={"columns": columns}, predict={"file": tmp_path / "new.csv"}), ONE_PROCESS)

    assert [row["example_index"] for row in records(tmp_path, "test")] == [0, 1, 2, 3, 4]
    assert not (tmp_path / "predicted" / "submission").exists()


def test_a_file_is_predicted_completely_despite_limits_of_the_training_data(tmp_path: Path) -> None:
    settings = config(tmp_path, None, predict={"file": tmp_path / "new.csv"}, data={"limit": 2, "max_bad_rows": 3})

    data = data_to_predict(settings, ONE_PROCESS)

    assert (data.limit, data.max_bad_rows, data.splits) == (None, 0, {"test": "new.csv"})


def test_an_old_submission_is_removed_by_the_next_run(tmp_path: Path) -> None:
    write_model(tmp_path / "model", ["acceptable", "unacceptable"])
    write(tmp_path / "data" / "test.tsv", [("index", "sentence"), (0, "a cat")])
    run_predict(config(tmp_path, "cola"), ONE_PROCESS)

    write(tmp_path / "data" / "test.tsv", [("index", "text"), (0, "a cat")])
    with pytest.raises(DataError, match="no column 'sentence'"):
        run_predict(config(tmp_path, "cola"), ONE_PROCESS)

    assert not (tmp_path / "predicted" / "submission").exists()


# One text


@pytest.mark.parametrize(
    ("labels", "expected"),
    [(["no", "yes"], r"(no|yes) \(probability (0\.[5-9]\d{3}|1\.0000)\)"), (None, r"-?\d+\.\d{4}")],
)
def test_one_text_is_answered_in_a_line_and_writes_no_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, labels: list[str] | None, expected: str
) -> None:
    write_model(tmp_path / "model", labels)
    before = set(tmp_path.iterdir())
    predict = {"text": "the cat", "text_pair": 'a "dog"'}

    with caplog.at_level(logging.INFO, logger="dtrain"):
        run_predict(config(tmp_path, None if labels else "stsb", predict=predict), ONE_PROCESS)

    import re

    assert re.fullmatch(expected, caplog.messages[-1])
    assert set(tmp_path.iterdir()) == before


# Refusals


@pytest.mark.parametrize(
    ("name", "sections", "message"),
    [
        ("cola", {"data": {"max_bad_rows": 1}}, "the GLUE server needs an answer for each row"),
    ],
)
def test_what_cannot_be_predicted_is_refused(
    tmp_path: Path, name: str | None, sections: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_predict(config(tmp_path, name, **sections), ONE_PROCESS)


def test_a_model_without_label_names_is_refused(tmp_path: Path) -> None:
    tiny.write_model(tmp_path / "model", layers=1)

    with pytest.raises(ConfigError, match=r"no id2label in its config\.json"):
        run_predict(config(tmp_path, None, predict={"text": "a cat"}), ONE_PROCESS)


def test_a_training_run_is_not_overwritten(tmp_path: Path) -> None:
    write(tmp_path / "data" / "test.tsv", [("index", "sentence"), (0, "a cat")])
    (tmp_path / "predicted").mkdir()
    (tmp_path / "predicted" / "metrics.jsonl").touch()

    with pytest.raises(ConfigError, match="holds a training run, which predict must not change"):
        run_predict(config(tmp_path, "cola"), ONE_PROCESS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predict.text_pair=b"], "predict.text_pair is the second text of a pair"),
        (["predict.text=a", "predict.file=b.csv"], "set predict.text or predict.file, not both"),
    ],
)
def test_contradictory_settings_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(None, ["task.name=classification", "model.name_or_path=m", *arguments], command="predict")


# The settings of the run that made the model


def test_without_a_config_predict_uses_the_settings_of_the_models_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = config(tmp_path, "stsb", run={"name": "elsewhere", "output_dir": "/gone", "overwrite": True})
    model = tmp_path / "runs" / "first" / "model"
    model.mkdir(parents=True)
    (model.parent / "config.yaml").write_text(to_yaml(made))

    found = load_config(None, [f"model.name_or_path={model}", "data.max_length=16"], command="predict")
    monkeypatch.chdir(model)
    from_inside = load_config(None, ["model.name_or_path=.", "run.name=own"], command="predict")

    assert found.run_dir == tmp_path / "runs" / "first-predict"
    assert (found.task.name, found.data.name, found.data.max_length) == ("regression", "stsb", 16)
    assert not found.run.overwrite
    assert from_inside.run_dir == tmp_path / "runs" / "own"


def test_a_model_without_a_run_needs_a_task_name(tmp_path: Path) -> None:
    arguments = [f"model.name_or_path={tmp_path / 'model'}"]

    with pytest.raises(ConfigError, match=r"does not know the task of .* Set task\.name=\.\.\."):
        load_config(None, arguments, command="predict")
    found = load_config(None, [*arguments, "task.name=regression"], command="predict")

    assert (found.task.name, found.run.name) == ("regression", "regression-predict")
