"""What each launcher is told on each host. Pure: hosts, address and settings in, commands out."""

from __future__ import annotations

import base64
import json
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dtrain.cluster.hostfile import Host
from dtrain.cluster.run_job import Job, Part
from dtrain.distributed.launcher_env import JOB_ID

TAKEN_ALONG = (
    "HF_HOME", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_DATASETS_CACHE", "HF_DATASETS_OFFLINE",
    "TRANSFORMERS_OFFLINE", "TOKENIZERS_PARALLELISM", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTHONPATH",
    "PYTHONUNBUFFERED", "CUDA_HOME", "LD_LIBRARY_PATH", "TMPDIR", "LANG", "LC_ALL",
)  # fmt: skip
"""Variables that go to every host where they are set here. All others have to be named: --export NAME."""

TAKEN_FAMILIES = ("NCCL_", "GLOO_", "UCX_", "TORCH_", "DTRAIN_")

SECRETS = frozenset({
    "TOKEN", "SECRET", "PASSWORD", "PASSWD", "PASS", "PASSPHRASE", "CREDENTIAL", "CREDENTIALS", "KEY", "APIKEY", "PAT",
})  # fmt: skip
"""Words of names whose values go nowhere unless they are exported by name, and are never printed."""

SHUTDOWN_S = 3600
"""How long torchrun waits for ranks that it has told to end: they save first. Its own 30 s would cut that off."""


@dataclass(frozen=True)
class Plan:
    """What is to be started, whatever starts it.

    hosts: in the order of ranks.
    script: dtrain/main.py, by its path on every host.
    arguments: dtrain's own.
    folder: the working folder.
    note: exit.json; None for a command that writes none.
    env: variables that travel.
    address, port: where the ranks meet.
    job_id: unlike any other job's, so that a process that belongs to another one by mistake is not let in.
    name: unlike any other job's, too, and shown.
    nodes: the least and the largest number of hosts, for an elastic job.
    """

    hosts: Sequence[Host]
    script: Path
    arguments: Sequence[str]
    folder: Path
    note: Path | None
    env: Mapping[str, str]
    address: str
    port: int
    job_id: str
    name: str
    nodes: tuple[int, int] | None = None
    max_restarts: int = 0


def travelling(env: Mapping[str, str], exported: Sequence[str]) -> dict[str, str]:
    """The variables that go to every host: those of the list above, and those that the user names."""
    found = {}
    for name, value in env.items():
        is_listed = name in TAKEN_ALONG or name.startswith(TAKEN_FAMILIES)
        if name in exported or (is_listed and not is_secret(name)):
            found[name] = value
    return found


def is_secret(name: str) -> bool:
    """Whether a variable's name says that its value is nobody's business."""
    return name == JOB_ID or not SECRETS.isdisjoint(name.upper().split("_"))


def environment(plan: Plan) -> dict[str, str]:
    """What is set for every rank."""
    return {**plan.env, JOB_ID: plan.job_id}


def torchrun(plan: Plan) -> Job:
    """torchrun on every host: as many nodes as there are, or with `nodes` as many as there are left."""
    parts = []
    for place, host in enumerate(plan.hosts):
        meeting = ["--nnodes", str(len(plan.hosts)), "--node-rank", str(place)]
        meeting += ["--master-addr", plan.address, "--master-port", str(plan.port)]
        env = {"TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SHUTDOWN_S), **environment(plan), **_devices(host)}
        if plan.nodes is not None:
            # c10d would take the host's own name for its address, which need not resolve on the others.
            meeting = ["--nnodes", f"{plan.nodes[0]}:{plan.nodes[1]}", "--rdzv-backend", "c10d"]
            meeting += ["--rdzv-endpoint", f"{plan.address}:{plan.port}", "--local-addr", host.name]
            # The agents' own store would otherwise be the ranks' too, and end with whichever agent holds it.
            env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        argv = [sys.executable, "-m", "torch.distributed.run", *meeting, "--nproc-per-node", str(host.slots)]
        argv += ["--rdzv-id", plan.name, "--max-restarts", str(plan.max_restarts)]
        argv += ["--signals-to-handle", "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1", str(plan.script), *plan.arguments]
        parts.append(Part(host.name, argv, env))
    taken = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1})
    return Job("torchrun", parts, plan.folder, plan.note, launcher_takes=taken, least=plan.nodes and plan.nodes[0])


def deepspeed(plan: Plan) -> Job:
    """DeepSpeed's launcher of one node, on every host.

    Its own way to other hosts (pdsh) loses the exit code, waits for hosts that are left over, and passes few variables.
    """
    world = {host.name: list(host.devices or range(host.slots)) for host in plan.hosts}
    encoded = base64.urlsafe_b64encode(json.dumps(world).encode()).decode()
    common = [sys.executable, "-u", "-m", "deepspeed.launcher.launch", f"--world_info={encoded}", "--log_level=warning"]
    common += [f"--master_addr={plan.address}", f"--master_port={plan.port}"]
    parts = [
        Part(host.name, [*common, f"--node_rank={place}", str(plan.script), *plan.arguments], environment(plan))
        for place, host in enumerate(plan.hosts)
    ]
    return Job("deepspeed", parts, plan.folder, plan.note)


def mpirun(plan: Plan, here: str, hostfile: Path) -> Job:
    """Open MPI's mpirun, which goes to the other hosts itself.

    Args:
        here: the host that starts it.
        hostfile: the hosts that take part, as mpirun reads them: its format is DeepSpeed's.
    """
    argv = ["mpirun", "--hostfile", str(hostfile), "-np", str(sum(host.slots for host in plan.hosts))]
    # Bound to one core each, ranks would compute with one thread each.
    argv += ["--bind-to", "none", "--map-by", "slot"]
    # Told where to meet, ranks need neither MPI nor mpi4py for it.
    env = {**environment(plan), "MASTER_ADDR": plan.address, "MASTER_PORT": str(plan.port)}
    argv += [word for name in sorted(env) for word in ("-x", name)]
    argv += [sys.executable, str(plan.script), *plan.arguments]
    # mpirun gives its ranks half a second after SIGTERM, but passes SIGUSR1 on and waits.
    told = dict.fromkeys(map(int, (signal.SIGTERM, signal.SIGINT)), int(signal.SIGUSR1))
    part = Part(here, argv, env)
    takes = frozenset({signal.SIGUSR1})
    return Job("mpirun", [part], plan.folder, plan.note, note_is_end=True, signals=told, launcher_takes=takes)


def _devices(host: Host) -> dict[str, str]:
    return {} if host.devices is None else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, host.devices))}
