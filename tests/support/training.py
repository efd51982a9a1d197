"""A short training run inside a test process: the real loop, engine and task over a tiny model and table.

`Subject` is what an exactness test puts on trial; a broken one must be rejected.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from dtrain.config.schema import Config
from dtrain.config.task import Classification
from dtrain.distributed.rank_context import RankContext
from dtrain.engine import schedules
from dtrain.engine.build import build_engine, place
from dtrain.engine.protocol import Engine
from dtrain.tasks.classification import ClassificationTask
from dtrain.training import build as construct
from dtrain.training.look_ahead import LookAhead
from dtrain.training.loop import LoopSettings, batches_ahead, train
from dtrain.training.monitors.protocol import Decision, Monitor, RunState, StepRecord
from dtrain.training.thaw import thaw
from tests.support import tiny

BREAKS = ("repeated_example", "scaled_gradient", "seed_per_rank")


class Recorder:
    """Keeps every step's numbers."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def after_step(self, record: StepRecord) -> Decision:
        self.steps.append(
            {"loss": record.loss, "grad_norm": record.grad_norm, "applied": record.applied, "targets": record.targets}
        )
        return Decision.CONTINUE


class Scaled:
    """An engine whose gradient is off by a factor: a negative control."""

    def __init__(self, engine: Engine, factor: float) -> None:
        self._engine, self._factor = engine, factor

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def backward(self, loss: torch.Tensor) -> None:
        self._engine.backward(loss * self._factor)


@dataclass(frozen=True)
class Setting:
    """JSON-able description of a run. rows: of the split. broken: one of BREAKS, or None.

    table: the rows are an Arrow table, so that their lengths are known; else a step is cut in the order of its examples.
    """

    rows: int = 21
    steps: int = 6
    global_batch_size: int = 8
    micro_batch_size: int = 3
    dropout: float = 0.1
    double: bool = False
    optimizer: str = "sgd"
    learning_rate: float = 0.5
    layer_decay: float | None = None
    groups: tuple[dict[str, Any], ...] = ()
    max_grad_norm: float | None = 0.4
    precision: str = "fp32"
    engine: str = "auto"
    zero_stage: int | None = None
    freeze: tuple[str, ...] = ()
    freeze_method: str = "requires_grad"
    thaw: tuple[tuple[int, str], ...] = ()
    class_weights: bool = False
    checkpointing: bool = False
    compile: bool = False
    unpad: str = "auto"
    deepspeed: str = ""
    momentum: float = 0.0
    shuffle: bool = True
    workers: int = 0
    warmup: int = 1
    find_unused: bool = False
    log_gradients: int | None = None
    gradient_wire: str = "fp32"
    powersgd: dict[str, Any] | None = None
    local_steps: int = 1
    bucket_mb: float | None = None
    offload: bool = False
    reshard_after_forward: bool = True
    bitwise: bool = False
    table: bool = False
    sort_by_length: bool = True
    micro_batch_tokens: int | None = None
    cache: str = "off"
    cache_dir: str | None = None
    cache_gb: float = 8.0
    broken: str | None = None

    def config(self) -> Config:
        zero: dict[str, Any] = {"stage3_param_persistence_threshold": 0} if self.zero_stage == 3 else {}
        if self.deepspeed == "offload":
            zero["offload_optimizer"] = {"device": "cpu"}
        return Config.model_validate(
            {
                "run": {"name": "test", "seed": 7},
                "task": {
                    "name": "classification",
                    "class_weights": {"no": 1.0, "yes": 2.5} if self.class_weights else None,
                },
                "train": {
                    "max_steps": self.steps,
                    "global_batch_size": self.global_batch_size,
                    "micro_batch_size": self.micro_batch_size,
                    "micro_batch_tokens": self.micro_batch_tokens,
                    "sort_by_length": self.sort_by_length,
                    "shuffle": self.shuffle,
                    "local_steps": self.local_steps,
                },
                "model": {"compile": self.compile, "unpad": self.unpad},
                "optim": {
                    "name": self.optimizer,
                    "learning_rate": self.learning_rate,
                    "max_grad_norm": self.max_grad_norm,
                    "momentum": self.momentum,
                    "layer_decay": self.layer_decay,
                    "groups": self.groups,
                },
                "schedule": {"warmup_steps": self.warmup},
                "freeze": {
                    "modules": self.freeze,
                    "method": self.freeze_method,
                    "thaw": [{"epoch": epoch, "modules": [path]} for epoch, path in self.thaw],
                    "cache": self.cache,
                    "cache_gb": self.cache_gb,
                },
                "data": {"cache_dir": self.cache_dir},
                "engine": {
                    "name": self.engine,
                    "precision": self.precision,
                    "zero_stage": self.zero_stage,
                    "deepspeed": {"zero_optimization": zero} if zero else {},
                    "find_unused": self.find_unused,
                    "gradient_wire": self.gradient_wire,
                    "powersgd": self.powersgd,
                    "bucket_mb": self.bucket_mb,
                    "offload": self.offload,
                    "reshard_after_forward": self.reshard_after_forward,
                    "bitwise": self.bitwise,
                },
            }
        )


