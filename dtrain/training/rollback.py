"""Returns to an earlier checkpoint of this run: the best step's, or the newest one after a loss spike."""

from __future__ import annotations

from dtrain.checkpoint import select
from dtrain.checkpoint.format import folder_name
from dtrain.checkpoint.select import SelectedCheckpoint
from dtrain.config.schema import Config
from dtrain.console import log
from dtrain.distributed.heartbeat import Phase
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import CheckpointError
from dtrain.runs.folder import RunFolder
from dtrain.training.monitors.protocol import RunState


def forget_lost_best(state: RunState, checkpoint: SelectedCheckpoint, config: Config, context: RankContext) -> None:
    """Collective. Forgets the best step if no node has its weights, since the end of the run could not restore them."""
    best = state.best_step
    if config.evaluation.best is None or best is None or best == checkpoint.step:
        return
    if not select.is_available(RunFolder(config.run_dir).checkpoints / folder_name(best), context):
        log.warning(
            "the best step so far, %d, has no checkpoint (checkpoint.every keeps one): only steps from %d on count for "
            "the best",
            best,
            state.step,
        )
        state.best, state.best_step, state.patience = None, None, 0


def find_best(step: int, config: Config, context: RankContext) -> SelectedCheckpoint | None:
    """Collective. Returns the checkpoint of the best step; None, with a warning, if it is damaged."""
    path = RunFolder(config.run_dir).checkpoints / folder_name(step)
    try:
        return select.at(path, context, setting="the best step's checkpoint")
    except CheckpointError as error:  # the same on every rank
        log.warning("%s The model of the last step is used instead of the best one", error)
        return None


class Rollback:
    """Chooses the checkpoint to return to after a spike."""

    def __init__(self, config: Config, context: RankContext) -> None:
        self._config, self._context = config, context
        self._last: tuple[int, int] | None = None

    def choose(self, step: int) -> SelectedCheckpoint | None:
        """Collective. Returns the newest checkpoint; None, with a warning, if there is none.

        A spike soon after the last one shows that the checkpoint already had bad weights: then the one before it is used.
        """
        # The step itself may have been saved before the monitor that does not like it.
        spike, below = self._config.train.spike, step
        if self._last is not None and spike is not None and step - self._last[0] <= spike.window:
            below = self._last[1]
        with self._context.heartbeat.within(Phase.LOADING):  # Verification reads every byte.
            folder = RunFolder(self._config.run_dir).checkpoints
            chosen, _ = select.newest(folder, self._context, below=below)
        if chosen is None:
            older = "" if below == step else f" before that of step {below}"
            log.warning("step %d: there is no checkpoint%s to return to; training continues", step, older)
            return None
        self._last = (step, chosen.step)
        return chosen
