"""Where this process stands in the job, and its device. torch is imported when used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from dtrain.distributed import launcher_env
from dtrain.distributed.mpi_bootstrap import finalize_mpi as finalize_mpi
from dtrain.errors import TopologyError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Topology:
    """Where one process stands among all processes of the job.

    rank, world_size: this process among all of them.
    local_rank, local_world_size: among those of its node. Not always in the order of `rank`: DeepSpeed permutes them
        where nodes have unequal slots.
    node_rank, num_nodes: its node among all nodes.
    launcher: none, torchrun, deepspeed, openmpi, mpich, intelmpi, slurm, or env (RANK and WORLD_SIZE set by hand).
    master_addr, master_port: where the ranks meet; None for one process, and under MPI until the group has formed.
    is_complete: False while the node's numbers are estimates, since the launcher does not give them; `process_group`
        yields a complete one.
    launches: what may have started this job before, by name, and how often it did.
    exit_file: where to write why this process ends, besides exit.json; None where nobody asks.
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

    @classmethod
    def from_env(cls, env: Mapping[str, str]) -> Topology:
        """Reads the launchers' variables; pure.

        Args:
            env: the environment, e.g. os.environ.

        Raises:
            TopologyError: the variables are incomplete or contradict each other; the message has a table of them.
        """
        place = launcher_env.read_place(env)
        exit_file = Path(env[launcher_env.EXIT_FILE]) if env.get(launcher_env.EXIT_FILE) else None
        return cls(*place, launches=launcher_env.launches_of(env, place.launcher), exit_file=exit_file)

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which reports and writes."""
        return self.rank == 0

    @property
    def is_node_main(self) -> bool:
        """Whether this is the one process of its node that does work for the node."""
        return self.local_rank == 0

    def describe(self) -> str:
        """One line for people."""
        if self.world_size == 1:
            return "one process" if self.launcher == "none" else f"one process, started by {self.launcher}"
        about = "" if self.is_complete else ", as far as the variables tell"
        nodes = "1 node" if self.num_nodes == 1 else f"{self.num_nodes} nodes"
        by = "variables set by hand" if self.launcher == "env" else self.launcher
        local = f"local rank {self.local_rank} of {self.local_world_size}{about}"
        return f"rank {self.rank} of {self.world_size} on {nodes} ({local}), by {by}"


SINGLE = Topology(0, 1, 0, 1, 0, 1, "none", None, None)
"""One process on its own."""


def device_of(topology: Topology) -> torch.device:
    """The device of this rank: its CUDA device, made the current one, or the CPU.

    Raises:
        TopologyError: more ranks on this node than CUDA devices.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # One visible device for several ranks: the launcher gives each rank its own (srun --gpus-per-task).
    index = 0 if count == 1 else topology.local_rank
    if index >= count:
        raise TopologyError(
            f"Local rank {topology.local_rank} has no CUDA device: {topology.local_world_size} ranks on this node, "
            f"{count} devices. Start at most one rank per device."
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device
