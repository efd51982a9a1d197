"""Builds the command of each launcher for each host. Pure: hosts, address and settings in, commands out."""

from __future__ import annotations

import base64
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dtrain.cluster.hostfile import Host
from dtrain.cluster.rounds import RoundHost, RoundPlan
from dtrain.cluster.run_job import HostCommand, MultiHostJob
from dtrain.distributed.launcher_env import JOB_ID, NODE_RANK

FORWARDED_NAMES = (
    "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE",
    "TRANSFORMERS_OFFLINE", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONPATH",
    "PYTHONUNBUFFERED", "CUDA_HOME", "LD_LIBRARY_PATH", "TMPDIR", "LANG", "LC_ALL",
)  # fmt: skip
"""Variables that are forwarded to every host if they are set here. Others need --export NAME."""

FORWARDED_PREFIXES = ("NCCL_", "GLOO_", "UCX_", "TORCH_", "DTRAIN_")

SECRET_WORDS = frozenset({
    "TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASS", "PASSPHRASE", "CREDENTIAL", "CREDENTIALS", "KEY", "APIKEY", "PAT",
})  # fmt: skip
"""A variable with one of these words in its name is forwarded only by --export, and its value is never printed."""

FORWARDED_SIGNALS = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1})
"""The signals that dtrain's launcher and torchrun (`--signals-to-handle`) pass on to their ranks."""

SHUTDOWN_TIMEOUT_S = 3600
"""How long torchrun waits for ranks that it told to stop. They save first; torchrun's default of 30 s is too short."""


@dataclass(frozen=True)
class LaunchPlan:
    """The job to start, independent of the launcher.

    Attributes:
        hosts: in the order of ranks; spare ones only for dtrain's own launcher.
        script: the path of dtrain/main.py on every host.
        arguments: dtrain's arguments.
        folder: the working folder on every host.
        exit_file: exit.json; None for a command that writes none.
        env: variables that are forwarded.
        address: the master's address, where ranks meet.
        port: the master's port.
        job_id: a secret unique to this job. Ranks reject processes that have another one.
        name: a name unique to this job, which may be printed.
        host_range: the smallest and the largest number of hosts of an elastic job; None for a fixed number.
        max_restarts: how often the launcher restarts the ranks after a failure.
        fixed_port: the master's port if the user has chosen it; else None.
        addresses: every host's address as the others see it; empty before the hosts are probed.
    """

    hosts: Sequence[Host]
    script: Path
    arguments: Sequence[str]
    folder: Path
    exit_file: Path | None
    env: Mapping[str, str]
    address: str
    port: int
    job_id: str
    name: str
    host_range: tuple[int, int] | None = None
    max_restarts: int = 0
    fixed_port: int | None = None
    addresses: Sequence[str] = ()


def forwarded_env(env: Mapping[str, str], exported: Sequence[str]) -> dict[str, str]:
    """Returns the variables for every host: those of the lists above and those that the user exports by name."""
    forwarded = {}
    for name, value in env.items():
        is_listed = name in FORWARDED_NAMES or name.startswith(FORWARDED_PREFIXES)
        if name in exported or (is_listed and not is_secret(name)):
            forwarded[name] = value
    return forwarded


def is_secret(name: str) -> bool:
    """Returns whether a variable's name indicates that its value is secret."""
    return name == JOB_ID or not SECRET_WORDS.isdisjoint(name.upper().split("_"))


def rank_env(plan: LaunchPlan) -> dict[str, str]:
    """Returns the variables that are set for every rank."""
    return {**plan.env, JOB_ID: plan.job_id}


def dtrain(plan: LaunchPlan) -> MultiHostJob:
    """Returns a job with dtrain's own launcher on every host, which imports once and forks its ranks.

    On one host it restarts them itself. On several it waits for orders, also on spare hosts.
    """
    is_alone, commands = len(plan.hosts) == 1, []
    for index, host in enumerate(plan.hosts):
        argv = [sys.executable, str(plan.script), "--ranks", str(host.slots)]
        argv += ["--max-restarts", str(plan.max_restarts)] if plan.max_restarts and is_alone else []
        env = {**rank_env(plan), **_visible_devices(host), NODE_RANK: str(index)}
        commands.append(HostCommand(host.name, [*argv, *plan.arguments], env))
    addresses = plan.addresses or [host.name for host in plan.hosts]
    hosts = [
        RoundHost(host.name, address, host.slots, host.is_spare)
        for host, address in zip(plan.hosts, addresses, strict=True)
    ]
    return MultiHostJob(
        "dtrain",
        commands,
        plan.folder,
        plan.exit_file,
        launcher_signals=FORWARDED_SIGNALS,
        rounds=None if is_alone else RoundPlan(hosts, plan.fixed_port or 0, plan.max_restarts),
    )


