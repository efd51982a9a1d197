"""Decides what a new start may do with an existing run folder: start, resume, do nothing, or refuse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from dtrain.config import bounded_json
from dtrain.config.error_messages import Difference
from dtrain.config.schema import Config
from dtrain.errors import CheckpointError, ConfigError
from dtrain.runs.folder import FolderState, RunFolder, folder_state
from dtrain.runs.jsonl import read_events, read_events_backward

StartAction = Literal["start", "resume", "already_finished"]


class StartDecision(NamedTuple):
    """The decision for this start, made of JSON types so that it can be sent to other ranks.

    Attributes:
        action: start: begin in a folder without valuable content; resume: continue the unfinished run in it;
            already_finished: do nothing.
        set_aside: whether to move the existing folder away first.
        notes: messages for the user, one line each.
    """

    action: StartAction
    set_aside: bool
    notes: tuple[str, ...]


@dataclass(frozen=True)
class AvailableCheckpoints:
    """The checkpoints of a run on all nodes.

    Attributes:
        newest: step of the newest complete checkpoint.
        damaged: steps of the damaged ones.
        is_user_choice: whether the user named the checkpoint (checkpoint.resume=PATH).
    """

    newest: int | None = None
    damaged: frozenset[int] = frozenset()
    is_user_choice: bool = False


def decide_start(
    config: Config, *, command: str, changes: Sequence[Difference], checkpoints: AvailableCheckpoints | None = None
) -> StartDecision:
    """Decides what to do with the run folder of `config` and its content. Changes nothing.

    Args:
        config: the settings of this start.
        command: train, or a command that writes only results: evaluate, predict, generate, inspect.
        changes: differences between `config` and the config.yaml in the folder.
        checkpoints: those that a training run could resume from.

    Raises:
        ConfigError: this start may not change the folder's content.
        CheckpointError: the checkpoint to resume from is missing or damaged.
    """
    path, state = config.run_dir, folder_state(config.run_dir)
    checkpoints = checkpoints or AvailableCheckpoints()
    other = f"Choose another run.name (run.name={_free_name(path)} is free)"
    if state == "foreign":
        names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
        problem = f"holds {', '.join(names[:3])}, which dtrain did not write" if names else "is not a folder"
        raise ConfigError(f"{path} {problem}. {other} or run.output_dir")
    if state == "absent" and checkpoints.newest is None:
        return StartDecision("start", False, ())
    if command != "train":
        if state not in ("evaluation", "absent"):
            raise ConfigError(f"{path} holds a training run, which {command} must not change. {other}")
        return StartDecision("start", config.run.overwrite, ())
    if config.run.overwrite:
        return StartDecision("start", True, ())
    if state == "evaluation":
        raise ConfigError(f"{path} holds results of an evaluation. {other}, or set run.overwrite=true to move them")
    if state == "unfinished" and checkpoints.newest is None and not _has_valuable_content(RunFolder(path)):
        return StartDecision("start", False, ())
    if config.checkpoint.resume == "never":
        raise ConfigError(
            f"{path} holds {'a' if state == 'finished' else 'an'} {state} run, and checkpoint.resume=never. "
            f"{other}, or set run.overwrite=true to move it to {path.name}.old-<time>"
        )
    refused = [change for change in changes if change.resume == "refuse" and not _is_allowed(change.key, config)]
    _refuse_changes(path, state, refused, other)
    if state == "finished" and not checkpoints.is_user_choice and _is_complete(RunFolder(path), checkpoints, changes):
        note = f"{path} is already finished; run.overwrite=true trains it again"
        return StartDecision("already_finished", False, (note,))
    return _decide_resume(path, state, changes, checkpoints)


def resume_settings(config: Config) -> Config:
    """Returns the settings for a relaunch. Those meant for the first start, such as overwrite, would undo its work."""
    run = config.run.model_copy(update={"overwrite": False})
    checkpoint = config.checkpoint.model_copy(update={"resume": "auto"})
    return config.model_copy(update={"run": run, "checkpoint": checkpoint})


def _is_allowed(key: str, config: Config) -> bool:
    """Returns whether checkpoint.allow_changes names the setting or a section that contains it."""
    return any(key == name or key.startswith(f"{name}.") for name in config.checkpoint.allow_changes)


def _refuse_changes(path: Path, state: FolderState, refused: Sequence[Difference], other: str) -> None:
    if not refused:
        return
    was = "was trained" if state == "finished" else "was started"
    names = ", ".join(change.key for change in refused)
    raise ConfigError(
        f"{path} {was} with other settings:\n{_table(refused)}\nUndo these changes, or {other[0].lower()}{other[1:]}, "
        f"or set run.overwrite=true to move the old run to {path.name}.old-<time>, or resume despite the changes with "
        f"checkpoint.allow_changes='[{names}]'"
    )


def _is_complete(folder: RunFolder, checkpoints: AvailableCheckpoints, changes: Sequence[Difference]) -> bool:
    """Returns whether a run with model/ and summary.json has nothing left to do: no more steps, no damage."""
    if any(change.key in ("train.max_steps", "train.epochs") for change in changes):
        return False
    if checkpoints.newest is None:
        return not checkpoints.damaged
    summary = bounded_json.loads(folder.summary.read_text(encoding="utf-8"))
    return bool(summary.get("step") == checkpoints.newest)


def _decide_resume(
    path: Path, state: FolderState, changes: Sequence[Difference], checkpoints: AvailableCheckpoints
) -> StartDecision:
    """Resumes from the newest complete checkpoint, unless the run has saved a newer one that is now missing."""
    newest, known = checkpoints.newest, _known_checkpoint(RunFolder(path).metrics)
    if newest is None and (checkpoints.damaged or known):
        steps = ", ".join(map(str, sorted(checkpoints.damaged or {known or 0})))
        problem = "every checkpoint is damaged" if checkpoints.damaged else "no node has its checkpoints any more"
        raise CheckpointError(
            f"{path} cannot resume: {problem} (step {steps}). Restore one in {path / 'checkpoints'}, name one with "
            "checkpoint.resume=PATH, or start again with run.overwrite=true"
        )
    is_lost = known is not None and newest is not None and known > newest and known not in checkpoints.damaged
    if is_lost and not checkpoints.is_user_choice:
        raise CheckpointError(
            f"{path} has saved a checkpoint of step {known} (according to metrics.jsonl), but no node has it; the newest "
            f"available one is of step {newest}. Restore the node or disk that has it, or resume from the older one with "
            f"checkpoint.resume={path / 'checkpoints' / f'step-{newest:06d}'}"
        )
    if newest is None and state == "finished":
        raise ConfigError(
            f"{path} is finished and has no checkpoint to resume from. Undo the change of train.epochs or "
            "train.max_steps, or set run.overwrite=true to train again"
        )
    first = f"{path} resumes from the checkpoint of step {newest}"
    if newest is None:
        first = f"{path} holds an unfinished run without a checkpoint: it starts again at step 1"
    notes = [first, *([f"settings changed since:\n{_table(changes)}"] if changes else [])]
    return StartDecision("resume", False, tuple(notes))


def _known_checkpoint(metrics: Path) -> int | None:
    """Returns the step of the newest checkpoint in metrics.jsonl that belongs to the current history of the run."""
    last = next(read_events_backward(metrics, ("checkpoint", "resume")), None) if metrics.exists() else None
    # At a resume, later checkpoints were discarded.
    return None if last is None else int(last["step"]) or None


def _table(changes: Sequence[Difference]) -> str:
    warning = {"free": "", "warn": "  (the numbers differ from here on)", "refuse": ""}
    return "\n".join(f"  {c.key}: {c.old} -> {c.new}{warning[c.resume]}" for c in changes)


def _free_name(path: Path) -> str:
    return next(name for n in range(2, 10**6) if not (path.parent / (name := f"{path.name}-{n}")).exists())


def _has_valuable_content(folder: RunFolder) -> bool:
    if folder.model.exists() or (folder.checkpoints.is_dir() and any(folder.checkpoints.iterdir())):
        return True
    return folder.metrics.exists() and any(event.get("event") == "train" for event in read_events(folder.metrics))
