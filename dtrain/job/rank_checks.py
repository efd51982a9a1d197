"""What all ranks must have alike before a command runs: software, clocks and settings."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from dtrain.cluster.preflight import MAX_CLOCK_OFFSET_S, ROOT
from dtrain.cluster.probe import hash_source
from dtrain.config.schema import Config
from dtrain.distributed.collectives import all_gather_object, on_main
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import ConfigError, TopologyError
from dtrain.job.failure import Peer
from dtrain.training.summary import versions


def compare_software(context: RankContext, peers: list[Peer]) -> None:
    """Collective. Another torch, or other code, on one node gives other numbers or a crash that explains nothing."""
    if context.world_size == 1:
        return
    mine = {**versions(), "dtrain's code": str(hash_source(ROOT))[:12]}
    found = all_gather_object(mine, context)

    def refuse_differences() -> None:
        if differences := _differences("has other software", found, peers):
            raise TopologyError(f"{differences}\nInstall the same on all, with constraints.txt.")

    on_main(refuse_differences, context)


def compare_clocks(context: RankContext, peers: list[Peer]) -> None:
    """Collective, right after another, so that all ranks are here at one time."""
    if context.world_size == 1:
        return
    found = all_gather_object(time.time(), context)

    def refuse_differences() -> None:
        rank = max(range(len(found)), key=lambda rank: abs(found[rank] - found[0]))
        ahead = found[rank] - found[0]
        if abs(ahead) > MAX_CLOCK_OFFSET_S:
            raise TopologyError(
                f"The clock of rank {rank} ({peers[rank].host}) is {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} "
                f"that of rank 0 ({peers[0].host}), so that the ages of shared files mislead. Set both by the network "
                "(chrony, ntpd)."
            )

    on_main(refuse_differences, context)


def compare_configs(config: Config, context: RankContext, peers: list[Peer]) -> None:
    """Collective. Two nodes started with different settings would train two halves of two runs."""
    found = [_leaves(settings) for settings in all_gather_object(config.model_dump(mode="json"), context)]

    def refuse_differences() -> None:
        if differences := _differences("was started with other settings", found, peers):
            raise ConfigError(f"{differences}\nStart all of them with the same command.")

    on_main(refuse_differences, context)


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
