"""A session under watch: the monitor first, then the heavy imports, then the ranks' meeting."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dtrain.config.schema import Config
from dtrain.distributed.topology import Topology
from dtrain.job.watchdog.client import watching
from dtrain.job.watchdog.rules import Rules

if TYPE_CHECKING:
    from dtrain.job.failure import Job


@contextmanager
def session(
    config: Config, topology: Topology, env: MutableMapping[str, str], *, command: str = "train"
) -> Iterator[Job]:
    """Collective. What commands/session.py yields, watched by a process of its own. Imports torch on the way.

    Args:
        env: os.environ; what libraries read of the topology is set in it.
    """
    rules = Rules(config.train.hang_timeout or None, compiles=bool(config.model.compile))
    with watching(topology.rank, rules, config.run_dir) as watch:
        from dtrain.job import session

        with session.session(config, topology, env, watch, command=command) as job:
            yield job
