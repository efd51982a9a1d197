"""What a new start may do with the run folder that it finds: begin, go on, leave it, or refuse."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from dtrain.config.error_messages import Difference
from dtrain.config.schema import Config
from dtrain.distributed.launcher_env import TORCHRUN
from dtrain.distributed.process_info import age_s
from dtrain.errors import CheckpointError, ConfigError
from dtrain.runs.folder import LAUNCHES, RunFolder, State, state
from dtrain.runs.jsonl import events

Action = Literal["start", "go_on", "already_finished"]


class Decision(NamedTuple):
    """What becomes of a start, made of JSON types so that it can cross ranks.

    action: start in a folder with nothing to lose; go_on with the unfinished run in it; already_finished: do nothing.
    set_aside: the folder that is there is to be moved away first.
    notes: what the user should be told, a line each.
    """

    action: Action
    set_aside: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Checkpoints:
    """What the nodes hold of a run. newest: step of the newest whole one; damaged: steps of those found damaged.

    given: whether the user named it (checkpoint.resume=PATH).
    """

    newest: int | None = None
    damaged: frozenset[int] = frozenset()
    given: bool = False


def decide(
    config: Config, *, command: str, changes: Sequence[Difference], checkpoints: Checkpoints | None = None
) -> Decision:
    """What to do with the run folder that `config` names and what lies there. Changes nothing.

    Args:
        config: the settings asked for.
        command: train, or one of those that write results only: evaluate, predict, generate, inspect.
        changes: what `config` changes against the config.yaml in the folder.
        checkpoints: that a training run could go on from.

    Raises:
        ConfigError: the folder holds something that this start may not touch.
        CheckpointError: the run goes on from a checkpoint that nobody has.
    """
    path, found = config.run_dir, state(config.run_dir)
    checkpoints = checkpoints or Checkpoints()
    other = f"Choose another run.name (run.name={_free_name(path)} is free)"
    if found == "foreign":
        inside = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
        what = f"holds {', '.join(inside[:3])}, which dtrain did not write" if inside else "is not a folder"
        raise ConfigError(f"{path} {what}. {other} or run.output_dir")
    if found == "absent" and checkpoints.newest is None:
        return Decision("start", False, ())
    if command != "train":
        if found not in ("evaluation", "absent"):
            raise ConfigError(f"{path} holds a training run, which {command} must not touch. {other}")
        return Decision("start", config.run.overwrite, ())
    if config.run.overwrite:
        return Decision("start", True, ())
    if found == "evaluation":
        raise ConfigError(f"{path} holds results of an evaluation. {other}, or set run.overwrite=true to move them")
    if found == "unfinished" and checkpoints.newest is None and not _has_something_to_lose(RunFolder(path)):
        return Decision("start", False, ())
    if config.checkpoint.resume == "never":
        raise ConfigError(
            f"{path} holds {'a' if found == 'finished' else 'an'} {found} run, and checkpoint.resume=never. "
            f"{other}, or set run.overwrite=true to move it to {path.name}.old-<time>"
        )
    refused = [change for change in changes if change.resume == "refuse" and not _is_allowed(change.key, config)]
    _refuse_changes(path, found, refused, other)
    if found == "finished" and not checkpoints.given and _is_complete(RunFolder(path), checkpoints, changes):
        return Decision("already_finished", False, (f"{path} is finished already; run.overwrite=true trains it anew",))
    return _go_on(path, found, changes, checkpoints)


def is_started_again(folder: RunFolder, launches: Mapping[str, int]) -> bool:
    """Whether this is a later start, by the launcher itself, of the very job that took the folder before.

    Args:
        launches: what may have started it, by name, and how often; see launchers.launches_of.
    """
    try:
        file = folder.path / LAUNCHES
        before, age = file.read_text(encoding="utf-8").splitlines(), time.time() - file.stat().st_mtime
    except OSError:
        return False
    again = [name for name, count in launches.items() if count > 0 and name in before]
    if again == [f"{TORCHRUN} none"]:  # torchrun's name for a job that has none: told by its age
        launcher_s = age_s(os.getppid())
        return launcher_s is not None and age < launcher_s
    return bool(again)


def going_on(config: Config) -> Config:
    """The settings for a later start of the same job: what was meant for the first one would undo that one's work."""
    run = config.run.model_copy(update={"overwrite": False})
    checkpoint = config.checkpoint.model_copy(update={"resume": "auto"})
    return config.model_copy(update={"run": run, "checkpoint": checkpoint})


