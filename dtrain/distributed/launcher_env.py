"""Reads from the environment what the launcher says about this process in the job.

Pure functions of an environment mapping, for dtrain's own launcher (`--ranks`), torchrun, DeepSpeed, Open MPI, MPICH,
Intel MPI, Slurm, and variables set by hand. topology.py turns the result into a Topology.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import NamedTuple, NoReturn

from dtrain.distributed.job_identity import JobIdentity
from dtrain.errors import TopologyError

JOB_ID = "DTRAIN_JOB_ID"
"""Set by launch/*.sh to a token that no other job has, so that the ranks reject processes of other jobs."""

EXIT_FILE = "DTRAIN_EXIT_FILE"
"""Set by launch/*.sh to a path on each host, where a rank writes why it ends, in the format of exit.json. A run that
has no folder yet, or never gets one, has no exit.json."""

LAUNCHER_PID = "DTRAIN_LAUNCHER_PID"
"""Set for the ranks that dtrain itself has started (job/forked_ranks.py): the process id of their launcher."""

MASTER_FD = "DTRAIN_MASTER_FD"
"""Set for rank 0 by dtrain's launcher: the number of its open socket that listens on the master's port."""

NODE_RANK = "DTRAIN_NODE_RANK"
"""Set by launch/dtrain.sh for dtrain's launcher: the number of this host in the hostfile, from 0."""

ORDERS_FD = "DTRAIN_ORDERS_FD"
"""Set for dtrain's launcher by the host's supervisor: the number of the socket for orders (job/node_orders.py)."""

LOST_HOSTS = "DTRAIN_LOST_HOSTS"
"""Set for ranks by dtrain's launcher: names of hosts that the job has lost, separated by commas."""

DTRAIN = "dtrain"
"""Name of dtrain's own launcher, which sets the same variables as torchrun."""

TORCHRUN = "torchrun"
"""Name of torchrun, and prefix of the name of a job that it started, in `count_launches`."""

SHOWN_VARIABLES = re.compile(
    r"RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|LOCAL_SIZE|CROSS_RANK|CROSS_SIZE|GROUP_RANK|GROUP_WORLD_SIZE|MASTER_ADDR"
    r"|MASTER_PORT|TORCHELASTIC_RUN_ID|OMPI_COMM_WORLD_\w+|PMI_RANK|PMI_SIZE|PMI_LOCAL_RANK|PMI_LOCAL_SIZE|MPI_LOCALRANKID"
    r"|MPI_LOCALNRANKS|SLURM_(PROCID|LOCALID|NODEID|NTASKS|JOB_ID|STEP_NUM_TASKS|STEP_NUM_NODES|STEP_NODELIST)"
)
"""The variables that an error message shows."""


class LauncherPlacement(NamedTuple):
    """One process in the job. The fields are those of topology.Topology, which documents them."""

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


class RankClaim(NamedTuple):
    """The rank and world size according to one launcher's variables."""

    launcher: str
    rank: int
    world_size: int


NO_LAUNCHER = LauncherPlacement(0, 1, 0, 1, 0, 1, "none", None, None)


def read_placement(env: Mapping[str, str]) -> LauncherPlacement:
    """Returns the rank, node and launcher of this process, checked.

    A launcher may run inside another (`srun torchrun`, `mpirun` in a Slurm job): the inner one started this process, so
    its variables count. Variables that no nesting explains are an error.

    Args:
        env: the process's environment.

    Raises:
        TopologyError: variables are missing, out of range, or contradict each other; the message has a table of them.
    """
    slurm, mpi, torch = _slurm(env), _mpi(env), _torch(env)
    if torch is not None:
        _check_agreement(env, torch, mpi, slurm)
        placement = _torch_placement(env, torch)
    elif mpi is not None and (slurm is None or mpi.launcher == "openmpi" or mpi[1:] != slurm[1:]):
        # Slurm's own PMI sets PMI_RANK too and then agrees with the step: that is srun, handled below.
        placement = _mpi_placement(env, mpi)
    elif slurm is not None and slurm.world_size > 1:
        placement = _slurm_placement(env, slurm)
    else:
        placement = NO_LAUNCHER
    _check(env, placement)
    return placement


def read_job_identity(env: Mapping[str, str], launcher: str, *, run: Mapping[str, str] | None = None) -> JobIdentity:
    """Returns the job's identity: equal on all its ranks, and different from other jobs' if the launcher names them.

    Args:
        launcher: the one that started this process. Variables of other launchers may be left over from around it.
        run: which run the job works on.
    """
    job = {"job": fingerprint(env[JOB_ID])} if env.get(JOB_ID) else {}
    restart, is_global = 0, True
    match launcher:
        case "torchrun" | "dtrain":
            job["rdzv id"] = env["TORCHELASTIC_RUN_ID"]
            restart = _number(env, "TORCHELASTIC_RESTART_COUNT") or 0
            # Each node's agent of torchrun counts only the failures of its own workers.
            is_global = launcher == DTRAIN or env.get("GROUP_WORLD_SIZE", "1") == "1"
        case "openmpi" | "mpich" | "intelmpi" if env.get("PMIX_NAMESPACE"):
            job["MPI job"] = env["PMIX_NAMESPACE"]
        case "slurm" if env.get("SLURM_JOB_ID"):
            step = env.get("SLURM_STEP_ID", env.get("SLURM_STEPID", "0"))
            job["Slurm step"] = f"{env['SLURM_JOB_ID']}.{step}"
            restart = _number(env, "SLURM_RESTART_COUNT") or 0
    return JobIdentity(job, restart, is_global, run or {})


def fingerprint(token: str) -> str:
    """Returns a hash that distinguishes tokens without revealing them: a rejected process sees it in its error."""
    return hashlib.sha256(token.encode()).hexdigest()[:12]


def count_launches(env: Mapping[str, str], launcher: str) -> dict[str, int]:
    """Returns how often each launcher that may restart this job has started it before, by a permanent name."""
    launches = {}
    if launcher in (TORCHRUN, DTRAIN):
        launches[f"{launcher} {env['TORCHELASTIC_RUN_ID']}"] = _number(env, "TORCHELASTIC_RESTART_COUNT") or 0
    if "SLURM_JOB_ID" in env:
        launches[f"Slurm job {env['SLURM_JOB_ID']}"] = _number(env, "SLURM_RESTART_COUNT") or 0
    return launches


def refuse(env: Mapping[str, str], problem: str) -> NoReturn:
    """Raises a TopologyError with the problem and a table of the launchers' variables in the environment."""
    names = sorted(name for name in env if SHOWN_VARIABLES.fullmatch(name))
    width = max((len(name) for name in names), default=0)
    table = "\n".join(f"  {name:{width}}  {env[name]}" for name in names) or "  (none of the launchers' variables)"
    raise TopologyError(f"{problem}\nFound in the environment:\n{table}")


def _check_agreement(env: Mapping[str, str], torch: RankClaim, mpi: RankClaim | None, slurm: RankClaim | None) -> None:
    for other in (mpi, slurm):
        # torchrun inside any launcher, and deepspeed inside srun, are nested launchers. A step of one task is no job.
        nested = torch.launcher in (TORCHRUN, DTRAIN) or (torch.launcher == "deepspeed" and other is slurm)
        if other is None or nested or (other is slurm and other.world_size == 1) or other[1:] == torch[1:]:
            continue
        refuse(
            env,
            f"Two launchers disagree: by RANK and WORLD_SIZE this is rank {torch.rank} of {torch.world_size}, by the "
            f"variables of {other.launcher} it is rank {other.rank} of {other.world_size}. "
            f"Unset RANK, WORLD_SIZE and LOCAL_RANK to use {other.launcher}'s, or start with one launcher only.",
        )


def _torch(env: Mapping[str, str]) -> RankClaim | None:
    """Reads RANK and WORLD_SIZE, set by dtrain, by torchrun, by deepspeed, or by hand."""
    if "TORCHELASTIC_RUN_ID" in env:
        launcher = DTRAIN if env.get(LAUNCHER_PID) else TORCHRUN
    elif "CROSS_SIZE" in env and "LOCAL_SIZE" in env:
        launcher = "deepspeed"
    else:
        launcher = "env"
    rank, size = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    if size is None and (rank is not None or launcher in (TORCHRUN, DTRAIN) or _number(env, "LOCAL_RANK")):
        refuse(env, "A rank is set, but WORLD_SIZE is not. Set both RANK and WORLD_SIZE, or neither.")
    if size is None:
        return None
    if rank is None and size > 1:
        refuse(env, f"WORLD_SIZE={size}, but RANK is not set. Set RANK to this process's number, from 0 to {size - 1}.")
    return RankClaim(launcher, rank or 0, size)


def _torch_placement(env: Mapping[str, str], claim: RankClaim) -> LauncherPlacement:
    if claim.world_size == 1:
        return NO_LAUNCHER._replace(rank=claim.rank, launcher=claim.launcher)
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


def _mpi(env: Mapping[str, str]) -> RankClaim | None:
    claims = []
    for launcher, prefix in (("openmpi", "OMPI_COMM_WORLD_"), ("mpich", "PMI_")):
        rank, size = _number(env, f"{prefix}RANK"), _number(env, f"{prefix}SIZE")
        if (rank is None) != (size is None):
            refuse(env, f"Only one of {prefix}RANK and {prefix}SIZE is set: was the environment copied in part?")
        if rank is not None and size is not None:
            intel = launcher == "mpich" and any(name.startswith("I_MPI_") for name in env)
            claims.append(RankClaim("intelmpi" if intel else launcher, rank, size))
    if len(claims) == 2 and claims[0][1:] != claims[1][1:]:
        one, two = claims
        refuse(
            env,
            f"Two launchers disagree: {one.launcher} says rank {one.rank} of {one.world_size}, {two.launcher} says "
            f"rank {two.rank} of {two.world_size}. Start with one of them only.",
        )
    return claims[0] if claims else None


def _mpi_placement(env: Mapping[str, str], claim: RankClaim) -> LauncherPlacement:
    # OMPI_COMM_WORLD_NODE_RANK is not the number of a node, but this process's number among those of its node.
    if claim.launcher == "openmpi":
        local_rank = _number(env, "OMPI_COMM_WORLD_LOCAL_RANK")
        local_size = _number(env, "OMPI_COMM_WORLD_LOCAL_SIZE")
    else:
        local_rank = _first(env, "MPI_LOCALRANKID", "PMI_LOCAL_RANK")
        local_size = _first(env, "MPI_LOCALNRANKS", "PMI_LOCAL_SIZE")
    return _assemble(env, claim, local_rank=local_rank, local_size=local_size, node_rank=None, num_nodes=None)


def _slurm(env: Mapping[str, str]) -> RankClaim | None:
    """Reads a step of srun. The batch script has SLURM_NTASKS and SLURM_PROCID=0, but no SLURM_STEP_NUM_TASKS."""
    size, rank = _number(env, "SLURM_STEP_NUM_TASKS"), _number(env, "SLURM_PROCID")
    return None if size is None or rank is None else RankClaim("slurm", rank, size)


def _slurm_placement(env: Mapping[str, str], claim: RankClaim) -> LauncherPlacement:
    node_rank = _number(env, "SLURM_NODEID")
    num_nodes = _first(env, "SLURM_STEP_NUM_NODES", "SLURM_NNODES")
    tasks = tasks_per_node(env.get("SLURM_STEP_TASKS_PER_NODE", ""))
    local_size = tasks[node_rank] if node_rank is not None and node_rank < len(tasks) else None
    placement = _assemble(
        env,
        claim,
        local_rank=_number(env, "SLURM_LOCALID"),
        local_size=local_size,
        node_rank=node_rank,
        num_nodes=num_nodes,
    )
    if placement.master_addr is not None:
        return placement
    host = first_host(env.get("SLURM_STEP_NODELIST", ""))
    if not host:
        refuse(
            env, "SLURM_STEP_NODELIST is not set, so the host of rank 0 is unknown. Set MASTER_ADDR and MASTER_PORT."
        )
    # Derived from the job and step, so that all tasks agree without communication; below Linux's ephemeral ports.
    job, step = _number(env, "SLURM_JOB_ID") or 0, _first(env, "SLURM_STEP_ID", "SLURM_STEPID") or 0
    return placement._replace(master_addr=host, master_port=20000 + (job * 31 + step) % 10000)


def first_host(nodelist: str) -> str:
    """Returns the first host of a Slurm node list: `gpu[007-009,012],login1` -> `gpu007`; empty for an empty list."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodelist)
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group() if first else "")


def tasks_per_node(text: str) -> list[int]:
    """Parses Slurm's short form of tasks on each node: `4(x2),3` -> [4, 4, 3]."""
    groups = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(tasks) for tasks, times in groups for _ in range(int(times or 1))]


def _assemble(
    env: Mapping[str, str],
    claim: RankClaim,
    *,
    local_rank: int | None,
    local_size: int | None,
    node_rank: int | None,
    num_nodes: int | None,
) -> LauncherPlacement:
    """Derives missing numbers from the others. If some are only estimates, is_complete is False."""
    launcher, rank, size = claim
    if local_size is None and num_nodes == 1:
        local_size = size
    if num_nodes is None and local_size == size:
        num_nodes, node_rank = 1, 0
    is_complete = None not in (local_rank, local_size, node_rank, num_nodes)
    local_size = size if local_size is None else local_size
    address, port = _master(env, claim)
    return LauncherPlacement(
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


def _master(env: Mapping[str, str], claim: RankClaim) -> tuple[str | None, int | None]:
    address, port = env.get("MASTER_ADDR") or None, _number(env, "MASTER_PORT")
    is_optional = claim.launcher in ("openmpi", "mpich", "intelmpi", "slurm")
    if claim.world_size == 1 or (is_optional and address is None):
        return None, None
    if address is None or port is None:
        missing = "MASTER_ADDR" if address is None else "MASTER_PORT"
        refuse(
            env,
            f"WORLD_SIZE={claim.world_size}, but {missing} is not set, so the ranks cannot meet. Set MASTER_ADDR to "
            "the host of rank 0 and MASTER_PORT to a free port there, the same on every rank.",
        )
    if not 0 < port < 65536:
        refuse(env, f"MASTER_PORT={port} is not a port: it must be between 1 and 65535.")
    return address, port


def _check(env: Mapping[str, str], placement: LauncherPlacement) -> None:
    """Raises a TopologyError if the numbers contradict each other."""
    rank, size, local_rank, local_size, node_rank, num_nodes = placement[:6]
    if size < 1:
        refuse(env, f"The world size is {size}, but it must be at least 1.")
    if not 0 <= rank < size:
        refuse(env, f"Rank {rank} of {size} processes: ranks go from 0 to {size - 1}.")
    if not 1 <= local_size <= size:
        refuse(env, f"{local_size} processes on this node, {size} in total: this is impossible.")
    if placement.is_complete and not 0 <= local_rank < local_size:
        refuse(env, f"Local rank {local_rank}, but {local_size} processes on this node: too high.")
    if not 0 <= node_rank < num_nodes <= size:
        refuse(env, f"Node {node_rank} of {num_nodes}, {size} processes: this is impossible.")
    if placement.is_complete and (num_nodes == 1) != (local_size == size):
        refuse(
            env,
            f"{num_nodes} node(s), {local_size} processes on this one, {size} in total: this is impossible. "
            "Are variables of another launch left in the environment?",
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
