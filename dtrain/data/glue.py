"""The GLUE tasks (Wang et al. 2019, arXiv:1804.07461) in the layout of their original TSV files.

One table describes the files of each task. Label names and their order are those of nyu-mll/glue on the hub, so the files
and the hub give the same model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dtrain.console import log
from dtrain.data.delimiters import plain_records
from dtrain.data.encodings import text_lines
from dtrain.data.readers import Row, Values
from dtrain.errors import ConfigError, DataError

HUB_NAME = "nyu-mll/glue"

MALFORMED_SHARE = 0.001
"""Largest share of malformed rows in a file, for tasks that are known to have some."""


@dataclass(frozen=True)
class GlueTask:
    """The layout of a task's files.

    Attributes:
        texts: columns of the one or two texts, by the names in the header.
        label: column of the label in train and dev.
        labels: label in the files -> label name, in the order of the hub's classes; empty for a task with scores.
        submission: test split -> name, without suffix, of the file that the GLUE server expects.
        columns: column names of train and dev if these have no header; None: they have one.
        files: our split -> file.
        test_files: the same for the splits without labels, with the hub's split names.
        skips_malformed: whether rows of train and dev with too few or too many columns are skipped and counted.
    """

    texts: tuple[str, ...]
    label: str
    labels: Mapping[str, str]
    submission: Mapping[str, str]
    columns: tuple[str, ...] | None = None
    files: Mapping[str, str] = field(default_factory=lambda: {"train": "train.tsv", "validation": "dev.tsv"})
    test_files: Mapping[str, str] = field(default_factory=lambda: {"test": "test.tsv"})
    skips_malformed: bool = False


_ENTAILED_OR_NOT = {"entailment": "entailment", "not_entailment": "not_entailment"}

TASKS: dict[str, GlueTask] = {
    "cola": GlueTask(
        ("sentence",),
        "label",
        {"0": "unacceptable", "1": "acceptable"},
        {"test": "CoLA"},
        columns=("source", "label", "mark", "sentence"),
    ),
    "sst2": GlueTask(("sentence",), "label", {"0": "negative", "1": "positive"}, {"test": "SST-2"}),
    "mrpc": GlueTask(
        ("#1 String", "#2 String"), "Quality", {"0": "not_equivalent", "1": "equivalent"}, {"test": "MRPC"}
    ),
    "qqp": GlueTask(
        ("question1", "question2"),
        "is_duplicate",
        {"0": "not_duplicate", "1": "duplicate"},
        {"test": "QQP"},
        skips_malformed=True,
    ),
    "mnli": GlueTask(
        ("sentence1", "sentence2"),
        "gold_label",
        {"entailment": "entailment", "neutral": "neutral", "contradiction": "contradiction"},
        {"test_matched": "MNLI-m", "test_mismatched": "MNLI-mm"},
        files={"train": "train.tsv", "validation": "dev_matched.tsv", "validation_mismatched": "dev_mismatched.tsv"},
        test_files={"test_matched": "test_matched.tsv", "test_mismatched": "test_mismatched.tsv"},
    ),
    "qnli": GlueTask(("question", "sentence"), "label", _ENTAILED_OR_NOT, {"test": "QNLI"}),
    "rte": GlueTask(("sentence1", "sentence2"), "label", _ENTAILED_OR_NOT, {"test": "RTE"}),
    "wnli": GlueTask(("sentence1", "sentence2"), "label", {"0": "not_entailment", "1": "entailment"}, {"test": "WNLI"}),
    "stsb": GlueTask(("sentence1", "sentence2"), "score", {}, {"test": "STS-B"}),
}

NAMES = tuple(TASKS)


def find_task(name: str) -> GlueTask:
    """Returns the task with this name."""
    return TASKS[name]


def submission_lines(task: GlueTask, predictions: Iterable[str | float]) -> Iterator[str]:
    """Yields the lines of a file for the GLUE server: a header, then 0-based row number and answer.

    Args:
        predictions: label names or scores of all rows of the test file, in order.

    Raises:
        ConfigError: a prediction is not a label of the task.
    """
    file_labels = {name: label for label, name in task.labels.items()}
    yield "index\tprediction\n"
    for index, prediction in enumerate(predictions):
        if not task.labels:
            yield f"{index}\t{min(max(float(prediction), 0.0), 5.0):.3f}\n"
            continue
        if prediction not in file_labels:
            raise ConfigError(
                f"The model predicts {prediction!r}, which is not a label of this GLUE task ({', '.join(file_labels)}), so no "
                "submission can be written. Use these names in id2label and label2id of the model's config.json"
            )
        yield f"{index}\t{file_labels[str(prediction)]}\n"


class GlueRows:
    """The rows of one file, read again by each iteration, with text, text_pair (in tasks with pairs) and label."""

    def __init__(self, path: Path, task: GlueTask, *, is_test: bool) -> None:
        """
        Args:
            is_test: whether this is a test file, which has no labels and always a header.
        """
        self._path = path
        self._task = task
        self._has_label = not is_test
        self._columns = None if is_test else task.columns

    def __iter__(self) -> Iterator[Row]:
        skipped = rows = 0
        names: Sequence[str] | None = self._columns
        indices: tuple[list[int], int | None] | None = None if names is None else self._column_indices(names)
        for line, fields in plain_records(text_lines(self._path), "\t"):
            if names is None or indices is None:
                names, indices = fields, self._column_indices(fields)
                continue
            rows += 1
            if len(fields) == len(names):
                yield line, self._values(line, fields, *indices)
            elif self._task.skips_malformed and self._has_label:
                skipped += 1
            else:
                yield (
                    line,
                    DataError(
                        f"{self._path}, line {line}: {len(fields)} columns where this file has {len(names)} "
                        f"({', '.join(names)}), separated by tabs. Correct or remove the line"
                    ),
                )
        if skipped:
            self._report(skipped, rows)

    def _column_indices(self, names: Sequence[str]) -> tuple[list[int], int | None]:
        """Returns the indices of the texts and of the label."""
        wanted = [*self._task.texts, *([self._task.label] if self._has_label else [])]
        if missing := [name for name in wanted if name not in names]:
            raise DataError(
                f"{self._path}, line 1: no column {missing[0]!r} in the header ({', '.join(names)}). "
                "With this data.name the file must have the layout of the GLUE task's original files"
            )
        texts = [names.index(name) for name in self._task.texts]
        return texts, names.index(self._task.label) if self._has_label else None

    def _values(self, line: int, fields: Sequence[str], texts: Sequence[int], label: int | None) -> Values | DataError:
        values = dict(zip(("text", "text_pair"), (fields[index] for index in texts), strict=False))
        if label is None:
            return values
        if not self._task.labels:  # a score, which the task parses
            return {**values, "label": fields[label]}
        name = self._task.labels.get(fields[label])
        if name is None:
            return DataError(
                f"{self._path}, line {line}: {fields[label]!r} is not a label of this task. Known labels: "
                f"{', '.join(self._task.labels)}"
            )
        return {**values, "label": name}

    def _report(self, skipped: int, rows: int) -> None:
        if skipped > MALFORMED_SHARE * rows:
            raise DataError(
                f"{self._path}: {skipped} of {rows} rows have too few or too many columns, more than the "
                f"{MALFORMED_SHARE:.1%} that this data set is known for. Is this the complete original file?"
            )
        log.info(
            "data: %s: skipped %d of %d rows, which have too few or too many columns", self._path.name, skipped, rows
        )