def _is_allowed(key: str, config: Config) -> bool:
    """Whether checkpoint.allow_changes names the setting, or what it is a part of."""
    return any(key == name or key.startswith(f"{name}.") for name in config.checkpoint.allow_changes)


def _refuse_changes(path: Path, found: State, refused: Sequence[Difference], other: str) -> None:
    if not refused:
        return
    was = "was trained" if found == "finished" else "was begun"
    names = ", ".join(change.key for change in refused)
    raise ConfigError(
        f"{path} {was} with other settings:\n{_table(refused)}\nTake these back, or {other[0].lower()}{other[1:]}, "
        f"or set run.overwrite=true to move the old run to {path.name}.old-<time>, or go on with them all the same by "
        f"checkpoint.allow_changes='[{names}]'"
    )


def _is_complete(folder: RunFolder, checkpoints: Checkpoints, changes: Sequence[Difference]) -> bool:
    """Whether nothing is left to do for a run with model/ and summary.json: no more steps, no damage."""
    if any(change.key in ("train.max_steps", "train.epochs") for change in changes):
        return False
    if checkpoints.newest is None:
        return not checkpoints.damaged
    summary = json.loads(folder.summary.read_text(encoding="utf-8"))
    return bool(summary.get("step") == checkpoints.newest)


def _go_on(path: Path, found: State, changes: Sequence[Difference], checkpoints: Checkpoints) -> Decision:
    """From the newest whole checkpoint, unless that is not the one that the run had come to."""
    newest, known = checkpoints.newest, _known_checkpoint(RunFolder(path).metrics)
    if newest is None and (checkpoints.damaged or known):
        steps = ", ".join(map(str, sorted(checkpoints.damaged or {known or 0})))
        what = "every checkpoint is damaged" if checkpoints.damaged else "no node holds a checkpoint of it any more"
        raise CheckpointError(
            f"{path} cannot go on: {what} (step {steps}). Bring one back to {path / 'checkpoints'}, name one by "
            "checkpoint.resume=PATH, or begin anew with run.overwrite=true"
        )
    is_lost = known is not None and newest is not None and known > newest and known not in checkpoints.damaged
    if is_lost and not checkpoints.given:
        raise CheckpointError(
            f"{path} has saved a checkpoint of step {known} (metrics.jsonl says so), but no node holds it; the newest there "
            f"is of step {newest}. Bring back the node or disk that has it, or go on from the older one by "
            f"checkpoint.resume={path / 'checkpoints' / f'step-{newest:06d}'}"
        )
    if newest is None and found == "finished":
        raise ConfigError(
            f"{path} is finished and has no checkpoint to go on from. Take train.epochs and train.max_steps back, or set "
            "run.overwrite=true to train anew"
        )
    first = f"{path} goes on from the checkpoint of step {newest}"
    if newest is None:
        first = f"{path} holds an unfinished run without a checkpoint: it starts again at step 1"
    notes = [first, *([f"settings changed since:\n{_table(changes)}"] if changes else [])]
    return Decision("go_on", False, tuple(notes))


def _known_checkpoint(metrics: Path) -> int | None:
    """Step of the newest checkpoint that the log says there was, in the line of history that the run is in."""
    known = None
    for event in events(metrics) if metrics.exists() else ():
        match event.get("event"):
            case "checkpoint":
                known = int(event["step"])
            case "resume":  # what was beyond was given up then
                known = int(event["step"]) or None
    return known


def _table(changes: Sequence[Difference]) -> str:
    warning = {"free": "", "warn": "  (the numbers differ from here on)", "refuse": ""}
    return "\n".join(f"  {c.key}: {c.old} -> {c.new}{warning[c.resume]}" for c in changes)


def _free_name(path: Path) -> str:
    return next(name for n in range(2, 10**6) if not (path.parent / (name := f"{path.name}-{n}")).exists())


def _has_something_to_lose(folder: RunFolder) -> bool:
    if folder.model.exists() or (folder.checkpoints.is_dir() and any(folder.checkpoints.iterdir())):
        return True
    return folder.metrics.exists() and any(event.get("event") == "train" for event in events(folder.metrics))
