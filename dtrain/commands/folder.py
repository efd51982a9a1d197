"""The run folder at a command's start: decided and claimed by rank 0, known to all."""

from __future__ import annotations

from dtrain.collectives import on_main
from dtrain.config import differences, to_yaml
from dtrain.console import log
from dtrain.errors import ConfigError
from dtrain.run_folder import Action, RunFolder, claim, decide
from dtrain.schema import Config
from dtrain.topology import Topology


def take(config: Config, topology: Topology, *, command: str) -> Action:
    """Collective. What becomes of this start; the folder is this run's own afterwards, unless it is already_finished.

    Raises:
        ConfigError: on all ranks, where the folder may not be touched or cannot be written.
    """

    def work() -> dict[str, object]:
        folder = RunFolder(config.run_dir)
        decision = decide(config, command=command, changes=differences(folder.old_config(), config))
        notes = list(decision.notes)
        if decision.action != "already_finished":
            moved = claim(folder, to_yaml(config), set_aside=decision.set_aside)
            notes += [f"the old run was moved to {moved}"] if moved is not None else []
        return {"action": decision.action, "notes": notes}

    try:
        told = on_main(work, topology)
    except ConfigError as error:
        error.is_noted = False
        raise
    for note in told["notes"]:
        log.info("%s", note)
    topology.beat.own_folder()
    action: Action = told["action"]
    return action
