"""Every setting of dtrain: name, type, default, meaning, and how a resumed run treats a change.

This module only declares the models. load.py reads YAML and overrides into them, and error_messages.py builds the
errors of single values. Errors about a combination of settings are raised here, one complete line each.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import PrivateAttr, Strict, field_validator, model_validator

from dtrain.config.commands import Download, Export, Generate, Inspect, Predict, Talk
from dtrain.config.data import Data as Data
from dtrain.config.engine import OWNED_DEEPSPEED_KEYS as OWNED_DEEPSPEED_KEYS
from dtrain.config.engine import EngineSettings as EngineSettings
from dtrain.config.engine import engine_conflicts
from dtrain.config.fields import AnyPath, CheckpointEvery, EvalEvery, Section, setting
from dtrain.config.model import Lora as Lora
from dtrain.config.model import Model as Model
from dtrain.config.model import NewHead as NewHead
from dtrain.config.optim import Optim as Optim
from dtrain.config.optim import OptimGroup as OptimGroup
from dtrain.config.optim import Schedule as Schedule
from dtrain.config.task import TaskSettings


class Run(Section):
    """The name and the folder of the run."""

    name: str | None = setting(
        None, "folder in output_dir; default: the config file's name without suffix", resume="free"
    )
    output_dir: AnyPath = setting(Path("runs"), "parent folder of all runs", resume="free")
    seed: int = setting(0, "the only seed: data order, dropout, masking, new weights", ge=0, lt=2**32)
    overwrite: bool = setting(False, "move an existing run folder to <name>.old-<time> and start over", resume="free")
    startup_timeout_s: float = setting(120.0, "seconds to wait until all ranks have joined", resume="free", gt=0)
    bind_cores: bool = setting(False, "on CPU: bind each rank of a node to separate cores", resume="free")

    @field_validator("name")
    @classmethod
    def _is_one_folder(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError(
                "a run name is one folder name: letters, digits, '.', '_', '-', and a letter or digit first"
            )
        return name


class ThawStage(Section):
    """Modules that are unfrozen at the start of an epoch."""

    epoch: int = setting(1, "0-based epoch at whose start the modules are unfrozen", ge=1)
    modules: tuple[str, ...] = setting((), "paths as in freeze.modules", min_length=1)


class Freeze(Section):
    """The modules that do not learn."""

    modules: tuple[str, ...] = setting((), "paths in the model or its base: embeddings, encoder.layer[:2], *.bias")
    method: Literal["requires_grad", "no_grad"] = setting(
        "requires_grad", "no_grad: also stops gradients to everything below the frozen modules"
    )
    thaw: tuple[ThawStage, ...] = setting((), "modules to unfreeze later: [{epoch: 1, modules: [...]}]")
    cache: Literal["auto", "on", "off"] = setting(
        "auto",
        "auto: compute the model's frozen beginning once per row, then read it; on: for one epoch too, or an error",
        resume="free",
    )
    cache_gb: float = setting(
        8.0, "GiB of disk for such results of all models, below data.cache_dir", resume="free", gt=0
    )


class Spike(Section):
    """Detection of a loss far above the recent ones, and the response."""

    factor: float = setting(
        3.0, "a loss above this multiple of the median of recent losses is a spike", resume="free", gt=1
    )
    action: Literal["warn", "skip", "rollback"] = setting(
        "warn", "skip: drop the step's update; rollback: return to the weights of the newest checkpoint", resume="free"
    )
    window: int = setting(
        50, "number of recent losses in the median; spikes are detected once there are ten", resume="free", ge=10
    )


class Train(Section):
    """Length of the run, batch sizes, and what is monitored."""

    epochs: int | None = setting(
        None, "passes over the training data; default: 3 if max_steps is not set", resume="warn", ge=1
    )
    max_steps: int | None = setting(
        None, "optimizer steps; the run ends when it reaches epochs or max_steps", resume="warn", ge=1
    )
    max_minutes: float | None = setting(
        None, "wall time of one start; then the run saves a checkpoint and ends with exit code 75", resume="free", gt=0
    )
    global_batch_size: int = setting(32, "examples per optimizer step over all ranks", ge=1)
    micro_batch_size: int = setting(8, "examples per forward pass", ge=1)
    micro_batch_tokens: int | None = setting(
        None,
        "instead of micro_batch_size: tokens per forward pass at most, padding included, even if the model skips it",
        ge=1,
    )
    sort_by_length: bool = setting(
        True, "sort a step's examples by length before they are cut into micro-batches; not with local_steps"
    )
    shuffle: bool = setting(True, "a new order in each epoch; false: file order")
    eval_every: EvalEvery = setting("epoch", "steps between evaluations, or: epoch, 2 epochs, never", resume="free")
    log_every: int = setting(10, "steps between train lines in metrics.jsonl", resume="free", ge=1)
    log_gradients: int | None = setting(
        None, "steps between lines with the gradient norm of each layer; null: none", resume="free", ge=1
    )
    time_every: int | None = setting(
        50, "steps between lines with the time of each part of a step on each rank; null: none", resume="free", ge=1
    )
    non_finite: Literal["stop", "skip"] = setting(
        "stop", "on a loss or gradient that is not finite: stop the run, or skip the update", resume="free"
    )
    hang_timeout: float | None = setting(
        300.0, "seconds without progress until the job is stopped as hung; null or 0: never", resume="free", ge=0
    )
    spike: Spike | None = setting(None, "response to a loss far above the recent ones; null: none", resume="free")
    check_replicas: int | None = setting(
        None, "steps between bit-for-bit comparisons of all ranks' weights; null: none", resume="free", ge=1
    )
    early_stopping: int | None = setting(None, "stop after n evaluations without improvement", resume="free", ge=1)
    local_steps: int = setting(
        1, "ddp: steps that each rank takes alone before the ranks average weights and moments", ge=1
    )

    @model_validator(mode="before")
    @classmethod
    def _default_to_three_epochs(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("epochs") is None and values.get("max_steps") is None:
            return {**values, "epochs": 3}
        return values

    @property
    def sorts(self) -> bool:
        """Whether a step's examples are sorted by length.

        With local steps each rank learns alone from its share, which must not be the long or the short examples.
        """
        return self.sort_by_length and self.local_steps == 1


class Best(Section):
    """The metric that selects the best step."""

    metric: str = setting("loss", "a metric of the evaluation, e.g. matthews_correlation")
    mode: Literal["min", "max"] = setting("min", "which is better; default: min for a loss or perplexity, else max")

    @model_validator(mode="before")
    @classmethod
    def _default_mode(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "mode" not in values and isinstance(values.get("metric"), str):
            is_lower_better = values["metric"].endswith(("loss", "perplexity", "bits_per_character"))
            return {**values, "mode": "min" if is_lower_better else "max"}
        return values


class Evaluation(Section):
    """The evaluation."""

    micro_batch_size: int = setting(32, "examples per forward pass", resume="warn", ge=1)
    micro_batch_tokens: int | None = setting(
        None,
        "instead of micro_batch_size: tokens per forward pass at most, with padding and evaluation.max_new_tokens",
        resume="warn",
        ge=1,
    )
    best: Best | None = setting(None, "keep the model and metrics of the best step instead of the last")
    metrics: Annotated[tuple[str, ...], Strict(False)] | None = setting(
        None, "which of the task's metrics to report besides the loss; null: all", resume="free"
    )
    factory: str | None = setting(
        None,
        "package.module:function of your own metrics, beside the config file: (predictions, references) -> metrics",
    )
    factory_folder: AnyPath | None = setting(
        None, "folder of that module's file; default: the config file's folder, or the current one", resume="free"
    )
    generate: bool = setting(False, "seq2seq: generate a text per example and score it (BLEU, ROUGE)", resume="warn")
    num_beams: int = setting(1, "beams for generated texts; 1: always the most likely token", resume="warn", ge=1)
    max_new_tokens: int | None = setting(
        None, "maximum tokens of a generated text; default: task.max_target_length", resume="warn", ge=1
    )


class Checkpoint(Section):
    """Saved weights, optimizer and position in the data, to resume from on any number of ranks and any engine."""

    every: CheckpointEvery = setting(
        "epoch",
        "steps between checkpoints, or: epoch, 2 epochs; the last step is saved as well; null: only when a signal stops the run",
        resume="free",
    )
    keep: int = setting(
        1,
        "number of checkpoints to keep, besides that of the best step; default: 2 if every is in steps",
        resume="free",
        ge=1,
    )
    resume: str = setting(
        "auto",
        "auto: from the newest complete checkpoint of this run; never; or the path of a checkpoint",
        resume="free",
    )
    allow_changes: Annotated[tuple[str, ...], Strict(False)] = setting(
        (), "settings that may change on resume although they change the results: [optim.learning_rate]", resume="free"
    )
    format: Literal["portable", "sharded"] = setting(
        "portable", "sharded: each rank writes its own part, for models too large to gather", resume="free"
    )
    replicas: int = setting(2, "nodes that keep a copy, if run.output_dir is not shared", resume="free", ge=1)
    max_file_gb: float = setting(5.0, "maximum gigabytes per file", resume="free", gt=0)
    asynchronous: bool = setting(True, "write while training continues; false: wait for the disk", resume="free")

    @model_validator(mode="before")
    @classmethod
    def _default_to_two_of_many(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and str(values.get("every")).isdecimal() and values.get("keep") is None:
            return {**values, "keep": 2}
        return values


class Tracking(Section):
    """Logs besides metrics.jsonl."""

    tensorboard: bool = setting(True, "write event files to tensorboard/ in the run folder", resume="free")


class Config(Section):
    """All settings of a run."""

    run: Run = setting(Run(), "the run folder", resume="free")
    task: TaskSettings = setting(..., "what is learned")
    model: Model = setting(Model(), "the model and its tokenizer")
    freeze: Freeze = setting(Freeze(), "the modules that do not learn")
    data: Data = setting(Data(), "the examples")
    optim: Optim = setting(Optim(), "the optimizer")
    schedule: Schedule = setting(Schedule(), "the learning rate schedule")
    train: Train = setting(Train(), "length, batch sizes and monitoring")
    engine: EngineSettings = setting(EngineSettings(), "the back end")
    evaluation: Evaluation = setting(Evaluation(), "the evaluation")
    checkpoint: Checkpoint = setting(Checkpoint(), "saved training state")
    tracking: Tracking = setting(Tracking(), "logs")
    generate: Generate = setting(Generate(), "the generate command")
    predict: Predict = setting(Predict(), "the predict command")
    export: Export = setting(Export(), "the export command")
    inspect: Inspect = setting(Inspect(), "the inspect command")
    download: Download = setting(Download(), "the download command")
    talk: Talk = setting(Talk(), "the chat command")

    _folder: Path = PrivateAttr(Path())
    _note: str | None = PrivateAttr(None)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self.model_dump() == other.model_dump()  # The folder does not count.

    @property
    def folder(self) -> Path:
        """The config file's folder, where the user's modules are searched; the current folder without a file."""
        return self._folder

    @property
    def note(self) -> str | None:
        """Which settings come from the run that trained the model, one line; None if the user has set all."""
        return self._note

    def with_note(self, note: str) -> Config:
        """Returns a copy with another note."""
        copied = self.model_copy()
        copied._note = note
        return copied

    def in_folder(self, folder: Path) -> Config:
        """Returns a copy that belongs to a config file in `folder`, where the user's modules are searched."""
        model, evaluation = self.model, self.evaluation
        # Stored as settings, because the config.yaml of the run is in another folder.
        if model.factory is not None and model.factory_folder is None:
            model = model.model_copy(update={"factory_folder": folder})
        if evaluation.factory is not None and evaluation.factory_folder is None:
            evaluation = evaluation.model_copy(update={"factory_folder": folder})
        copied = self.model_copy(update={"model": model, "evaluation": evaluation})
        copied._folder = folder
        return copied

    @property
    def max_length(self) -> int:
        """Tokens per example (classification), per block (causal language model) or per window (question answering)."""
        return self.data.max_length or self.task.default_max_length

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return self.run.output_dir / (self.run.name or self.task.name)

    @model_validator(mode="after")
    def _check_combinations(self) -> Config:
        """Rejects settings that are valid alone but not together."""
        conflicts = [
            *engine_conflicts(
                self.engine,
                self.optim,
                self.model,
                local_steps=self.train.local_steps,
                sync_steps=self._sync_steps(),
                logs_gradients=self.train.log_gradients is not None,
                checks_replicas=self.train.check_replicas is not None,
            ),
            *self._training_conflicts(),
            *self._task_conflicts(),
        ]
        if conflicts:
            raise ValueError("\n".join(conflicts))
        return self

    def _training_conflicts(self) -> list[str]:
        """Returns messages for evaluations, checkpoints and monitors that need each other."""
        conflicts = []
        if self.train.early_stopping is not None and self.evaluation.best is None:
            conflicts.append(
                "train.early_stopping needs evaluation.best: {metric: ..., mode: ...} to know which is better"
            )
        if self.train.spike is not None and self.train.spike.action == "rollback" and self.checkpoint.every is None:
            conflicts.append(
                "train.spike.action=rollback needs checkpoints to return to: set checkpoint.every, or use skip"
            )
        if self.run.overwrite and self.checkpoint.resume not in ("auto", "never"):
            conflicts.append(
                "run.overwrite=true starts a new run, but checkpoint.resume=PATH resumes one: set only one of them"
            )
        if self.evaluation.best is not None and self.train.eval_every == "never":
            conflicts.append(
                "evaluation.best needs evaluations, but train.eval_every=never: set it to epoch or a number of steps"
            )
        return conflicts

    def _task_conflicts(self) -> list[str]:
        """Returns messages for settings that the task needs or does not support."""
        conflicts = []
        if self.model.factory is not None and not self.task.allows_factory:
            conflicts.append(
                f"task.name={self.task.name} needs an encoder-decoder model of transformers: remove model.factory"
            )
        if self.evaluation.generate and not self.task.generates_texts:
            conflicts.append(f"evaluation.generate: task.name={self.task.name} generates no texts: remove it")
        return [*conflicts, *self.task.conflicts(max_length=self.max_length)]

    def _sync_steps(self) -> dict[str, int]:
        """Returns the intervals, by setting, after which all ranks need the same weights."""
        intervals = {
            "train.eval_every": self.train.eval_every,
            "train.check_replicas": self.train.check_replicas,
            "checkpoint.every": self.checkpoint.every,
        }
        return {name: steps for name, steps in intervals.items() if isinstance(steps, int)}
