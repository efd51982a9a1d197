"""The GLUE tasks (Wang et al. 2019, arXiv:1804.07461) in the layout of their original TSV files.

One table says how each task's files look. Label names and their order are those of nyu-mll/glue on the hub, so that
files and hub give the same model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dtrain.console import log
from dtrain.data.readers import Row, Values, plain_records
from dtrain.errors import ConfigError, DataError

HUB_NAME = "nyu-mll/glue"

MALFORMED_SHARE = 0.001
"""Share of a file's rows that may be malformed, in a task that is known to have such rows."""


@dataclass(frozen=True)
class GlueTask:
    """How a task's files look.

    texts: columns of the one or two texts, by the header's names.
    label: column of the label in train and dev.
    labels: a label as the files write it -> its name, in the order of the hub's classes; none where it is a score.
    columns: names of the columns of train and dev, which have no header then.
    files: our split -> file; test_files: the same for the splits without labels, called as on the hub.
    submission: test split -> name, without suffix, of the file that the GLUE server wants for it.
    skips_malformed: rows of train and dev with too few or too many columns are skipped and counted.
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
    """The task of that name."""
    return TASKS[name]


def submission_lines(task: GlueTask, predictions: Iterable[str | float]) -> Iterator[str]:
    """The lines of a file for the GLUE server: header, then 0-based place in the test file and answer.

    Args:
        predictions: of every row of the test file, in its order: label names, or scores.

    Raises:
        ConfigError: a label that is not one of the task's.
    """
    written = {name: label for label, name in task.labels.items()}
    yield "index\tprediction\n"
    for index, found in enumerate(predictions):
        if not task.labels:
            yield f"{index}\t{min(max(float(found), 0.0), 5.0):.3f}\n"
            continue
        if found not in written:
            raise ConfigError(
                f"The model answers {found!r}, which is no label of this GLUE task ({', '.join(written)}), so that no "
                "submission can be written. Name its labels so: id2label and label2id in its config.json"
            )
        yield f"{index}\t{written[str(found)]}\n"


class GlueRows:
    """The rows of one file, read anew by each iteration: text, text_pair in tasks of pairs, and label."""

    def __init__(self, path: Path, task: GlueTask, *, is_test: bool) -> None:
        """`is_test`: the file is one without labels, and with a header in every task."""
        self._path = path
        self._task = task
        self._has_label = not is_test
        self._columns = None if is_test else task.columns

    def __iter__(self) -> Iterator[Row]:
        skipped = rows = 0
        names: Sequence[str] | None = self._columns
        where: tuple[list[int], int | None] | None = None if names is None else self._where(names)
        for line, fields in plain_records(self._path, "\t"):
            if names is None or where is None:
                names, where = fields, self._where(fields)
                continue
            rows += 1
            if len(fields) == len(names):
                yield line, self._values(line, fields, *where)
            elif self._task.skips_malformed and self._has_label:
                skipped += 1
            else:
                yield (
                    line,
                    DataError(
                        f"{self._path}, line {line}: {len(fields)} columns where this file has {len(names)} "
                        f"({', '.join(names)}), separated by tabs. Mend or remove the line"
                    ),
                )
        if skipped:
            self._report(skipped, rows)

    def _where(self, names: Sequence[str]) -> tuple[list[int], int | None]:
        """Indices of the texts and of the label."""
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
        if not self._task.labels:  # a score, which its task reads
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
                f"{MALFORMED_SHARE:.1%} that this data set is known for. Is it the original file, whole?"
            )
        log.info(
            "data: %s: skipped %d of %d rows, which have too few or too many columns", self._path.name, skipped, rows
        )
