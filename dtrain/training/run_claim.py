"""Claims the run folder when a command starts: rank 0 decides, and all ranks get the decision."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from dtrain.checkpoint import select
from dtrain.checkpoint.select import SelectedCheckpoint
from dtrain.config.earlier_runs import as_begun, lacking
from dtrain.config.load import differences, to_yaml
from dtrain.config.schema import Config
from dtrain.console import log
from dtrain.distributed.collectives import gather_object, on_main
from dtrain.distributed.launcher_env import DTRAIN, TORCHRUN
from dtrain.distributed.rank_context import RankContext
from dtrain.distributed.torchrun_agent import find_agent
from dtrain.errors import CheckpointError, ConfigError
from dtrain.runs.folder import RunFolder, claim, folder_state, read_run_id, unwritable_error
from dtrain.runs.launch_record import LaunchRecord, gather_launch, read_launch
from dtrain.runs.lock import locked
from dtrain.runs.resume_policy import AvailableCheckpoints, StartAction, decide_start, resume_settings


@dataclass(frozen=True)
class RunClaim:
    """The decision for this start.

    Attributes:
        action: action of the command in the folder.
        checkpoint: checkpoint to resume from; None starts from the beginning.
        config: the settings of this start, with which the run goes on as it began.
    """

    action: StartAction
    checkpoint: SelectedCheckpoint | None
    config: Config


@contextmanager
def claimed(config: Config, context: RankContext, *, command: str) -> Iterator[RunClaim]:
    """Collective. Yields the decision for this start. Inside, the folder belongs to this run, unless it is already_finished.

    Rank 0 holds the folder's lock until the end, so that there is one writer.

    Raises:
        ConfigError: on all ranks, where the folder is in use, may not be touched or cannot be written.
        CheckpointError: on all ranks; the run cannot be resumed.
    """
    with ExitStack() as lock:
        yield _claim(config, context, command, lock)


def _claim(config: Config, context: RankContext, command: str, lock: ExitStack) -> RunClaim:
    folder = RunFolder(config.run_dir)
    refusals: list[ConfigError] = []
    launch = _launch_record(context)

    def hold() -> tuple[str, bool]:
        """Returns the lock's id, and whether this is the same job again."""
        if folder_state(folder.path) == "foreign":  # a folder that is not a run's is refused below, untouched
            return "", False
        lock_id = ""
        try:
            on_loss, lost_hosts = context.heartbeat.lose_run_dir, context.topology.lost_hosts
            held = locked(folder.path, command=command, on_loss=on_loss, lost_hosts=lost_hosts)
            lock_id = lock.enter_context(held).id
        except OSError as error:
            refusals.append(unwritable_error(folder, error))
        return lock_id, launch.restarts(read_launch(folder.path))

    def work() -> dict[str, object]:
        # config.yaml may come from a start that saved no checkpoint.
        old = chosen.config_text if chosen is not None else folder.old_config()
        begun = as_begun(old, settings) if command == "train" else settings
        changes = differences(old, begun)
        try:
            _refuse_foreign(folder, chosen, available)
            decision = decide_start(begun, command=command, changes=changes, checkpoints=available)
        except CheckpointError:
            folder.exit.unlink(missing_ok=True)  # this end is of this run, and the latest
            raise
        notes, goes_on = list(decision.notes), command == "train" and decision.action == "resume"
        if goes_on:
            notes += _notes_of_earlier(old, settings, begun)
        if decision.action != "already_finished":
            if refusals:
                raise refusals[0]
            run_id = chosen.run_id if chosen is not None and not available.is_user_choice else ""
            text, is_old = to_yaml(as_begun(old, config) if goes_on else config), decision.set_aside
            moved = claim(folder, text, set_aside=is_old, launch=launch, run_id=run_id)
            notes += [f"the old run was moved to {moved}"] if moved is not None else []
        elif not refusals:  # an earlier start's exit.json does not describe this start
            folder.exit.unlink(missing_ok=True)
        return {"action": decision.action, "notes": notes, "old": old if goes_on else None}

    try:
        lock_id, is_again = on_main(hold, context)
        settings = resume_settings(config) if is_again else config
        chosen, available = _checkpoints(settings, context) if command == "train" else (None, AvailableCheckpoints())
        result = on_main(work, context)
    except ConfigError as error:
        error.is_recorded = False
        raise
    for note in result["notes"]:
        log.info("%s", note)
    context.heartbeat.claim_run_dir(lock_id)
    action: StartAction = result["action"]
    chosen = chosen if action == "resume" else None
    if command == "train" and action != "already_finished":
        select.rename_newer(folder.checkpoints, chosen.step if chosen is not None else 0, context)
    return RunClaim(action, chosen, as_begun(result["old"], config))


def _notes_of_earlier(old: str | None, config: Config, begun: Config) -> list[str]:
    """Returns a note for each setting in which a run goes on as it began, because it had no such setting yet."""
    return [
        f"{change.key}={change.new}, as this run began, so that its numbers stay the same (new runs: {change.old})"
        for change in differences(to_yaml(config), begun)
        if change.key in lacking(old)
    ]


def _refuse_foreign(folder: RunFolder, chosen: SelectedCheckpoint | None, available: AvailableCheckpoints) -> None:
    """Refuses a checkpoint that another run wrote, unless the user named it."""
    own = read_run_id(folder.path)
    if chosen is None or available.is_user_choice or not own or not chosen.run_id or chosen.run_id == own:
        return
    path = folder.checkpoints / f"step-{chosen.step:06d}"
    raise CheckpointError(
        f"{path} was written by another run: its manifest names run {chosen.run_id[:8]}, and {folder.path} holds run "
        f"{own[:8]}. Were files of two runs mixed? Move it away to resume from the checkpoint before it, or start a new run "
        f"from it: run.name={folder.path.name}-2 checkpoint.resume={path}"
    )


def _launch_record(context: RankContext) -> LaunchRecord:
    """Collective. Returns what started this job, on all nodes; only rank 0's is complete."""
    has_agent = context.topology.launcher in (DTRAIN, TORCHRUN)
    starts = gather_object(find_agent(), context) if has_agent else [None]
    return gather_launch(starts or [None], context.topology.launches)


def _checkpoints(config: Config, context: RankContext) -> tuple[SelectedCheckpoint | None, AvailableCheckpoints]:
    """Collective. Returns the checkpoint that a training run would resume from, and the state of all checkpoints."""
    resume = config.checkpoint.resume
    if config.run.overwrite or resume == "never":
        return None, AvailableCheckpoints()
    if resume != "auto":
        chosen = select.at(Path(resume), context, setting="checkpoint.resume")
        return chosen, AvailableCheckpoints(chosen.step, is_user_choice=True)
    newest, damaged = select.newest(RunFolder(config.run_dir).checkpoints, context)
    return newest, AvailableCheckpoints(newest.step if newest is not None else None, damaged)
