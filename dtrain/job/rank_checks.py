"""Checks that all ranks have the same software, time and settings, and a GPU each, before a command runs.

For software and settings they exchange hashes. Only if those differ does rank 0 read what each rank has.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from dtrain.cluster.preflight import MAX_CLOCK_OFFSET_S, ROOT
from dtrain.cluster.probe import hash_source
from dtrain.config.schema import Config
from dtrain.distributed.collectives import gather_object, is_equal_on_all_ranks, on_main
from dtrain.distributed.cuda_devices import GpuIdentity, device_of, identify
from dtrain.distributed.device_faults import explain
from dtrain.distributed.process_info import ProcessIdentity
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import ConfigError, DtrainError, TopologyError
from dtrain.training.summary import versions


def compare_software(context: RankContext, processes: list[ProcessIdentity]) -> None:
    """Collective. Raises if software differs: another torch, or other code, gives other numbers or an obscure crash.

    Args:
        processes: the ranks' processes, by rank.
    """
    if context.world_size == 1:
        return
    local_versions = {**versions(), "dtrain's code": str(hash_source(ROOT))[:12]}
    if is_equal_on_all_ranks(local_versions, context):
        return
    all_versions = gather_object(local_versions, context) or []

    def check() -> None:
        if differences := _differences("has other software", all_versions, processes):
            raise TopologyError(f"{differences}\nInstall the same software on all, with constraints.txt.")

    on_main(check, context)


def compare_clocks(context: RankContext, processes: list[ProcessIdentity]) -> None:
    """Collective. Raises if clocks differ. Call it right after another collective, when all ranks are together."""
    if context.world_size == 1:
        return
    times = gather_object(time.time(), context) or []

    def check() -> None:
        rank = max(range(len(times)), key=lambda rank: abs(times[rank] - times[0]))
        ahead = times[rank] - times[0]
        if abs(ahead) > MAX_CLOCK_OFFSET_S:
            direction = "ahead of" if ahead > 0 else "behind"
            raise TopologyError(
                f"The clock of rank {rank} ({processes[rank].host}) is {abs(ahead):.0f} s {direction} that of rank 0 "
                f"({processes[0].host}), so the ages of shared files are wrong. Synchronize both clocks (chrony, ntpd)."
            )

    on_main(check, context)


def compare_devices(context: RankContext, processes: list[ProcessIdentity]) -> None:
    """Collective. Raises if a rank cannot use its GPU, two have one, or some have a GPU and others compute on the CPU.

    Compares the UUIDs of the GPUs: their numbers depend on CUDA_VISIBLE_DEVICES, and on the container.
    """
    if context.world_size == 1:
        return
    own, fault = GpuIdentity("", "the CPU", context.topology.cuda_mask or ""), ""
    try:
        own = identify(device_of(context.topology), context.topology.cuda_mask)
    except (DtrainError, RuntimeError) as error:  # the others wait below, and no monitor would tell them why it ended
        explained = error if isinstance(error, DtrainError) else explain(error)
        if explained is None:
            raise
        fault = str(explained)
    gathered = gather_object([list(own), fault], context) or []

    def check() -> None:
        hosts = [each.host for each in processes]
        for rank, (_, found) in enumerate(gathered):
            if found:
                raise TopologyError(f"Rank {rank} ({hosts[rank]}): {found}")
        if problem := device_problem([GpuIdentity(*each) for each, _ in gathered], hosts):
            raise TopologyError(problem)

    on_main(check, context)


def device_problem(gpus: Sequence[GpuIdentity], hosts: Sequence[str]) -> str | None:
    """Returns why the ranks cannot work with these GPUs; None if they can. Pure.

    Args:
        gpus: by rank.
        hosts: by rank.
    """
    on_cpu = [rank for rank, gpu in enumerate(gpus) if not gpu.key]
    if on_cpu and len(on_cpu) < len(gpus):
        with_gpu = next(rank for rank, gpu in enumerate(gpus) if gpu.key)
        lost = on_cpu[0]
        return (
            f"Rank {lost} ({hosts[lost]}) finds no GPU (CUDA_VISIBLE_DEVICES: {gpus[lost].mask or 'empty'}), but rank {with_gpu} "
            f"({hosts[with_gpu]}) uses {gpus[with_gpu].name}. {len(on_cpu)} of {len(gpus)} ranks have none. Repair the driver there "
            "(nvidia-smi), leave that host out, or set CUDA_VISIBLE_DEVICES= (empty) on all hosts to use the CPUs."
        )
    first: dict[str, int] = {}
    for rank, gpu in enumerate(gpus):
        if gpu.key in first:
            return _shared_gpu(gpus, hosts, first[gpu.key], rank)
        if gpu.key:
            first[gpu.key] = rank
    return None


def _shared_gpu(gpus: Sequence[GpuIdentity], hosts: Sequence[str], one: int, other: int) -> str:
    places = f"{hosts[one]}" if hosts[one] == hosts[other] else f"{hosts[one]} and {hosts[other]}"
    masks = gpus[one].mask, gpus[other].mask
    text = f"Ranks {one} and {other} ({places}) both use {gpus[one].name}, but NCCL needs a GPU for each rank. "
    shown = masks[0] if masks[0] == masks[1] else f"{masks[0]} on rank {one}, {masks[1]} on rank {other}"
    text += f"CUDA_VISIBLE_DEVICES: {shown or 'empty'}. "
    cure = (
        "A process sees only the first MIG slice of its mask: start one rank on this GPU, or give each rank one of the names of "
        "`nvidia-smi -L`."
        if "MIG" in gpus[one].name
        else "Start at most one rank per GPU (--nproc-per-node, slots in the hostfile, --ntasks-per-node), and let each rank see "
        "all GPUs of its host, or one that no other rank sees."
    )
    return f"{text}{cure}"


def compare_configs(config: Config, context: RankContext, processes: list[ProcessIdentity]) -> None:
    """Collective. Raises if settings differ: the nodes would train parts of different runs."""
    own = config.model_dump(mode="json")
    if is_equal_on_all_ranks(own, context):
        return
    all_settings = [_flatten(settings) for settings in gather_object(own, context) or ()]

    def check() -> None:
        if differences := _differences("was started with other settings", all_settings, processes):
            raise ConfigError(f"{differences}\nStart all of them with the same command.")

    on_main(check, context)


def _differences(problem: str, by_rank: list[dict[str, Any]], processes: list[ProcessIdentity]) -> str | None:
    """Returns a line with the first rank that differs from rank 0, and a line for each name with more than one value.

    None if all ranks have the same.
    """
    texts = [{name: str(value) for name, value in values.items()} for values in by_rank]
    odd = next((rank for rank, values in enumerate(texts) if values != texts[0]), None)
    if odd is None:
        return None
    names = dict.fromkeys(name for values in texts for name in values)  # rank 0 may not have all names
    differing = [name for name in names if len({values.get(name) for values in texts}) > 1]
    table = "\n".join(f"  {name}: {_values_by_rank(name, texts, processes)}" for name in differing)
    return f"Rank {odd} ({processes[odd].host}) {problem} than rank 0 ({processes[0].host}):\n{table}"


def _values_by_rank(name: str, by_rank: list[dict[str, str]], processes: list[ProcessIdentity]) -> str:
    """Lists each value with the first rank that has it: `0 on rank 0 (node1), 1 on rank 1 (node2) and 2 more`."""
    ranks: dict[str, list[int]] = {}
    for rank, values in enumerate(by_rank):
        ranks.setdefault(values.get(name, "not set"), []).append(rank)
    return ", ".join(
        f"{value} on rank {first} ({processes[first].host}){f' and {len(more)} more' if more else ''}"
        for value, (first, *more) in ranks.items()
    )


def _flatten(value: Any, key: str = "") -> dict[str, Any]:
    """Flattens nested settings to `section.key` -> value."""
    if not isinstance(value, Mapping) or not value:
        return {key: value}
    return {
        name: leaf
        for part, inner in value.items()
        for name, leaf in _flatten(inner, f"{key}.{part}" if key else str(part)).items()
    }
