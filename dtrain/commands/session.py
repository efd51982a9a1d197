"""What surrounds every command: threads, the process group, the watch over the launcher, one config on all ranks."""

from __future__ import annotations

import hashlib
import logging
import socket
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager

import datasets
import torch
import transformers

from dtrain.collectives import all_gather_object
from dtrain.config import to_yaml
from dtrain.errors import ConfigError
from dtrain.interrupts import interruptible
from dtrain.run_folder import write_exit
from dtrain.schema import Config
from dtrain.topology import Topology, process_group, set_threads
from dtrain.watch import end_with_launcher

GRACE_S = 8.0
"""How long a rank may take to stop when it is told to; all ranks are gone 10 s after Ctrl-C."""


@contextmanager
def session(config: Config, topology: Topology, env: MutableMapping[str, str]) -> Iterator[Topology]:
    """Collective. Yields the complete topology, with the process group formed where there is more than one rank.

    Args:
        env: os.environ; what libraries read of the topology is set in it.
    """

    def note(cause: str) -> None:
        note_end(config, topology, code=1, cause="stopped", message=cause)

    set_threads(topology, env)
    _quieten_libraries(env)
    with interruptible(grace_s=GRACE_S, before_exit=note):
        # Before the roll-call: a rank whose launcher has gone must not wait for it either.
        end_with_launcher(topology, note)
        with process_group(topology, env, timeout_s=config.run.startup_timeout_s) as ready:
            _compare_configs(config, ready)
            yield ready


def note_end(config: Config, topology: Topology, *, code: int, cause: str, message: str) -> None:
    """Writes exit.json where the run's folder is there; the first writer wins."""
    if config.run_dir.is_dir():
        write_exit(
            config.run_dir / "exit.json",
            code=code,
            cause=cause,
            rank=topology.rank,
            host=socket.gethostname(),
            message=message,
        )


def _compare_configs(config: Config, topology: Topology) -> None:
    """Collective. Two nodes started with different settings would train two halves of two runs."""
    own = {"host": socket.gethostname(), "hash": hashlib.sha256(to_yaml(config).encode()).hexdigest()[:12]}
    found = all_gather_object(own, topology)
    if len({entry["hash"] for entry in found}) > 1:
        table = "\n".join(f"  rank {rank}  {entry['host']}  config {entry['hash']}" for rank, entry in enumerate(found))
        raise ConfigError(
            f"The ranks were started with different settings:\n{table}\nStart all of them with the same command."
        )


def _quieten_libraries(env: MutableMapping[str, str]) -> None:
    """Their progress bars and advice would drown ours, on every rank."""
    if not torch.cuda.is_available():
        env.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found nothing better
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
