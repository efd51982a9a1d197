"""The predict command: predictions of a trained model for test splits, for a file, or for one text.

    python dtrain/main.py predict model.name_or_path=runs/cola/model                        # the test split
    python dtrain/main.py predict model.name_or_path=runs/cola/model predict.file=new.csv
    python dtrain/main.py predict model.name_or_path=runs/cola/model predict.text="They drank the pub dry."

answer.py defines how each task reads one text. The rows of causal_lm, masked_lm and chat have no answers, so these tasks
answer prompts instead (prompts.py). Predictions are in the order of the rows and, like those of evaluate, the same at
every world size.
"""

from __future__ import annotations

import time
from pathlib import Path

from dtrain.commands import prompts
from dtrain.commands.answer import run_answer
from dtrain.commands.evaluate import wrap, write_results
from dtrain.config.schema import Config, Data
from dtrain.console import log
from dtrain.data import glue
from dtrain.data.resolve_source import source_kind
from dtrain.distributed.collectives import on_main
from dtrain.distributed.rank_context import RankContext
from dtrain.engine.build import engine_name
from dtrain.errors import ConfigError, DataError
from dtrain.runs.folder import RunFolder, write_text_atomic
from dtrain.tasks.build import build_task, task_info
from dtrain.training import build, run_claim
from dtrain.training.evaluation import EvaluationResult, evaluate
from dtrain.training.summary import Result


def run_predict(config: Config, context: RankContext) -> Result:
    """Collective. Writes predictions/, summary.json and, for a GLUE task, submission/ into a new run folder.

    With `predict.text` it logs the answer instead and writes nothing.

    Raises:
        ConfigError: there is nothing to predict, or the settings do not fit the task.
        DataError: the file does not exist or cannot be read.
    """
    if config.predict.text is not None:
        return run_answer(config, context)
    file = config.predict.file
    if file is not None:
        _check_file(file.expanduser(), context)
    if task_info(config.task).prompt is not None:
        if file is None:
            raise ConfigError(
                f"task.name={config.task.name}: the rows of a split have no answers to predict. Give a prompt as "
                "predict.text, or a file of prompts as predict.file. To measure the model, use the evaluate command."
            )
        return prompts.run_prompts(config, file.expanduser(), context)
    begin = time.monotonic()
    name, why = engine_name(config, context)
    config = config.model_copy(update={"data": data_to_predict(config, context)})
    if config.task.generates_texts:  # Its predictions are generated texts.
        config = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"generate": True})})
    with run_claim.claimed(config, context, command="predict"):
        task = build_task(config, context)
        if set(task.splits) <= {"train"}:
            raise ConfigError(
                "There is nothing to predict: the data has only a train split. Name one in data.splits, e.g. "
                "data.splits.test=test.csv, or set predict.file."
            )
        log.info(
            "predict with %s on %s, engine %s (%s)", config.model.name_or_path, context.topology.describe(), name, why
        )
        forward = wrap(build.load(config, task, context, is_trained=True), config, task, context)
        result = evaluate(
            forward,
            task,
            micro_batch_size=config.evaluation.micro_batch_size,
            micro_batch_tokens=config.evaluation.micro_batch_tokens,
            workers=config.data.workers,
        )
        write_results("predict", result, config.run_dir, context, engine=name, seconds=time.monotonic() - begin)
        on_main(lambda: _write_submission(config, result), context)
        return Result(dict(result.metrics), config.run_dir)


def _check_file(file: Path, context: RankContext) -> None:
    """Collective. Raises DataError if the file does not exist on rank 0."""

    def check() -> None:
        if not file.is_file():
            raise DataError(f"predict.file={file}: there is no such file (working folder: {Path.cwd()})")

    on_main(check, context)


def data_to_predict(config: Config, context: RankContext) -> Data:
    """Collective. Returns the data section for `predict.file`, or for a GLUE task's test splits if no split is named."""
    data, file = config.data, config.predict.file
    if file is not None:
        source = {"name": None, "config": None, "path": file.parent, "splits": {"test": file.name}}
        # Every row gets an answer, whatever limits the training run had.
        return data.model_copy(update={**source, "validation_fraction": None, "limit": None, "max_bad_rows": 0})
    if data.name not in glue.NAMES:
        return data
    if data.max_bad_rows:
        raise ConfigError(
            f"data.max_bad_rows={data.max_bad_rows} may skip rows, but the GLUE server needs an answer for each row. "
            "Set data.max_bad_rows=0."
        )
    if data.splits:
        return data
    files = glue.find_task(data.name).test_files
    # Possibly only rank 0 sees the folder.
    is_files = on_main(lambda: source_kind(data) == "glue", context)
    splits = dict(files) if is_files else {split: split for split in files}
    return data.model_copy(update={"splits": splits, "validation_fraction": None})


def _write_submission(config: Config, result: EvaluationResult) -> None:
    """Writes the submission files for the GLUE server's splits; nothing for other data."""
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
        log.warning("data.limit=%d: the GLUE server rejects an incomplete submission", config.data.limit)
