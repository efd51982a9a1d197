"""Lives of one run: each a start of the train command that dies at a given moment, or goes to the end."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtrain.commands.train import run_train
from dtrain.config.load import load_config
from dtrain.distributed.rank_context import RankContext
from dtrain.training import checkpoints, loop, prepare_run, run
from dtrain.training.monitors.protocol import Decision, RunState, StepRecord
from tests.support import tiny

STEPS, PER_EPOCH = 12, 5
"""Of 150 examples in global batches of 32: the last step of an epoch has 22."""


class Died(Exception):
    """Stands for a crash: nothing is put in order."""


class DieIn:
    """Dies in a step, before its checkpoint."""

    def __init__(self, step: int) -> None:
        self._step = step

    def after_step(self, record: StepRecord) -> Decision:
        if record.step == self._step:
            raise Died
        return Decision.CONTINUE


class AskIn:
    """Asks the run to stop with a checkpoint, as a user's own monitor may."""

    def __init__(self, step: int) -> None:
        self._step = step

    def after_step(self, record: StepRecord) -> Decision:
        return Decision.PREEMPT if record.step == self._step else Decision.CONTINUE


class DieAfter(checkpoints.CheckpointMonitor):
    """Dies when the checkpoint of a step has been written."""

    step = 0

    def save(self) -> None:
        super().save()
        if self._state.step == DieAfter.step:
            raise Died


def material(folder: Path) -> Path:
    """Data and model of every run."""
    tiny.write_cola(folder / "cola", train=150, dev=7)
    tiny.write_model(folder / "model", dropout=0.1)
    return folder


def settings(folder: Path, name: str, changes: Mapping[str, Any]) -> list[str]:
    """A run whose loss is logged at each step, and whose checkpoints are on the disk before the next one."""
    values = {
        "run.output_dir": folder / "runs",
        "run.name": name,
        "task.name": "classification",
        "model.name_or_path": folder / "model",
        "data.name": "cola",
        "data.path": folder / "cola",
        "data.cache_dir": folder / "cache",
        "data.max_length": 32,
        "optim.learning_rate": 1e-3,
        "train.max_steps": STEPS,
        "train.micro_batch_size": 4,
        "train.log_every": 1,
        "train.eval_every": "never",
        "tracking.tensorboard": False,
        "checkpoint.every": 1,
        "checkpoint.keep": 3,
        "checkpoint.asynchronous": False,
    }
    return [f"{key}={value}" for key, value in {**values, **changes}.items()]


def life(
    context: RankContext,
    folder: str,
    name: str,
    changes: Mapping[str, Any],
    *,
    die_in: int | None = None,
    die_after: int | None = None,
    broken: str | None = None,
    state: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Collective. One start; gives the example indices of each step that this rank took, in order, and how it ended.

    Args:
        broken: forgets the optimizer's "moments", or the "place" in the data.
        state: put in the place of what the checkpoint says of the run.
    """
    taken: dict[int, list[list[int]]] = {}
    real = loop.run_micro_batches

    def recorded(engine: Any, task: Any, batches: Any, **more: Any) -> Any:
        counted = [list(batch.example_index) for batch in batches.micro_batches if batch.counted]
        taken[batches.step] = counted
        return real(engine, task, batches, **more)

    loop.run_micro_batches = recorded
    if die_after is not None:
        DieAfter.step = die_after
        run.CheckpointMonitor = DieAfter  # type: ignore[misc]
    if broken == "moments":
        run.restore_slots = lambda *_: None
    if broken == "place":
        prepare_run.RunState = lambda **saved: RunState(**saved | ({"step": saved["step"] - 1} if saved else {}))  # type: ignore[assignment,misc]
    if state is not None:
        prepare_run.RunState = lambda **saved: RunState(**saved | (state if saved else {}))  # type: ignore[assignment,misc]
    config = load_config(None, settings(Path(folder), name, changes))
    try:
        run_train(config, context, monitors=[] if die_in is None else [DieIn(die_in)])
        ended = "done"
    except Died:
        ended = "died"
    return {"ended": ended, "taken": [[step, indices] for step, indices in taken.items()]}


def weights_and_moments(folder: Path, name: str, step: int) -> dict[str, bytes]:
    """Every byte of a checkpoint's tensors."""
    path = folder / "runs" / name / "checkpoints" / f"step-{step:06d}"
    return {file.name: file.read_bytes() for file in path.glob("*.safetensors")}


def losses(folder: Path, name: str) -> dict[int, float]:
    """By step; of one that was taken twice, the last."""
    lines = (folder / "runs" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    return {event["step"]: event["loss"] for event in events if event["event"] == "train"}
