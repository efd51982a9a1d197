"""The run folder at a command's start: locked, decided and claimed by rank 0, known to all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from dtrain.collectives import on_main
from dtrain.config import differences, to_yaml
from dtrain.console import log
from dtrain.errors import ConfigError
from dtrain.run_folder import Action, RunFolder, claim, decide, state, unwritable
from dtrain.run_lock import locked
from dtrain.schema import Config
from dtrain.topology import Topology


@contextmanager
def taken(config: Config, topology: Topology, *, command: str) -> Iterator[Action]:
    """Collective. What becomes of this start; inside, the folder is this run's own, unless it is already_finished.

    Rank 0 holds its lock until the end, so that there is one writer.

    Raises:
        ConfigError: on all ranks, where the folder is in use, may not be touched or cannot be written.
    """
    with ExitStack() as lock:

        def work() -> dict[str, object]:
            folder, refusal = RunFolder(config.run_dir), None
            if state(folder.path) != "foreign":  # what is not ours is refused below, and not even touched
                try:
                    lock.enter_context(locked(folder.path, command=command))
                except OSError as error:
                    refusal = unwritable(folder, error)
            decision = decide(config, command=command, changes=differences(folder.old_config(), config))
            notes = list(decision.notes)
            if decision.action != "already_finished":
                if refusal is not None:
                    raise refusal
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
        action: Action = told["action"]
        yield action
