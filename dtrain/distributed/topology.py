"""The place of this process in the job. Its device: see cuda_devices.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dtrain.distributed import launcher_env


@dataclass(frozen=True)
class Topology:
    """The place of one process among all processes of the job.

    Attributes:
        rank: this process's number among all processes, from 0.
        world_size: number of processes.
        local_rank: this process's number among those of its node. The order may differ from that of `rank`: DeepSpeed
            permutes local ranks if nodes have unequal slots.
        local_world_size: number of processes on this node.
        node_rank: number of this node, from 0.
        num_nodes: number of nodes.
        launcher: none, dtrain (`--ranks`), torchrun, deepspeed, openmpi, mpich, intelmpi, slurm, or env (RANK and
            WORLD_SIZE set by hand).
        master_addr: host where the ranks meet; None for one process, and under MPI until the group has formed.
        master_port: its port; None as above.
        is_complete: False while the node's numbers are estimates because the launcher does not set them;
            `process_group` yields a complete topology.
        launches: how often each launcher that may restart this job has started it before, by the launcher's name.
        exit_file: file that receives the reason why this process ends, in addition to exit.json; None for no such file.
        launcher_error_file: file whose content torchrun reports if this process fails; None for no such file.
        lost_hosts: names of hosts that the job has given up; their processes count as ended.
        cuda_mask: CUDA_VISIBLE_DEVICES; None where it is not set. Empty: no GPU is to be used.
    """

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
    launches: Mapping[str, int] = field(default_factory=dict, compare=False)
    exit_file: Path | None = field(default=None, compare=False)
    launcher_error_file: Path | None = field(default=None, compare=False)
    lost_hosts: tuple[str, ...] = field(default=(), compare=False)
    cuda_mask: str | None = field(default="", compare=False)

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Topology:
        """Reads the launchers' variables. Pure.

        Args:
            env: the environment, e.g. os.environ.

        Raises:
            TopologyError: the variables are incomplete or contradict each other; the message has a table of them.
        """
        placement = launcher_env.read_placement(env)
        exit_file = Path(env[launcher_env.EXIT_FILE]) if env.get(launcher_env.EXIT_FILE) else None
        error_file = env.get("TORCHELASTIC_ERROR_FILE") if placement.launcher == "torchrun" else None
        return cls(
            *placement,
            launches=launcher_env.count_launches(env, placement.launcher),
            exit_file=exit_file,
            launcher_error_file=Path(error_file) if error_file else None,
            lost_hosts=tuple(filter(None, env.get(launcher_env.LOST_HOSTS, "").split(","))),
            cuda_mask=env.get("CUDA_VISIBLE_DEVICES"),
        )

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which reports and writes."""
        return self.rank == 0

    @property
    def is_node_main(self) -> bool:
        """Whether this is the one process of its node that does work for the node."""
        return self.local_rank == 0

    def describe(self) -> str:
        """Returns one line for the log."""
        if self.world_size == 1:
            return "one process" if self.launcher == "none" else f"one process, started by {self.launcher}"
        estimated = "" if self.is_complete else ", estimated"
        nodes = "1 node" if self.num_nodes == 1 else f"{self.num_nodes} nodes"
        launcher = "variables set by hand" if self.launcher == "env" else self.launcher
        local = f"local rank {self.local_rank} of {self.local_world_size}{estimated}"
        return f"rank {self.rank} of {self.world_size} on {nodes} ({local}), by {launcher}"


SINGLE = Topology(0, 1, 0, 1, 0, 1, "none", None, None)
"""One process without a launcher."""
