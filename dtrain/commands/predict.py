"""The predict command: what a trained model answers, on test splits, on a file or to one text.

    python dtrain/main.py predict model.name_or_path=runs/cola/model                        # the test split
    python dtrain/main.py predict model.name_or_path=runs/cola/model predict.file=new.csv
    python dtrain/main.py predict model.name_or_path=runs/cola/model predict.text="They drank the pub dry."

A split's answers come in the order of its rows and are the same at every world size, as those of evaluate.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from dtrain.collectives import barrier, on_main
from dtrain.commands import construct, folder
from dtrain.commands.evaluate import wrap, write_down
from dtrain.commands.results import Result
from dtrain.console import log
from dtrain.data import glue
from dtrain.data.locate import form_of
from dtrain.engine.build import engine_name
from dtrain.errors import ConfigError
from dtrain.evaluation import EvaluationResult, evaluate, to_device
from dtrain.run_folder import RunFolder, write_text_atomic
from dtrain.schema import Config, Data
from dtrain.seeding import Place
from dtrain.tasks.build import build_task
from dtrain.tasks.protocol import Answers
from dtrain.topology import Topology

WITHOUT_ANSWERS = {
    "causal_lm": "See what the model writes with generate, or how good it is with evaluate.",
    "masked_lm": "See how good the model is with evaluate.",
    "chat": "Let the model answer a file of dialogues: chat talk.input=FILE.",
}
"""Tasks of which an example has no answer, and what to do instead."""

OF_TEXT = ("classification", "regression")
"""Tasks of which `predict.text` alone is an example; each has `Answers`."""


def run_predict(config: Config, topology: Topology) -> Result:
    """Collective. Writes predictions/, summary.json and, for a GLUE task, submission/ into a run folder of its own.

    With `predict.text` it prints the answer instead, and writes nothing.
    """
    if config.task.name in WITHOUT_ANSWERS:
        raise ConfigError(
            f"task.name={config.task.name} has no answers to predict. {WITHOUT_ANSWERS[config.task.name]}"
        )
    if config.predict.text is not None:
        return _answer(config, topology)
    begin = time.monotonic()
    name, why = engine_name(config, topology)
    config = config.model_copy(update={"data": what_to_predict(config, topology)})
    if config.task.name == "seq2seq":  # its answer is the text that it writes
        config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"generate": True})})
    folder.take(config, topology, command="predict")
    task = build_task(config, topology)
    if set(task.splits) <= {"train"}:
        raise ConfigError(
            "There is nothing to predict: the data has only a train split. Name one in data.splits, e.g. "
            "data.splits={test: test.csv}, or set predict.file."
        )
    log.info("predict with %s on %s, engine %s (%s)", config.model.name_or_path, topology.describe(), name, why)
    forward = wrap(construct.load(config, task, topology), config, topology)
    result = evaluate(forward, task, micro_batch_size=config.evaluation.micro_batch_size, workers=config.data.workers)
    write_down("predict", result, config.run_dir, topology, engine=name, seconds=time.monotonic() - begin)
    on_main(lambda: _write_submission(config, result), topology)
    return Result(dict(result.metrics), config.run_dir)


def what_to_predict(config: Config, topology: Topology) -> Data:
    """Collective. The data section with `predict.file`, or a GLUE task's test splits where none is named."""
    data, file = config.data, config.predict.file
    if file is not None:
        own = {"name": None, "config": None, "path": file.parent, "splits": {"test": file.name}}
        # An answer to each row of it, whatever the training was cut to.
        return data.model_copy(update={**own, "validation_fraction": None, "limit": None, "max_bad_rows": 0})
    if data.name not in glue.NAMES:
        return data
    if data.max_bad_rows:
        raise ConfigError(
            f"data.max_bad_rows={data.max_bad_rows} may pass rows over, but the GLUE server wants an answer to each. "
            "Set data.max_bad_rows=0."
        )
    if data.splits:
        return data
    files = glue.find_task(data.name).test_files
    # The folder may be seen by rank 0 alone.
    is_files = on_main(lambda: form_of(data) == "glue", topology)
    splits = dict(files) if is_files else {split: split for split in files}
    return data.model_copy(update={"splits": splits, "validation_fraction": None})


def _write_submission(config: Config, result: EvaluationResult) -> None:
    """The files of the GLUE server, for those splits that it has; nothing for other data."""
    name = config.data.name
    if name not in glue.NAMES or config.predict.file is not None:
        return
    task = glue.find_task(name)
    for split, file in task.submission.items():
        if split not in result.splits:
            continue
        answers = [record["prediction"] for record in result.splits[split].records]
        path = RunFolder(config.run_dir).submission / f"{file}.tsv"
        text = "".join(glue.submission_lines(task, answers))
        path.parent.mkdir(exist_ok=True)
        write_text_atomic(path, text)
        log.info("submission: %s", path)
    if config.data.limit is not None:
        log.warning("data.limit=%d: the GLUE server refuses a submission that is cut", config.data.limit)


def _answer(config: Config, topology: Topology) -> Result:
    """Collective. One example that is in no file, read and tokenised as one of a split would be."""
    if config.task.name not in OF_TEXT:
        raise ConfigError(
            f"predict.text does not work for task.name={config.task.name}: its examples are more than text. Put them "
            "in a file and set predict.file."
        )
    texts = {"text": config.predict.text, "text_pair": config.predict.text_pair}
    with TemporaryDirectory(prefix="dtrain-predict-") as place:
        row = {column: text for column, text in texts.items() if text is not None}
        (Path(place) / "text.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
        splits = {"test": "text.jsonl"}
        data = Data(path=Path(place), splits=splits, max_length=config.data.max_length, cache_dir=Path(place) / "cache")
        config = config.model_copy(update={"data": data})
        task = build_task(config, topology)
        assert isinstance(task, Answers), "a task of OF_TEXT"
        forward = wrap(construct.load(config, task, topology), config, topology)
        forward.module.eval()
        batch = task.collate(task.splits["test"][[0]], Place(0, (0,)))
        device = next(forward.module.parameters()).device
        with torch.no_grad(), forward.autocast():
            (answer,) = task.answers(forward.module, to_device(batch, device))
        barrier(topology)  # the rows lie in the folder of one rank of each node
    log.info("%s", worded(answer))
    return Result({}, config.run_dir)


def worded(answer: Mapping[str, Any]) -> str:
    """`acceptable (probability 0.9731)`."""
    first, *further = (f"{value:.4f}" if isinstance(value, float) else str(value) for value in answer.values())
    more = ", ".join(f"{name} {value}" for name, value in zip(list(answer)[1:], further, strict=True))
    return f"{first} ({more})" if more else first
