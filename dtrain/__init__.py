"""dtrain: the same answer on one process, many ranks, any engine and any launcher.

    import dtrain

    config = dtrain.load_config("configs/cola.yaml", ["train.max_steps=100"])
    result = dtrain.fit(config)

Importing this costs no torch; `fit` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dtrain.environment import end_own_program

try:
    from dtrain.config.load import load_config
    from dtrain.config.schema import Config
except ModuleNotFoundError as error:
    end_own_program(error)
    raise

if TYPE_CHECKING:
    from torch import nn

    from dtrain.tasks.protocol import Task
    from dtrain.training.monitors.protocol import Monitor
    from dtrain.training.summary import Result

__all__ = ["Config", "__version__", "fit", "load_config"]

__version__ = "0.1.0"


def fit(
    config: Config, *, model: nn.Module | None = None, task: Task | None = None, monitors: Sequence[Monitor] = ()
) -> Result:
    """Collective. Trains as `dtrain/main.py train` does: on one process, or on each rank that a launcher started.

    Args:
        config: from `load_config`, or built as `Config(...)`; an unset `run.name` is the task's name.
        model: model to train instead of the one that the config's model section names. It is trained in place: afterwards
            it has the trained weights, except with an engine that shards the model (engine.name=fsdp, engine.zero_stage=3).
            Then it keeps this rank's part only, and is of no use by itself: load the run's folder model/.
        task: your own (see dtrain/tasks/protocol.py) instead of the one that the task and data sections name.
        monitors: further monitors (see dtrain/training/monitors/protocol.py).

    Returns:
        Final metrics and the run folder, also if the run was already finished.

    Raises:
        DtrainError: with the message that the command line would print; `exit_code` shows the kind.
    """
    from dtrain.main import fit as run

    return run(config, model=model, task=task, monitors=monitors)
