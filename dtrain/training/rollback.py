"""Back to an earlier checkpoint of this run: the best step's, and the one before a loss that went astray."""

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
    """Collective. Looks for the best step anew where no node has its weights: nobody could bring them back at the end."""
    best = state.best_step
    if config.evaluation.best is None or best is None or best == checkpoint.step:
        return
    if not select.is_available(RunFolder(config.run_dir).checkpoints / folder_name(best), context):
        log.warning(
            "the best step so far, %d, has no checkpoint (checkpoint.every keeps it): the best is looked for anew from "
            "step %d on",
            best,
            state.step,
        )
        state.best, state.best_step, state.patience = None, None, 0


def best_of_an_earlier_start(step: int, config: Config, context: RankContext) -> SelectedCheckpoint | None:
    """Collective. The checkpoint of the best step; None, and a warning, where it is damaged."""
    path = RunFolder(config.run_dir).checkpoints / folder_name(step)
    try:
        return select.at(path, context, setting="the best step's checkpoint")
    except CheckpointError as error:  # on every rank alike
        log.warning("%s The model of the last step takes the place of the best one", error)
        return None


class Rollback:
    """Chooses where to go back to after a spike."""

    def __init__(self, config: Config, context: RankContext) -> None:
        self._config, self._context = config, context
        self._last: tuple[int, int] | None = None

    def choose(self, step: int) -> SelectedCheckpoint | None:
        """Collective. The newest checkpoint; None, and a warning, where there is none.

        A spike soon after the last one shows that the checkpoint had the bad weights already: the one before it is taken.
        """
        spike, below = self._config.train.spike, None
        if self._last is not None and spike is not None and step - self._last[0] <= spike.window:
            below = self._last[1]
        with self._context.heartbeat.within(Phase.LOADING):  # every byte of it is read
            folder = RunFolder(self._config.run_dir).checkpoints
            chosen, _ = select.newest(folder, self._context, below=below)
        if chosen is None:
            older = "" if below is None else f" before that of step {below}"
            log.warning("step %d: there is no checkpoint%s to go back to; training goes on", step, older)
            return None
        self._last = (step, chosen.step)
        return chosen
