"""What each launcher says in the environment about this process's place in the job.

Pure functions of an environment mapping: torchrun, DeepSpeed, Open MPI, MPICH, Intel MPI, Slurm, or variables set by
hand. Nothing is opened or started here; topology.py forms the job from what this finds.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import NamedTuple, NoReturn

from dtrain.errors import TopologyError

JOB_ID = "DTRAIN_JOB_ID"
"""Set by launch/*.sh to something that no other job has, so that no process of another is let in."""

EXIT_FILE = "DTRAIN_EXIT_FILE"
"""Set by launch/*.sh to a path of each host, where a rank writes why it ends, as into exit.json: a run that has no
folder yet, or never gets one, has no exit.json."""

TORCHRUN = "torchrun"
"""Begins the name of a job that torchrun started, in `launches_of`."""

RELEVANT = re.compile(
    r"RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|LOCAL_SIZE|CROSS_RANK|CROSS_SIZE|GROUP_RANK|GROUP_WORLD_SIZE|MASTER_ADDR"
    r"|MASTER_PORT|TORCHELASTIC_RUN_ID|OMPI_COMM_WORLD_\w+|PMI_RANK|PMI_SIZE|PMI_LOCAL_RANK|PMI_LOCAL_SIZE|MPI_LOCALRANKID"
    r"|MPI_LOCALNRANKS|SLURM_(PROCID|LOCALID|NODEID|NTASKS|JOB_ID|STEP_NUM_TASKS|STEP_NUM_NODES|STEP_NODELIST)"
)
"""The variables that an error shows."""


class Place(NamedTuple):
    """Where one process stands. The fields are those of topology.Topology, which says what they mean."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    num_nodes: int
    launcher: str
    master_addr: str | None
    master_port: int | None
    is_complete: bool = True


class Claim(NamedTuple):
    """What one launcher's variables say: the rank and the size of the world."""

    launcher: str
    rank: int
    world_size: int


ONE_PROCESS = Place(0, 1, 0, 1, 0, 1, "none", None, None)


def read_place(env: Mapping[str, str]) -> Place:
    """The place of this process, checked.

    A launcher may run inside another (`srun torchrun`, `mpirun` in a Slurm job): the inner one started this process,
    so it counts. Variables that no nesting explains are an error.

    Args:
        env: the process's environment.

    Raises:
        TopologyError: variables are missing, out of range, or contradict each other; the message has a table of them.
    """
    slurm, mpi, torch = _slurm(env), _mpi(env), _torch(env)
    if torch is not None:
        _refuse_disagreement(env, torch, mpi, slurm)
        place = _torch_place(env, torch)
    elif mpi is not None and (slurm is None or mpi.launcher == "openmpi" or mpi[1:] != slurm[1:]):
        # Slurm's own PMI sets PMI_RANK too and then agrees with the step: that is srun, handled below.
        place = _mpi_place(env, mpi)
    elif slurm is not None and slurm.world_size > 1:
        place = _slurm_place(env, slurm)
    else:
        place = ONE_PROCESS
    _check(env, place)
    return place


def job_of(env: Mapping[str, str], launcher: str) -> tuple[dict[str, str], int, bool]:
    """What the launcher calls this job, equal on all its ranks and unlike other jobs' where the user has seen to that.

    Args:
        launcher: the one that started this process; others' variables may be left over from around it.

    Returns:
        The names it has, by what they are called (none under deepspeed, which gives none); how often the job was started
        again; and whether that number is the same on all nodes.
    """
    given = {"job": _short(env[JOB_ID])} if env.get(JOB_ID) else {}
    match launcher:
        case "torchrun":
            # Each node's agent counts the failures of its own workers only.
            is_one_node = env.get("GROUP_WORLD_SIZE", "1") == "1"
            names = {"rdzv id": env["TORCHELASTIC_RUN_ID"]}
            return {**given, **names}, _number(env, "TORCHELASTIC_RESTART_COUNT") or 0, is_one_node
        case "openmpi" | "mpich" | "intelmpi" if env.get("PMIX_NAMESPACE"):
            return {**given, "MPI job": env["PMIX_NAMESPACE"]}, 0, True
        case "slurm" if env.get("SLURM_JOB_ID"):
            step = env.get("SLURM_STEP_ID", env.get("SLURM_STEPID", "0"))
            names = {"Slurm step": f"{env['SLURM_JOB_ID']}.{step}"}
            return {**given, **names}, _number(env, "SLURM_RESTART_COUNT") or 0, True
    return given, 0, True


def _short(secret: str) -> str:
    """Tells two secrets apart, and tells neither: a process that is turned away is shown it."""
    return hashlib.sha256(secret.encode()).hexdigest()[:12]


def launches_of(env: Mapping[str, str], launcher: str) -> dict[str, int]:
    """What may have started this job before, by names that stay the same then, and how often it did."""
    found = {}
    if launcher == "torchrun":
        found[f"{TORCHRUN} {env['TORCHELASTIC_RUN_ID']}"] = _number(env, "TORCHELASTIC_RESTART_COUNT") or 0
    if "SLURM_JOB_ID" in env:
        found[f"Slurm job {env['SLURM_JOB_ID']}"] = _number(env, "SLURM_RESTART_COUNT") or 0
    return found


def refuse(env: Mapping[str, str], problem: str) -> NoReturn:
    """Raises the TopologyError: the problem, then a table of the variables that were found."""
    found = sorted(name for name in env if RELEVANT.fullmatch(name))
    width = max((len(name) for name in found), default=0)
    table = "\n".join(f"  {name:{width}}  {env[name]}" for name in found) or "  (none of the launchers' variables)"
    raise TopologyError(f"{problem}\nFound in the environment:\n{table}")


def _refuse_disagreement(env: Mapping[str, str], torch: Claim, mpi: Claim | None, slurm: Claim | None) -> None:
    for other in (mpi, slurm):
        # torchrun inside anything, and deepspeed inside srun, are nested launchers; a step of one task is no job.
        nested = torch.launcher == "torchrun" or (torch.launcher == "deepspeed" and other is slurm)
        if other is None or nested or (other is slurm and other.world_size == 1) or other[1:] == torch[1:]:
            continue
        refuse(
            env,
            f"Two launchers disagree: by RANK and WORLD_SIZE this is rank {torch.rank} of {torch.world_size}, by the "
            f"variables of {other.launcher} it is rank {other.rank} of {other.world_size}. "
            f"Unset RANK, WORLD_SIZE and LOCAL_RANK to go by {other.launcher}, or start with one launcher only.",
        )


def _torch(env: Mapping[str, str]) -> Claim | None:
    """RANK and WORLD_SIZE: torchrun, deepspeed, or by hand."""
    if "TORCHELASTIC_RUN_ID" in env:
        launcher = "torchrun"
    elif "CROSS_SIZE" in env and "LOCAL_SIZE" in env:
        launcher = "deepspeed"
    else:
        launcher = "env"
    rank, size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    if size is None and (rank is not None or launcher == "torchrun" or _number(env, "LOCAL_RANK")):
        refuse(env, "A rank is set, but WORLD_SIZE is not: of how many processes? Set RANK and WORLD_SIZE, or neither.")
    if size is None:
        return None
    if rank is None and size > 1:
        refuse(env, f"WORLD_SIZE={size}, but RANK is not set: which of the {size} is this? Set RANK, from 0 on.")
    return Claim(launcher, rank or 0, size)


def _torch_place(env: Mapping[str, str], claim: Claim) -> Place:
    if claim.world_size == 1:
        return ONE_PROCESS._replace(rank=claim.rank, launcher=claim.launcher)
    names = ("LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE")
    if claim.launcher == "deepspeed":
        names = ("LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE")
    local_size, node_rank, num_nodes = (_number(env, name) for name in names)
    return _assemble(
        env,
        claim,
        local_rank=_number(env, "LOCAL_RANK"),
        local_size=local_size,
        node_rank=node_rank,
        num_nodes=num_nodes,
    )


def _mpi(env: Mapping[str, str]) -> Claim | None:
    found = []
    for launcher, prefix in (("openmpi", "OMPI_COMM_WORLD_"), ("mpich", "PMI_")):
        rank, size = _number(env, f"{prefix}RANK"), _number(env, f"{prefix}SIZE")
        if (rank is None) != (size is None):
            refuse(env, f"Only one of {prefix}RANK and {prefix}SIZE is set: was the environment copied in part?")
        if rank is not None and size is not None:
            intel = launcher == "mpich" and any(name.startswith("I_MPI_") for name in env)
            found.append(Claim("intelmpi" if intel else launcher, rank, size))
    if len(found) == 2 and found[0][1:] != found[1][1:]:
        one, two = found
        refuse(
            env,
            f"Two launchers disagree: {one.launcher} says rank {one.rank} of {one.world_size}, {two.launcher} says "
            f"rank {two.rank} of {two.world_size}. Start with one of them only.",
        )
    return found[0] if found else None


def _mpi_place(env: Mapping[str, str], claim: Claim) -> Place:
    # OMPI_COMM_WORLD_NODE_RANK is no number of a node: it is this process's place among those of its node.
    if claim.launcher == "openmpi":
        local_rank = _number(env, "OMPI_COMM_WORLD_LOCAL_RANK")
        local_size = _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE")
    else:
        local_rank = _first(env, "MPI_LOCALRANKID", "PMI_LOCAL_RANK")
        local_size = _first(env, "MPI_LOCALNRANKS", "PMI_LOCAL_SIZE")
    return _assemble(env, claim, local_rank=local_rank, local_size=local_size, node_rank=None, num_nodes=None)


def _slurm(env: Mapping[str, str]) -> Claim | None:
    """A step of srun. The batch script itself has SLURM_NTASKS and SLURM_PROCID=0, but no SLURM_STEP_NUM_TASKS."""
    size, rank = _number(env, "SLURM_STEP_NUM_TASKS"), _number(env, "SLURM_PROCID")
    return None if size is None or rank is None else Claim("slurm", rank, size)


def _slurm_place(env: Mapping[str, str], claim: Claim) -> Place:
    node_rank = _number(env, "SLURM_NODEID")
    num_nodes = _first(env, "SLURM_STEP_NUM_NODES", "SLURM_NNODES")
    tasks = tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    local_size = tasks[node_rank] if node_rank is not None and node_rank < len(tasks) else None
    place = _assemble(
        env,
        claim,
        local_rank=_number(env, "SLURM_LOCALID"),
        local_size=local_size,
        node_rank=node_rank,
        num_nodes=num_nodes,
    )
    if place.master_addr is not None:
        return place
    host = first_host(env.get("SLURM_STEP_NODELIST", ""))
    if not host:
        refuse(env, "SLURM_STEP_NODELIST is not set, so where is rank 0? Set MASTER_ADDR and MASTER_PORT.")
    # From the job and step, so that all tasks agree without talking; below the ports that Linux hands out by itself.
    job, step = _number(env, "SLURM_JOB_ID") or 0, _first(env, "SLURM_STEP_ID", "SLURM_STEPID") or 0
    return place._replace(master_addr=host, master_port=20000 + (job * 31 + step) % 10000)


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list: `gpu[007-009,012],login1` -> `gpu007`; empty for an empty list."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group() if first else "")


def tasks_per_node(text: str) -> list[int]:
    """Slurm's short form of tasks on each node: `4(x2),3` -> [4, 4, 3]."""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in found for _ in range(int(times or 1))]


def _assemble(
    env: Mapping[str, str],
    claim: Claim,
    *,
    local_rank: int | None,
    local_size: int | None,
    node_rank: int | None,
    num_nodes: int | None,
) -> Place:
    """Fills in what follows from the rest. What does not is an estimate, marked by is_complete=False."""
    launcher, rank, size = claim
    if local_size is None and num_nodes == 1:
        local_size = size
    if num_nodes is None and local_size == size:
        num_nodes, node_rank = 1, 0
    is_complete = None not in (local_rank, local_size, node_rank, num_nodes)
    local_size = size if local_size is None else local_size
    address, port = _master(env, claim)
    return Place(
        rank,
        size,
        rank % max(local_size, 1) if local_rank is None else local_rank,
        local_size,
        rank // max(local_size, 1) if node_rank is None else node_rank,
        -(-size // max(local_size, 1)) if num_nodes is None else num_nodes,
        launcher,
        address,
        port,
        is_complete,
    )


def _master(env: Mapping[str, str], claim: Claim) -> tuple[str | None, int | None]:
    address, port = env.get("MASTER_ADDR") or None, _number(env, "MASTER_PORT")
    can_ask = claim.launcher in ("openmpi", "mpich", "intelmpi", "slurm")
    if claim.world_size == 1 or (can_ask and address is None):
        return None, None
    if address is None or port is None:
        missing = "MASTER_ADDR" if address is None else "MASTER_PORT"
        refuse(
            env,
            f"WORLD_SIZE={claim.world_size}, but {missing} is not set: where do the ranks meet? Set MASTER_ADDR to the "
            "host of rank 0 and MASTER_PORT to a free port there, the same on every rank.",
        )
    if not 0 < port < 65536:
        refuse(env, f"MASTER_PORT={port} is not a port: it must lie between 1 and 65535.")
    return address, port


def _check(env: Mapping[str, str], place: Place) -> None:
    """Refuses numbers that cannot be true together."""
    if place.world_size < 1:
        refuse(env, f"A world of {place.world_size} processes: WORLD_SIZE must be at least 1.")
    if not 0 <= place.rank < place.world_size:
        refuse(env, f"Rank {place.rank} of {place.world_size} processes: ranks go from 0 to {place.world_size - 1}.")
    if not 1 <= place.local_world_size <= place.world_size:
        refuse(env, f"{place.local_world_size} processes on this node, {place.world_size} in all: that cannot be.")
    if place.is_complete and not 0 <= place.local_rank < place.local_world_size:
        refuse(env, f"Local rank {place.local_rank}, but {place.local_world_size} processes on this node: too high.")
    if not 0 <= place.node_rank < place.num_nodes <= place.world_size:
        refuse(env, f"Node {place.node_rank} of {place.num_nodes}, {place.world_size} processes: that cannot be.")
    if place.is_complete and (place.num_nodes == 1) != (place.local_world_size == place.world_size):
        refuse(
            env,
            f"{place.num_nodes} node(s), {place.local_world_size} processes on this one, {place.world_size} in all: "
            "that cannot be. Are variables of another launch left in the environment?",
        )


def _number(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name, "").strip()
    if not text:
        return None
    if not re.fullmatch(r"-?\d+", text):
        refuse(env, f"{name}={text!r} is not a whole number.")
    return int(text)


def _first(env: Mapping[str, str], *names: str) -> int | None:
    return next((number for name in names if (number := _number(env, name)) is not None), None)