def torchrun(plan: LaunchPlan) -> MultiHostJob:
    """Returns a job with torchrun on every host: for a fixed number of hosts, or elastic if `host_range` is set."""
    commands = []
    for index, host in enumerate(plan.hosts):
        rendezvous = ["--nnodes", str(len(plan.hosts)), "--node-rank", str(index)]
        rendezvous += ["--master-addr", plan.address, "--master-port", str(plan.port)]
        env = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_TIMEOUT_S), **rank_env(plan), **_visible_devices(host)}
        if plan.host_range is not None:
            # By default c10d uses the host's name as its address, which may not resolve on the other hosts.
            rendezvous = ["--nnodes", f"{plan.host_range[0]}:{plan.host_range[1]}", "--rdzv-backend", "c10d"]
            rendezvous += ["--rdzv-endpoint", f"{plan.address}:{plan.port}", "--local-addr", host.name]
            # Otherwise the ranks share the store of the agents, and lose it when the agent that hosts it ends.
            env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        argv = [sys.executable, "-m", "torch.distributed.run", *rendezvous, "--nproc-per-node", str(host.slots)]
        argv += ["--rdzv-id", plan.name, "--max-restarts", str(plan.max_restarts)]
        argv += ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", str(plan.script), *plan.arguments]
        commands.append(HostCommand(host.name, argv, env))
    return MultiHostJob(
        "torchrun",
        commands,
        plan.folder,
        plan.exit_file,
        launcher_signals=FORWARDED_SIGNALS,
        min_hosts=plan.host_range and plan.host_range[0],
    )


def deepspeed(plan: LaunchPlan) -> MultiHostJob:
    """Returns a job with DeepSpeed's single-node launcher on every host.

    DeepSpeed's multi-node launcher (pdsh) loses the exit code, waits for the remaining hosts after a failure, and
    forwards few variables.
    """
    world = {host.name: list(host.devices or range(host.slots)) for host in plan.hosts}
    encoded = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
    common = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={encoded}", "--log_level=warning"]
    common += [f"--master_addr={plan.address}", f"--master_port={plan.port}"]
    commands = [
        HostCommand(host.name, [*common, f"--node_rank={index}", str(plan.script), *plan.arguments], rank_env(plan))
        for index, host in enumerate(plan.hosts)
    ]
    return MultiHostJob("deepspeed", commands, plan.folder, plan.exit_file)


def mpirun(plan: LaunchPlan, local_host: str, hostfile: Path) -> MultiHostJob:
    """Returns a job with Open MPI's mpirun on this machine, which connects to the other hosts itself.

    Args:
        local_host: this machine's name.
        hostfile: the selected hosts. mpirun reads DeepSpeed's format.
    """
    argv = ["mpirun", "--hostfile", str(hostfile), "-np", str(sum(host.slots for host in plan.hosts))]
    # By default mpirun binds each rank to one core, which leaves it one thread.
    argv += ["--bind-to", "none", "--map-by", "slot"]
    # With the master's address set, ranks need neither MPI nor mpi4py to find each other.
    env = {**rank_env(plan), "MASTER_ADDR": plan.address, "MASTER_PORT": str(plan.port)}
    argv += [word for name in sorted(env) for word in ("-x", name)]
    argv += [sys.executable, str(plan.script), *plan.arguments]
    return MultiHostJob(
        "mpirun",
        [HostCommand(local_host, argv, env)],
        plan.folder,
        plan.exit_file,
        ends_with_exit_file=True,
        # mpirun kills its ranks half a second after SIGTERM, but it forwards SIGUSR1 and waits.
        signal_map=dict.fromkeys(map(int, (signal.SIGTERM, signal.SIGINT)), int(signal.SIGUSR1)),
        launcher_signals=frozenset({signal.SIGUSR1}),
    )


def _visible_devices(host: Host) -> dict[str, str]:
    return {} if host.devices is None else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, host.devices))}
