"""Every launcher's environment, as recorded or as documented, and every contradiction."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dtrain.distributed import launcher_env
from dtrain.distributed.job_identity import JobIdentity
from dtrain.distributed.launcher_env import first_host, tasks_per_node
from dtrain.distributed.topology import SINGLE, Topology
from dtrain.errors import TopologyError

TORCHRUN = {  # torchrun --nnodes 2 --nproc-per-node 4, second node, last process
    "RANK": "7",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "3",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "ROLE_RANK": "7",
    "ROLE_NAME": "default",
    "ROLE_WORLD_SIZE": "8",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "40001",
    "TORCHELASTIC_RESTART_COUNT": "0",
    "TORCHELASTIC_MAX_RESTARTS": "0",
    "TORCHELASTIC_RUN_ID": "b7c5",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
DEEPSPEED = {  # a hostfile of 3 + 2 slots, second node: local ranks are permuted there (rank modulo slots)
    "RANK": "3",
    "WORLD_SIZE": "5",
    "LOCAL_RANK": "1",
    "LOCAL_SIZE": "2",
    "CROSS_RANK": "1",
    "CROSS_SIZE": "2",
    "MASTER_ADDR": "10.77.0.1",
    "MASTER_PORT": "29500",
}
OPENMPI = {  # mpirun -np 2, one node, Open MPI 5
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "1",
    "OMPI_UNIVERSE_SIZE": "2",
    "PMIX_RANK": "1",
    "PMIX_NAMESPACE": "prterun-node1-411@1",
    "PMIX_HOSTNAME": "node1",
}
MPICH = {
    "PMI_RANK": "2",
    "PMI_SIZE": "4",
    "PMI_FD": "7",
    "MPI_LOCALRANKID": "0",
    "MPI_LOCALNRANKS": "2",
}
SLURM_JOB = {"SLURM_JOB_ID": "38749", "SLURM_JOBID": "38749", "SLURM_JOB_NODELIST": "gpu[007-008]", "SLURM_NNODES": "2"}
SLURM_BATCH = {  # the batch script itself: 8 tasks were asked for, this is one process
    **SLURM_JOB,
    "ENVIRONMENT": "BATCH",
    "SLURM_NTASKS": "8",
    "SLURM_NPROCS": "8",
    "SLURM_TASKS_PER_NODE": "4(x2)",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_GTIDS": "0",
}
SLURM_STEP = {
    **SLURM_BATCH,
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NODELIST": "gpu[007-008]",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
}
SLURM_SHELL = {  # salloc's interactive step: one task, though eight were asked for
    **SLURM_BATCH,
    "SLURM_STEP_ID": "4294967290",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NODELIST": "gpu007",
    "SLURM_STEP_TASKS_PER_NODE": "1",
}
BY_HAND = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "40001"}


def test_an_empty_environment_is_one_process() -> None:
    assert Topology.from_env({}) == SINGLE
    assert Topology.from_env({"PATH": "/bin", "LOCAL_RANK": "0"}) == SINGLE


def test_torchrun_gives_every_number_itself() -> None:
    assert Topology.from_env(TORCHRUN) == Topology(7, 8, 3, 4, 1, 2, "torchrun", "node1", 40001)


def test_dtrains_own_launcher_sets_torchruns_variables_and_its_process_id() -> None:
    env = {**TORCHRUN, launcher_env.LAUNCHER_PID: "7", "TORCHELASTIC_RESTART_COUNT": "2"}

    topology = Topology.from_env(env)

    assert topology == Topology(7, 8, 3, 4, 1, 2, "dtrain", "node1", 40001)
    assert topology.launches == {"dtrain b7c5": 2}
    assert topology.lost_hosts == ()
    assert Topology.from_env({**env, launcher_env.LOST_HOSTS: "node2,node3"}).lost_hosts == ("node2", "node3")
    # On several nodes dtrain's starts are counted once for all, torchrun's by each agent for itself.
    of_torchrun = launcher_env.read_job_identity(env, "torchrun")
    assert launcher_env.read_job_identity(env, "dtrain") == replace(of_torchrun, is_restart_global=True)
    # What is left in the environment of a program that a rank has started is no rank of torchrun's.
    assert Topology.from_env({launcher_env.LAUNCHER_PID: "7"}) == SINGLE


def test_deepspeed_is_told_by_its_own_names_and_keeps_its_permuted_local_ranks() -> None:
    assert Topology.from_env(DEEPSPEED) == Topology(3, 5, 1, 2, 1, 2, "deepspeed", "10.77.0.1", 29500)


def test_openmpi_on_one_node_is_complete_and_has_no_master_yet() -> None:
    assert Topology.from_env(OPENMPI) == Topology(1, 2, 1, 2, 0, 1, "openmpi", None, None)
    told = {**OPENMPI, "MASTER_ADDR": "node1", "MASTER_PORT": "5000"}
    assert Topology.from_env(told).master_addr == "node1"


def test_openmpi_on_two_nodes_does_not_take_the_node_rank_for_a_nodes_number() -> None:
    env = {**OPENMPI, "OMPI_COMM_WORLD_SIZE": "4"}

    topology = Topology.from_env(env)

    assert not topology.is_complete
    assert (topology.node_rank, topology.num_nodes, topology.local_rank) == (0, 2, 1)


def test_mpich_and_intel_mpi_differ_in_name_only() -> None:
    mpich = Topology.from_env(MPICH)
    intel = Topology.from_env({**MPICH, "I_MPI_HYDRA_BOOTSTRAP": "ssh", "I_MPI_INFO_NP": "4"})

    assert mpich == Topology(2, 4, 0, 2, 1, 2, "mpich", None, None, is_complete=False)
    assert intel.launcher == "intelmpi"
    assert (intel.rank, intel.local_rank) == (2, 0)


def test_mpich_without_local_ranks_leaves_them_to_be_found() -> None:
    topology = Topology.from_env({"PMI_RANK": "1", "PMI_SIZE": "2"})

    assert (topology.rank, topology.world_size, topology.is_complete) == (1, 2, False)


def test_a_slurm_step_meets_at_its_first_host_at_a_port_from_the_job() -> None:
    topology = Topology.from_env(SLURM_STEP)
    other = Topology.from_env({**SLURM_STEP, "SLURM_STEP_ID": "3"})

    assert topology == Topology(5, 8, 1, 4, 1, 2, "slurm", "gpu007", topology.master_port)
    assert topology.master_port != other.master_port, "two steps of a job do not collide"
    assert 20000 <= (topology.master_port or 0) < 30000
    assert Topology.from_env({**SLURM_STEP, "MASTER_ADDR": "login", "MASTER_PORT": "7"}).master_addr == "login"


@pytest.mark.parametrize("env", [SLURM_BATCH, SLURM_SHELL], ids=["batch script", "interactive shell"])
def test_python_in_a_slurm_job_without_srun_is_one_process(env: dict[str, str]) -> None:
    assert Topology.from_env(env) == SINGLE


def test_srun_with_slurms_own_pmi_is_slurm_and_mpirun_in_a_slurm_job_is_mpi() -> None:
    with_pmi = {**SLURM_STEP, "PMI_RANK": "5", "PMI_SIZE": "8"}
    # mpirun started its daemons with srun, one per node: the step counts daemons, not ranks.
    daemons = {**SLURM_STEP, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}

    assert Topology.from_env(with_pmi).launcher == "slurm"
    assert Topology.from_env({**daemons, **MPICH}).launcher == "mpich"
    assert Topology.from_env({**daemons, **OPENMPI, "OMPI_COMM_WORLD_SIZE": "4"}).launcher == "openmpi"


def test_a_launcher_started_by_another_is_the_one_that_counts() -> None:
    one_per_node = {**SLURM_STEP, "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}

    assert Topology.from_env({**one_per_node, **TORCHRUN}).launcher == "torchrun"
    assert Topology.from_env({**OPENMPI, **TORCHRUN}).launcher == "torchrun"
    assert Topology.from_env({**one_per_node, **DEEPSPEED}).launcher == "deepspeed"
    assert Topology.from_env({**SLURM_SHELL, **BY_HAND}).launcher == "env"


def test_ranks_set_by_hand_leave_the_nodes_to_be_found_unless_told() -> None:
    bare = Topology.from_env(BY_HAND)
    told = Topology.from_env({**BY_HAND, "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})

    assert (bare.launcher, bare.rank, bare.world_size, bare.is_complete) == ("env", 1, 2, False)
    assert told == Topology(1, 2, 1, 2, 0, 1, "env", "127.0.0.1", 40001)


def test_a_world_of_one_needs_no_master() -> None:
    assert Topology.from_env({"WORLD_SIZE": "1"}).world_size == 1
    assert Topology.from_env({"WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}).master_addr is None
    alone = {**OPENMPI, **{f"OMPI_COMM_WORLD_{name}": "1" for name in ("SIZE", "LOCAL_SIZE")}}
    alone |= {f"OMPI_COMM_WORLD_{name}": "0" for name in ("RANK", "LOCAL_RANK")}
    assert Topology.from_env(alone) == replace(SINGLE, launcher="openmpi")


def _without(env: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in env.items() if name not in names}


@pytest.mark.parametrize(
    ("env", "says"),
    [
        ({**BY_HAND, "RANK": "2"}, "Rank 2 of 2 processes"),
        ({**BY_HAND, "RANK": "-1"}, "Rank -1 of 2 processes"),
        ({**BY_HAND, "WORLD_SIZE": "0", "RANK": "0"}, "The world size is 0"),
        ({**BY_HAND, "WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not a whole number"),
        (_without(BY_HAND, "MASTER_ADDR"), "MASTER_ADDR is not set"),
        (_without(BY_HAND, "MASTER_PORT"), "MASTER_PORT is not set"),
        ({**BY_HAND, "MASTER_PORT": "70000"}, "MASTER_PORT=70000 is not a port"),
        (_without(BY_HAND, "WORLD_SIZE"), "WORLD_SIZE is not"),
        (_without(BY_HAND, "RANK"), "RANK is not set"),
        ({"LOCAL_RANK": "1"}, "WORLD_SIZE is not"),
        ({"RANK": "1", "WORLD_SIZE": "1"}, "Rank 1 of 1 processes"),
        ({"TORCHELASTIC_RUN_ID": "none"}, "WORLD_SIZE is not"),
        ({**TORCHRUN, "LOCAL_RANK": "4"}, "Local rank 4"),
        ({**TORCHRUN, "GROUP_RANK": "2"}, "Node 2 of 2"),
        (
            {**TORCHRUN, "GROUP_WORLD_SIZE": "1", "GROUP_RANK": "0"},
            "1 node\\(s\\), 4 processes on this one, 8 in total",
        ),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "9"}, "9 processes on this node, 8 in total"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "0"}, "0 processes on this node"),
        ({**BY_HAND, **OPENMPI, "OMPI_COMM_WORLD_SIZE": "4"}, "by the variables of openmpi it is rank 1 of 4"),
        ({**BY_HAND, **MPICH}, "by the variables of mpich it is rank 2 of 4"),
        ({**BY_HAND, **SLURM_STEP}, "by the variables of slurm it is rank 5 of 8"),
        ({**DEEPSPEED, **OPENMPI}, "rank 3 of 5, by the variables of openmpi"),
        ({**OPENMPI, **MPICH}, "openmpi says rank 1 of 2, mpich says rank 2 of 4"),
        (_without(OPENMPI, "OMPI_COMM_WORLD_RANK"), "Only one of OMPI_COMM_WORLD_RANK and OMPI_COMM_WORLD_SIZE"),
        ({**OPENMPI, "OMPI_COMM_WORLD_LOCAL_RANK": "2"}, "Local rank 2"),
        (_without(SLURM_STEP, "SLURM_STEP_NODELIST"), "host of rank 0 is unknown"),
        ({**SLURM_STEP, "SLURM_PROCID": "8"}, "Rank 8 of 8"),
    ],
)
def test_a_contradiction_is_an_error_with_a_table_of_what_was_found(env: dict[str, str], says: str) -> None:
    with pytest.raises(TopologyError, match=says) as caught:
        Topology.from_env(env)

    _, table = str(caught.value).split("Found in the environment:\n")
    rows = dict(line.split(maxsplit=1) for line in table.splitlines())
    shown = {"RANK", "WORLD_SIZE", "MASTER_ADDR", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS"} & set(env)
    assert {name: rows[name] for name in shown} == {name: env[name] for name in shown}
    assert "PATH" not in rows


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("gpu[007-009,012],login1", "gpu007"),
        ("gpu[3,5-6]", "gpu3"),
        ("rack[1-2]node[04-05]", "rack1node04"),
        ("cn-f001,cn-f[003-004]", "cn-f001"),
        ("a[1-2]-ib0,b3", "a1-ib0"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_slurm_node_list(nodelist: str, first: str) -> None:
    assert first_host(nodelist) == first


def test_slurms_short_form_of_tasks_per_node() -> None:
    assert tasks_per_node("4(x2),3") == [4, 4, 3]
    assert tasks_per_node("2") == [2]
    assert tasks_per_node("") == []


def test_uneven_slurm_nodes_give_each_its_own_number_of_ranks() -> None:
    env = {**SLURM_STEP, "SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "4,3", "SLURM_PROCID": "6"}

    assert Topology.from_env(env).local_world_size == 3


def test_one_line_says_where_a_process_stands() -> None:
    assert SINGLE.describe() == "one process"
    assert Topology.from_env(TORCHRUN).describe() == "rank 7 of 8 on 2 nodes (local rank 3 of 4), by torchrun"
    assert "estimated" in Topology.from_env(BY_HAND).describe()


# ---------------------------------------------------------------- which job


@pytest.mark.parametrize(
    ("launcher", "env", "job"),
    [
        ("torchrun", {"TORCHELASTIC_RUN_ID": "a"}, ({"rdzv id": "a"}, 0, True)),
        (
            "torchrun",
            {
                "TORCHELASTIC_RUN_ID": "a",
                "TORCHELASTIC_RESTART_COUNT": "2",
                "GROUP_WORLD_SIZE": "1",
                "SLURM_JOB_ID": "7",
            },
            ({"rdzv id": "a"}, 2, True),
        ),
        (
            "torchrun",
            {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "2", "GROUP_WORLD_SIZE": "3"},
            ({"rdzv id": "a"}, 2, False),
        ),
        ("openmpi", {"PMIX_NAMESPACE": "prterun-9@1", "SLURM_JOB_ID": "7"}, ({"MPI job": "prterun-9@1"}, 0, True)),
        ("mpich", {}, ({}, 0, True)),
        ("slurm", {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "3"}, ({"Slurm step": "7.3"}, 0, True)),
        (
            "slurm",
            {"SLURM_JOB_ID": "7", "SLURM_STEPID": "4", "SLURM_RESTART_COUNT": "1"},
            ({"Slurm step": "7.4"}, 1, True),
        ),
        ("slurm", {}, ({}, 0, True)),
        ("deepspeed", {"SLURM_JOB_ID": "7", "PMIX_NAMESPACE": "x"}, ({}, 0, True)),
        ("env", {"SLURM_JOB_ID": "7", "TORCHELASTIC_RESTART_COUNT": "3"}, ({}, 0, True)),
        ("none", {}, ({}, 0, True)),
    ],
)
def test_a_job_has_the_name_that_its_own_launcher_gave_it(
    launcher: str, env: dict[str, str], job: tuple[dict[str, str], int, bool]
) -> None:
    assert _fields(launcher_env.read_job_identity(env, launcher)) == job


def _fields(identity: JobIdentity) -> tuple[dict[str, str], int, bool]:
    return dict(identity.job), identity.restart, identity.is_restart_global


def test_what_starts_a_job_again_keeps_its_name_and_counts() -> None:
    torchrun = {"TORCHELASTIC_RUN_ID": "a", "TORCHELASTIC_RESTART_COUNT": "2"}
    slurm = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_RESTART_COUNT": "1"}

    assert launcher_env.count_launches({**torchrun, **slurm}, "torchrun") == {"torchrun a": 2, "Slurm job 7": 1}
    assert launcher_env.count_launches({**torchrun, "SLURM_JOB_ID": "7"}, "slurm") == {"Slurm job 7": 0}
    assert launcher_env.count_launches({}, "openmpi") == {}
