"""What surrounds every command: threads, the process group, one config on all ranks."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import datasets
import torch
import transformers

from dtrain.cluster.preflight import ROOT, WORST_OFFSET_S
from dtrain.cluster.probe import code_of
from dtrain.config.schema import Config
from dtrain.distributed.collectives import all_gather_object, is_lost_peer, job_board, on_main
from dtrain.distributed.heartbeat import Phase
from dtrain.distributed.topology import Topology, process_group, set_threads
from dtrain.errors import ConfigError, TopologyError
from dtrain.job.cpu_sharing import share_cores
from dtrain.job.failure import Job, Peer, of_lost_peer, own_peer
from dtrain.job.watchdog.client import Watch
from dtrain.training.summary import versions


@contextmanager
def session(
    config: Config, topology: Topology, env: MutableMapping[str, str], watch: Watch, *, command: str
) -> Iterator[Job]:
    """Collective. Yields the job with its complete topology; its group has formed where there is more than one rank.

    Args:
        env: os.environ; what libraries read of the topology is set in it.
        watch: this rank's monitor, which is told where the others' are.

    Raises:
        TopologyError: the ranks have not met; or one was gone before they were told of each other, or as they parted.
    """
    set_threads(topology, env)
    _quieten_libraries(env)
    watched, run = replace(topology, beat=watch.beat), {"command": command, "run folder": str(config.run_dir)}
    watch.beat.on_disowned = lambda words: _say_disowned(words, watch)
    job: Job | None = None
    try:
        with process_group(watched, env, timeout_s=config.run.startup_timeout_s, run=run) as ready:
            share_cores(ready, env, bind=config.run.bind_cores)  # the roll-call has learned who shares this node
            peers = [Peer(*peer) for peer in all_gather_object(own_peer(), ready)]
            job = Job(ready, job_board(ready), peers, watch)
            _compare_software(ready, peers)
            _compare_clocks(ready, peers)
            _compare_configs(config, ready, peers)
            if ready.world_size == 1:
                watch.alone()
            else:
                watch.join(on_main(lambda: watch.serve(ready), ready))
            yield job
            ready.beat.at(Phase.FINISHING)
    except RuntimeError as error:  # not of the command, whose errors come here reported
        if topology.world_size == 1 or not is_lost_peer(error):
            raise
        raise of_lost_peer(error, watched, job) from error


def _say_disowned(words: str, watch: Watch) -> None:
    """This rank's folder is another job's. Its monitor has read so when it is gone, and does not take it for a death."""
    watch.failing(words, TopologyError.exit_code, by_signal=False)
    watch.close()


def _compare_software(topology: Topology, peers: list[Peer]) -> None:
    """Collective. Another torch, or other code, on one node gives other numbers or a crash that explains nothing."""
    if topology.world_size == 1:
        return
    mine = {**versions(), "dtrain's code": str(code_of(ROOT))[:12]}
    found = all_gather_object(mine, topology)

    def refuse_differences() -> None:
        if differences := _differences("has other software", found, peers):
            raise TopologyError(f"{differences}\nInstall the same on all, with constraints.txt.")

    on_main(refuse_differences, topology)


def _compare_clocks(topology: Topology, peers: list[Peer]) -> None:
    """Collective, right after another, so that all ranks are here at one time."""
    if topology.world_size == 1:
        return
    found = all_gather_object(time.time(), topology)

    def refuse_differences() -> None:
        rank = max(range(len(found)), key=lambda rank: abs(found[rank] - found[0]))
        ahead = found[rank] - found[0]
        if abs(ahead) > WORST_OFFSET_S:
            raise TopologyError(
                f"The clock of rank {rank} ({peers[rank].host}) is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} "
                f"that of rank 0 ({peers[0].host}), so that the ages of shared files mislead. Set both by the network "
                "(chrony, ntpd)."
            )

    on_main(refuse_differences, topology)


def _compare_configs(config: Config, topology: Topology, peers: list[Peer]) -> None:
    """Collective. Two nodes started with different settings would train two halves of two runs."""
    found = [_leaves(settings) for settings in all_gather_object(config.model_dump(mode="json"), topology)]

    def refuse_differences() -> None:
        if differences := _differences("was started with other settings", found, peers):
            raise ConfigError(f"{differences}\nStart all of them with the same command.")

    on_main(refuse_differences, topology)


def _differences(what: str, found: list[dict[str, Any]], peers: list[Peer]) -> str | None:
    """The first rank that differs from rank 0, in a line of its own, then a line for each name with more than one value.

    None where all ranks have the same.
    """
    texts = [{name: str(value) for name, value in values.items()} for values in found]
    odd = next((rank for rank, values in enumerate(texts) if values != texts[0]), None)
    if odd is None:
        return None
    names = dict.fromkeys(name for values in texts for name in values)  # rank 0 may lack what others have
    differing = [name for name in names if len({values.get(name) for values in texts}) > 1]
    table = "\n".join(f"  {name}: {_by_rank(name, texts, peers)}" for name in differing)
    return f"Rank {odd} ({peers[odd].host}) {what} than rank 0 ({peers[0].host}):\n{table}"


def _by_rank(name: str, found: list[dict[str, str]], peers: list[Peer]) -> str:
    """`0 on rank 0 (node1), 1 on rank 1 (node2) and 2 more`: each value with the first rank that has it."""
    ranks: dict[str, list[int]] = {}
    for rank, values in enumerate(found):
        ranks.setdefault(values.get(name, "not set"), []).append(rank)
    return ", ".join(
        f"{value} on rank {first} ({peers[first].host}){f' and {len(more)} more' if more else ''}"
        for value, (first, *more) in ranks.items()
    )


def _leaves(value: Any, key: str = "") -> dict[str, Any]:
    """Nested settings as `section.key` -> value."""
    if not isinstance(value, Mapping) or not value:
        return {key: value}
    return {
        name: leaf
        for part, inner in value.items()
        for name, leaf in _leaves(inner, f"{key}.{part}" if key else str(part)).items()
    }


def _quieten_libraries(env: MutableMapping[str, str]) -> None:
    """Their progress bars and advice would drown ours, on every rank."""
    if not torch.cuda.is_available():
        env.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found nothing better
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