def task(setting: Setting, rows: int | None = None) -> ClassificationTask:
    """Classification over made-up sentences."""
    options = setting.config().task
    assert isinstance(options, Classification)
    made: Any = tiny.arrow_sentences if setting.table else tiny.sentences
    splits = {"train": made(rows or setting.rows), "validation": made(11, seed=1)}
    return ClassificationTask(splits, tiny.tokenizer(), ["no", "yes"], options, max_length=32)


@dataclass
class Run:
    """A run without a folder: what the loop needs, before it begins."""

    config: Config
    context: RankContext
    prepared: construct.PreparedModel
    task: Any
    engine: Engine
    settings: LoopSettings
    state: RunState
    look_ahead: LookAhead = field(init=False)

    def go(self, *monitors: Monitor) -> Engine:
        """Collective. Trains to the end; returns the engine to continue with."""
        steps = batches_ahead(self.settings, self.task, self.engine, start=self.state.step)
        self.look_ahead = LookAhead(steps, self.task, self.context)
        try:
            train(self, monitors)
        finally:
            self.look_ahead.close()
        return self.engine

    def begin_epoch(self, epoch: int) -> None:
        """Collective. Thaws, as a real run does."""
        self.engine = thaw(self.engine, epoch, self.config, self.prepared, self.state)

    def roll_back(self) -> None:
        """There is no checkpoint here to roll back to."""


def build(context: RankContext, setting: Setting, module: nn.Module | None = None, learns: Any = None) -> Run:
    """Collective. A run of that setting; `module` and `learns` instead of the tiny BERT and its classification."""
    config = setting.config()
    learns = learns or task(setting)
    if setting.broken == "repeated_example":
        learns.splits = {**learns.splits, "train": Repeats(learns.splits["train"], context.rank)}
    module = module or tiny.bert(dropout=setting.dropout, layers=2)
    module = module.double() if setting.double else module
    if setting.checkpointing:
        module.gradient_checkpointing_enable({"use_reentrant": False})
    plan = construct.step_plan(config, learns)
    module = place(module, config, context)
    prepared = construct.prepare_training(module, config, learns, plan)
    engine = build_engine(prepared.module, config, context)
    if setting.cache != "off":
        prepared.frozen_cache.open(engine)
    state = RunState()
    settings = LoopSettings(
        plan=plan,
        total_steps=setting.steps,
        seed=config.run.seed + (context.rank if setting.broken == "seed_per_rank" else 0),
        workers=setting.workers,
        loss_is_scaled=setting.precision == "fp16",
        learning_rate=schedules.learning_rate(config.optim, config.schedule, total_steps=setting.steps),
        train_mode=prepared.train_mode,
        log_gradients=setting.log_gradients,
    )
    subject: Any = Scaled(engine, 1.0001) if setting.broken == "scaled_gradient" else engine
    return Run(config, context, prepared, learns, subject, settings, state)


def run(context: RankContext, setting: Setting, module: nn.Module | None = None) -> dict[str, Any]:
    """Collective. Trains; gives each step's numbers and, on rank 0, the final weights as nested lists."""
    built = build(context, setting, module)
    lock_step = built.engine.lock_step
    recorder = Recorder()
    ended = built.go(recorder)
    slots = {entry.name: sorted(entry.slots) for entry in ended.named_state(here=context.is_main)}
    weights = weights_of(ended)
    ended.release()
    return {
        "steps": recorder.steps,
        "weights": weights,
        "slots": slots,
        "updates": built.state.updates,
        "lock_step": lock_step,
    }


def weights_of(engine: Engine) -> dict[str, Any]:
    """Collective. Every parameter by name as nested lists on rank 0; nothing elsewhere."""
    return {name: value.double().tolist() for name, value in engine.named_weights() if value is not None}


class Repeats:
    """A split in which rank 1 reads example 0 for example 1: a negative control."""

    def __init__(self, rows: Any, rank: int) -> None:
        self._rows, self._rank = rows, rank

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, indices: list[int]) -> Any:
        return self._rows[[0 if index % 4 == 1 and self._rank == 1 else index for index in indices]]


def worst(one: dict[str, Any], other: dict[str, Any], key: str = "loss") -> float:
    """Largest relative difference over the steps."""
    return max(
        abs(a[key] - b[key]) / max(abs(a[key]), 1e-12) for a, b in zip(one["steps"], other["steps"], strict=True)
    )


def apart(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Largest absolute difference of the final weights."""
    assert one["weights"].keys() == other["weights"].keys()
    pairs = (
        (torch.tensor(one["weights"][n], dtype=torch.float64), torch.tensor(other["weights"][n], dtype=torch.float64))
        for n in one["weights"]
    )
    return max(float((a - b).abs().max()) for a, b in pairs)
