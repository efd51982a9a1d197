"""Every setting of dtrain: its name, type, default, meaning, and what a resume may do when it has changed.

Only the models live here. config.py reads YAML and overrides into them and words the errors of single values; an error
about a whole section is worded here, in full, one line for each. Nothing here touches a file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, PrivateAttr, Strict, field_validator, model_validator

from dtrain.config.commands import Download, Export, Generate, Inspect, Predict, Talk
from dtrain.config.engine import OWNED_DEEPSPEED_KEYS as OWNED_DEEPSPEED_KEYS
from dtrain.config.engine import Engine as Engine
from dtrain.config.engine import wire_conflicts
from dtrain.config.fields import AnyPath, Beta, Section, setting
from dtrain.config.model import Lora as Lora
from dtrain.config.model import Model as Model
from dtrain.config.model import NewHead as NewHead
from dtrain.config.task import TaskSettings


class Run(Section):
    """Where the run lives and what it is called."""

    name: str | None = setting(None, "folder below output_dir; default: the config file's stem", resume="free")
    output_dir: AnyPath = setting(Path("runs"), "parent folder of all runs", resume="free")
    seed: int = setting(0, "the one seed: order, dropout, masking, new weights", ge=0, lt=2**32)
    overwrite: bool = setting(False, "move an existing run folder to <name>.old-<time> and start anew", resume="free")
    startup_timeout_s: float = setting(120.0, "seconds to wait for all ranks to arrive", resume="free", gt=0)
    bind_cores: bool = setting(False, "on CPU: each rank of a node on cores of its own", resume="free")

    @field_validator("name")
    @classmethod
    def _is_one_folder(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
            raise ValueError("a run name is one folder: letters, digits, '.', '_', '-', and a letter or digit first")
        return name


class ThawStage(Section):
    """Modules that begin to learn when an epoch begins."""

    epoch: int = setting(1, "0-based epoch at whose start the modules are unfrozen", ge=1)
    modules: tuple[str, ...] = setting((), "paths as in freeze.modules", min_length=1)


class Freeze(Section):
    """What does not learn."""

    modules: tuple[str, ...] = setting((), "paths in the model or its base: embeddings, encoder.layer[:2], *.bias")
    method: Literal["requires_grad", "no_grad"] = setting(
        "requires_grad", "no_grad: no gradient to anything below either"
    )
    thaw: tuple[ThawStage, ...] = setting((), "later unfreezing: [{epoch: 1, modules: [...]}]")


class Data(Section):
    """Where the examples come from."""

    name: str | None = setting(None, "a GLUE task (cola, sst2, ...), swag, python_docs, or a data set on the hub")
    path: AnyPath | None = setting(None, "a folder or file; with a GLUE name, the folder of its files")
    config: str | None = setting(None, "configuration of a hub data set")
    splits: dict[str, str] = setting({}, "our split (train, validation) -> the source's split or file name")
    validation_fraction: float | None = setting(None, "the end of a lone split, kept for validation", gt=0, lt=1)
    columns: dict[str, str] = setting({}, "our column (text, text_pair, label) -> the source's column")
    delimiter: str | None = setting(None, "of CSV and TSV files; default by suffix")
    header: bool | None = setting(None, "whether the first line of a CSV or TSV names the columns; default: true")
    max_length: int | None = setting(
        None,
        "tokens per example (default 128), per block of a language model (256), per window of a context (384)",
        ge=2,
    )
    limit: int | None = setting(None, "only the first n rows of each split, for a quick run", ge=1)
    max_bad_rows: int = setting(0, "rows of a split that cannot be used and are passed over, each with a warning", ge=0)
    workers: int = setting(0, "processes per rank that prepare batches ahead; 0: none", resume="free", ge=0)
    num_proc: int = setting(1, "processes that tokenise rows, once per node", resume="free", ge=1)
    cache_dir: AnyPath | None = setting(None, "of tokenised data; default: the datasets library's", resume="free")


class Optim(Section):
    """The optimizer."""

    name: Literal["adamw", "sgd", "adafactor"] = setting("adamw", "torch.optim's AdamW, SGD or Adafactor")
    learning_rate: float = setting(5e-5, "peak learning rate", gt=0)
    weight_decay: float = setting(0.01, "decoupled decay; not applied to biases and norm layers", ge=0)
    max_grad_norm: float | None = setting(1.0, "clip the gradient's global L2 norm to this; null: no clipping", gt=0)
    betas: tuple[Beta, Beta] = setting((0.9, 0.999), "of AdamW")
    eps: float = setting(1e-8, "of AdamW", gt=0)
    momentum: float = setting(0.0, "of SGD", ge=0, lt=1)


class Schedule(Section):
    """The learning rate over the run, by its Hugging Face name."""

    name: Literal[
        "linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup", "inverse_sqrt"
    ] = setting("linear", "shape after the warm-up")
    warmup_steps: int | None = setting(None, "steps of the linear ramp from 0", ge=0)
    warmup_ratio: float | None = setting(None, "the same as a share of all steps", ge=0, le=1)

    @model_validator(mode="after")
    def _one_warmup(self) -> Schedule:
        if self.warmup_steps is not None and self.warmup_ratio is not None:
            raise ValueError("give schedule.warmup_steps or schedule.warmup_ratio, not both: set the other to null")
        if self.name == "constant" and (self.warmup_steps or self.warmup_ratio):
            key = "warmup_steps" if self.warmup_steps else "warmup_ratio"
            raise ValueError(
                f"schedule.name=constant has no warm-up: use constant_with_warmup, or set schedule.{key}=null"
            )
        return self


def _read_eval_every(value: Any) -> Any:
    if not re.fullmatch(r"epoch|[1-9]\d*( epochs?)?|never", str(value)):
        raise ValueError("it must be a number of steps from 1 on, epoch, 'N epochs' or never")
    return int(value) if str(value).isdecimal() else value


class Spike(Section):
    """What is done about a loss far above those before it."""

    factor: float = setting(
        3.0, "a loss above so many times the median of the last ones is a spike", resume="free", gt=1
    )
    action: Literal["warn", "skip", "rollback"] = setting(
        "warn", "skip: leave its update out; rollback: go on with the weights of the newest checkpoint", resume="free"
    )
    window: int = setting(
        50, "how many of the last losses the median is taken of, once there are ten", resume="free", ge=10
    )


class Train(Section):
    """How long, in which portions, and what is watched."""

    epochs: int | None = setting(
        None, "passes over the training data; default 3 where max_steps is not set", resume="warn", ge=1
    )
    max_steps: int | None = setting(
        None, "optimizer steps; the first of epochs and max_steps ends the run", resume="warn", ge=1
    )
    max_minutes: float | None = setting(
        None, "wall time of one start; then a checkpoint is saved and the exit code is 75", resume="free", gt=0
    )
    global_batch_size: int = setting(32, "examples per optimizer step over all ranks", ge=1)
    micro_batch_size: int = setting(8, "examples per forward pass", ge=1)
    shuffle: bool = setting(True, "a new order each epoch; false: file order")
    eval_every: Annotated[int | str, BeforeValidator(_read_eval_every)] = setting(
        "epoch", "steps between evaluations, or: epoch, 2 epochs, never", resume="free"
    )
    log_every: int = setting(10, "steps between train lines in metrics.jsonl", resume="free", ge=1)
    log_gradients: int | None = setting(
        None, "steps between lines with the gradient's norm in each layer; null: none", resume="free", ge=1
    )
    non_finite: Literal["stop", "skip"] = setting(
        "stop", "what a loss or gradient that is not finite does", resume="free"
    )
    hang_timeout: float | None = setting(
        300.0, "seconds without progress until the job is ended as hung; null or 0: never", resume="free", ge=0
    )
    spike: Spike | None = setting(None, "what a loss far above those before it does; null: nothing", resume="free")
    check_replicas: int | None = setting(
        None, "steps between comparisons of all ranks' weights, bit by bit; null: none", resume="free", ge=1
    )
    early_stopping: int | None = setting(None, "stop after so many evaluations without a better", resume="free", ge=1)
    local_steps: int = setting(
        1, "ddp: steps that each rank takes on its own share before the ranks average weights and moments", ge=1
    )

    @model_validator(mode="before")
    @classmethod
    def _three_epochs_unless_told(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("epochs") is None and values.get("max_steps") is None:
            return {**values, "epochs": 3}
        return values


class Best(Section):
    """By which metric the best step is chosen."""

    metric: str = setting("loss", "a metric of the evaluation, e.g. matthews_correlation")
    mode: Literal["min", "max"] = setting("min", "which is better; default: min for a loss or perplexity, else max")

    @model_validator(mode="before")
    @classmethod
    def _more_is_better_unless_a_loss(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and "mode" not in values and isinstance(values.get("metric"), str):
            less_is_better = values["metric"].endswith(("loss", "perplexity", "bits_per_character"))
            return {**values, "mode": "min" if less_is_better else "max"}
        return values


class Evaluation(Section):
    """The exact evaluation."""

    micro_batch_size: int = setting(32, "examples per forward pass", resume="warn", ge=1)
    best: Best | None = setting(None, "keep the best step's model and metrics instead of the last's")
    metrics: Annotated[tuple[str, ...], Strict(False)] | None = setting(
        None, "which of the task's metrics are reported, beside loss; null: all", resume="free"
    )
    factory: str | None = setting(
        None, "package.module:function beside the config file: (predictions, references) -> metrics of your own"
    )
    factory_folder: AnyPath | None = setting(
        None, "where that module's file is; default: the config file's folder, or the current one", resume="free"
    )
    generate: bool = setting(False, "seq2seq: write a text for every example and judge it (BLEU, ROUGE)", resume="warn")
    num_beams: int = setting(1, "of generated texts; 1: always the likeliest token", resume="warn", ge=1)
    max_new_tokens: int | None = setting(
        None, "tokens of a generated text; default: task.max_target_length", resume="warn", ge=1
    )


class Checkpoint(Section):
    """Durable state: weights, optimizer and place in the data, to go on from on any number of ranks and any engine."""

    every: int | None = setting(
        None, "steps between checkpoints, and after the last step; null: none", resume="free", ge=1
    )
    keep: int = setting(2, "how many checkpoints to keep, beside that of the best step", resume="free", ge=1)
    resume: str = setting(
        "auto", "auto: from the newest whole one of this run; never; or the path of a checkpoint", resume="free"
    )
    allow_changes: Annotated[tuple[str, ...], Strict(False)] = setting(
        (), "settings that may have changed although they change the mathematics: [optim.learning_rate]", resume="free"
    )
    format: Literal["portable", "sharded"] = setting(
        "portable", "sharded: each rank writes what it keeps, for models too large to gather", resume="free"
    )
    replicas: int = setting(2, "nodes that keep a copy, where run.output_dir is not shared", resume="free", ge=1)
    max_file_gb: float = setting(5.0, "gigabytes of a file at most", resume="free", gt=0)
    asynchronous: bool = setting(True, "write while training goes on; false: wait for the disk", resume="free")


class Tracking(Section):
    """Where the numbers go besides metrics.jsonl."""

    tensorboard: bool = setting(True, "write event files to tensorboard/ in the run folder", resume="free")


class Config(Section):
    """All settings of a run."""

    run: Run = setting(Run(), "the run folder", resume="free")
    task: TaskSettings = setting(..., "what is learned")
    model: Model = setting(Model(), "the model and its tokenizer")
    freeze: Freeze = setting(Freeze(), "what does not learn")
    data: Data = setting(Data(), "the examples")
    optim: Optim = setting(Optim(), "the optimizer")
    schedule: Schedule = setting(Schedule(), "the learning rate")
    train: Train = setting(Train(), "the loop")
    engine: Engine = setting(Engine(), "the back end")
    evaluation: Evaluation = setting(Evaluation(), "the evaluation")
    checkpoint: Checkpoint = setting(Checkpoint(), "durable state")
    tracking: Tracking = setting(Tracking(), "logs")
    generate: Generate = setting(Generate(), "the generate command")
    predict: Predict = setting(Predict(), "the predict command")
    export: Export = setting(Export(), "the export command")
    inspect: Inspect = setting(Inspect(), "the inspect command")
    download: Download = setting(Download(), "the download command")
    talk: Talk = setting(Talk(), "the chat command")

    _folder: Path = PrivateAttr(Path())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Config) and self.model_dump() == other.model_dump()  # wherever they were read from

    @property
    def folder(self) -> Path:
        """Where the config file lies, and modules of the user's own beside it; without a file, the working folder."""
        return self._folder

    def in_folder(self, folder: Path) -> Config:
        """The same settings, read from a file in that folder, where a module of the user's own is looked for."""
        model, evaluation = self.model, self.evaluation
        # Noted down, so that the run's config.yaml finds them too.
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
    def _refused_combinations(self) -> Config:
        """Settings that are right one by one and wrong together."""
        found = [
            *self._engine_conflicts(),
            *self._course_conflicts(),
            *self._task_conflicts(),
            *wire_conflicts(
                self.engine,
                local_steps=self.train.local_steps,
                loose_steps=self._loose_steps(),
                logs_gradients=self.train.log_gradients is not None,
            ),
        ]
        if found:
            raise ValueError("\n".join(found))
        return self

    def _engine_conflicts(self) -> list[str]:
        """What an engine cannot do with other settings."""
        stage, optim = self.engine.zero_stage, self.optim
        sharded = self.engine.is_deepspeed and stage is not None and stage >= 1
        found = []
        if optim.name == "adafactor" and sharded:
            found.append(
                f"optim.name=adafactor with engine.zero_stage={stage}: ZeRO hands Adafactor flat shards, whose row and "
                "column statistics mean nothing. Use ZeRO stage 0, ddp, or AdamW"
            )
        if self.engine.precision == "fp16" and sharded and optim.max_grad_norm is not None:
            found.append(
                f"engine.precision=fp16 with engine.zero_stage={stage} and optim.max_grad_norm={optim.max_grad_norm}: "
                "DeepSpeed clips gradients still multiplied by the loss scale. Use bf16, or optim.max_grad_norm=null"
            )
        if self.train.check_replicas is not None and sharded and stage == 3:
            found.append(
                "train.check_replicas compares whole weights, but with engine.zero_stage=3 each rank holds a part of its "
                "own: set it to null, or use stage 0, 1 or 2"
            )
        if self.engine.find_unused and self.engine.is_deepspeed:
            found.append("engine.find_unused is ddp's: DeepSpeed would decay what is unused. Use engine.name=ddp")
        return found

    def _course_conflicts(self) -> list[str]:
        """What evaluations, checkpoints and monitors need of each other."""
        found = []
        if self.train.early_stopping is not None and self.evaluation.best is None:
            found.append("train.early_stopping needs evaluation.best: {metric: ..., mode: ...} to know what better is")
        if self.train.spike is not None and self.train.spike.action == "rollback" and self.checkpoint.every is None:
            found.append(
                "train.spike.action=rollback needs checkpoints to go back to: set checkpoint.every, or use skip"
            )
        if self.run.overwrite and self.checkpoint.resume not in ("auto", "never"):
            found.append("run.overwrite=true begins anew and checkpoint.resume=PATH goes on: give one of them")
        if self.evaluation.best is not None and self.train.eval_every == "never":
            found.append(
                "evaluation.best needs evaluations, but train.eval_every=never: set it to epoch or a number of steps"
            )
        return found

    def _task_conflicts(self) -> list[str]:
        """What a task needs, or cannot have."""
        found = []
        if self.model.factory is not None and not self.task.allows_factory:
            found.append(f"task.name={self.task.name} needs an encoder-decoder of transformers: drop model.factory")
        if self.evaluation.generate and not self.task.generates_texts:
            found.append(f"evaluation.generate: task.name={self.task.name} generates no texts: leave it out")
        return [*found, *self.task.conflicts(max_length=self.max_length)]

    def _loose_steps(self) -> dict[str, int]:
        """Settings that name steps at which all ranks must hold the same weights."""
        train = self.train
        named = {"train.eval_every": train.eval_every, "train.check_replicas": train.check_replicas}
        named |= {"checkpoint.every": self.checkpoint.every}
        return {name: steps for name, steps in named.items() if isinstance(steps, int)}
