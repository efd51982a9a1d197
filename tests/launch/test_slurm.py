"""launch/slurm.sbatch: what it starts, its exit code, and when it requeues the job.

Most tests use stand-ins for Slurm's programs. If Slurm is installed, others use two real nodes on this machine (two
slurmd on two loopback addresses, without authentication).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support import jobs

pytestmark = pytest.mark.launchers

SCRIPT = jobs.ROOT / "launch" / "slurm.sbatch"
LIMIT_S = 60


def directives() -> dict[str, str]:
    """Returns the options for sbatch in the script."""
    lines = re.findall(r"^#SBATCH --([\w-]+)(?:=(.*))?$", SCRIPT.read_text(), re.MULTILINE)
    return dict(lines)


# ---------------------------------------------------------------- with stand-ins for Slurm's programs


@dataclass
class Site:
    """A folder of stand-ins, first on the PATH.

    Attributes:
        folder: their folder, and that of the run.
        srun: shell code of srun.
        squeue: shell code of squeue.
        scontrol: shell code of scontrol.
        env: variables of the script's environment.
    """

    folder: Path
    srun: str = "exit 0"
    squeue: str = "echo RUNNING"
    scontrol: str = "exit 0"
    env: dict[str, str] = field(default_factory=lambda: {"SLURM_JOB_ID": "17", "SLURM_CPUS_PER_TASK": "3"})

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        bin_folder = self.folder / "bin"
        bin_folder.mkdir(exist_ok=True)
        for name in ("srun", "squeue", "scontrol"):
            program = bin_folder / name
            record = f'printf "%s\\n" "$@" > {self.folder}/{name}.args'
            program.write_text(f"#!/bin/sh\n{record}\n{getattr(self, name)}\n")
            program.chmod(0o755)
        kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        path = f"{bin_folder}:{jobs.BIN}:{os.environ['PATH']}"
        return subprocess.run(
            ["bash", str(SCRIPT), *arguments],
            cwd=self.folder,  # the script finds the checkout itself
            env={**kept, "PATH": path, **self.env},
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )

    def arguments_of(self, name: str) -> list[str] | None:
        """Returns the arguments that a stand-in was called with; None if it was not called."""
        file = self.folder / f"{name}.args"
        return file.read_text().splitlines() if file.exists() else None

    def settings(self) -> list[str]:
        return [f"run.output_dir={self.folder}", "run.name=run"]

    def ending_with(self, code: int, message: str, *, srun_code: int | None = None) -> str:
        """Returns shell code of an srun under which dtrain ends like this, and which prints a line itself."""
        run = self.folder / "run"
        end = json.dumps({"code": code, "message": message})
        return (
            f"mkdir -p {run}; printf '%s' '{end}' > {run}/exit.json; echo 'error: {message}' >&2; "
            f"echo 'srun: error: node1: task 0: Exited' >&2; exit {code if srun_code is None else srun_code}"
        )


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


def test_a_dry_run_prints_the_command_and_starts_nothing(site: Site) -> None:
    site.env = {}

    done = site.run("--dry-run", "--config", "configs/my cola.yaml", 'freeze.modules=["a", "b"]')

    assert done.returncode == 0, done.stderr
    assert site.arguments_of("srun") is None
    printed = subprocess.run(["bash", "-c", f"printf '%s\\n' {done.stdout[2:]}"], capture_output=True, text=True)
    assert printed.stdout.splitlines()[-4:] == [
        "dtrain/main.py", "--config", "configs/my cola.yaml", 'freeze.modules=["a", "b"]',
    ]  # fmt: skip


def test_outside_slurm_the_message_shows_how_to_submit_it(site: Site) -> None:
    site.env = {}

    done = site.run()

    assert done.returncode == 2
    assert "sbatch launch/slurm.sbatch" in done.stderr
    assert site.arguments_of("srun") is None


def test_arguments_reach_the_ranks_as_they_were_given(site: Site) -> None:
    done = site.run(*site.settings(), "run.seed=3", 'freeze.modules=["embeddings"]')

    assert done.returncode == 0, done.stderr
    arguments = site.arguments_of("srun")
    assert arguments is not None
    assert "--cpus-per-task=3" in arguments, "a step does not inherit it from its job"
    assert "--cpu-bind=cores" in arguments
    assert "--export=ALL" in arguments
    assert arguments[-6:] == [
        "python",
        "dtrain/main.py",
        *site.settings(),
        "run.seed=3",
        'freeze.modules=["embeddings"]',
    ]
    assert site.arguments_of("scontrol") is None
    assert done.stdout.startswith("+ srun ")


def test_a_wrong_setting_is_reported_once_and_nothing_starts(site: Site) -> None:
    done = site.run("train.max_stepz=3")

    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("train.max_stepz is not a setting. Did you mean train.max_steps?")
    assert site.arguments_of("srun") is None


def test_a_failed_job_exits_with_its_own_code_and_its_message_last(site: Site) -> None:
    site.srun = site.ending_with(3, "No such data.")

    done = site.run(*site.settings())

    assert done.returncode == 3
    assert done.stderr.splitlines()[-1] == "No such data."
    assert site.arguments_of("scontrol") is None


def test_the_exit_code_is_that_of_the_first_failure(site: Site) -> None:
    site.srun = site.ending_with(5, "The loss is nan.", srun_code=137)

    assert site.run(*site.settings()).returncode == 5


def test_an_exit_file_of_an_earlier_job_does_not_count(site: Site) -> None:
    (site.folder / "run").mkdir()
    old = site.folder / "run" / "exit.json"
    old.write_text(json.dumps({"code": 75, "message": "Long ago."}))
    os.utime(old, (1, 1))
    site.srun = "exit 139"

    done = site.run(*site.settings())

    assert done.returncode == 139
    assert done.stderr.splitlines()[-1] == "srun exited with code 139."


def test_a_job_that_saved_is_requeued(site: Site) -> None:
    site.srun = site.ending_with(75, "The checkpoint is saved.")

    done = site.run(*site.settings())

    assert site.arguments_of("scontrol") == ["requeue", "17"]
    assert done.returncode == 75
    assert done.stderr.splitlines()[-1] == "The checkpoint is saved. Requeued, start 2."


@pytest.mark.parametrize(
    ("squeue", "restarts", "message"),
    [
        ("echo COMPLETING", "0", "the job is COMPLETING"),  # after scancel
        ("exit 1", "0", "the job is unknown"),
        ("echo RUNNING", "50", "the limit of 50 requeues is reached"),
    ],
)
def test_a_job_that_must_end_is_not_requeued(site: Site, squeue: str, restarts: str, message: str) -> None:
    site.srun = site.ending_with(75, "The checkpoint is saved.")
    site.squeue = squeue
    site.env["SLURM_RESTART_COUNT"] = restarts

    done = site.run(*site.settings())

    assert done.returncode == 75
    assert message in done.stderr.splitlines()[-1]
    assert site.arguments_of("scontrol") is None


def test_if_slurm_refuses_to_requeue_the_message_says_to_submit_again(site: Site) -> None:
    site.srun = site.ending_with(75, "The checkpoint is saved.")
    site.scontrol = "exit 1"

    done = site.run(*site.settings())

    assert done.returncode == 75
    assert "Submit the same command again" in done.stderr.splitlines()[-1]


def test_a_folder_without_dtrain_is_refused(site: Site) -> None:
    site.env["SLURM_SUBMIT_DIR"] = str(site.folder)

    done = site.run()

    assert done.returncode == 2
    assert "has no dtrain/main.py" in done.stderr


def test_the_directives_signal_the_ranks_and_forward_no_secrets() -> None:
    found = directives()

    assert re.fullmatch(r"USR1@\d+", found["signal"]), "B: would signal only the script"
    assert found["open-mode"] == "append", "otherwise a requeued job overwrites its log"
    assert "requeue" in found
    names = found["export"].split(",")
    assert {"PATH", "HOME"} <= set(names)
    assert not [name for name in names if re.search("ALL$|TOKEN|KEY|SECRET|PASS", name) and name != "LC_ALL"]


# ---------------------------------------------------------------- two real nodes on this machine

NEEDS = ("slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "squeue")
CONF = """
ClusterName=test
SlurmctldHost=localhost
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/none
AuthInfo=cred_expire=5
CredType=cred/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/affinity
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
SchedulerParameters=batch_sched_delay=0,sched_interval=1,bf_interval=1
ReturnToService=2
KillWait=20
NodeName=127.0.0.1 NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2 RealMemory=1000
NodeName=127.0.0.2 NodeAddr=127.0.0.2 Port={ports[2]} CPUs=2 RealMemory=1000
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


@dataclass
class Cluster:
    """Two nodes of Slurm.

    Attributes:
        folder: the folder of all files that they write.
        env: the environment of commands.
    """

    folder: Path
    env: Mapping[str, str]

    def run(self, *command: str) -> str:
        done = subprocess.run(command, env=self.env, capture_output=True, text=True, timeout=LIMIT_S, cwd=jobs.ROOT)
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, name: str, *options: str, settings: list[str]) -> str:
        """Submits a job with one rank on each node, which writes its output to <name>.out. Returns its number."""
        size = ["--nodes", "2", "--ntasks-per-node", "1", "--cpus-per-task", "1", "--time", "10"]
        output = ["--output", str(self.folder / f"{name}.out")]
        return self.run("sbatch", "--parsable", *size, *output, *options, str(SCRIPT), *settings)

    def output(self, name: str) -> str:
        file = self.folder / f"{name}.out"
        return file.read_text() if file.exists() else ""

    def job(self, number: str) -> dict[str, str]:
        """Returns Slurm's fields of a job: JobState, ExitCode, Restarts, ..."""
        fields = self.run("scontrol", "show", "job", number, "--oneliner").split()
        return dict(entry.partition("=")[::2] for entry in fields)

    def wait_for_line(self, name: str, pattern: str, times: int = 1) -> None:
        found = jobs.until(lambda: len(re.findall(pattern, self.output(name))) >= times)
        assert found, f"no {times} of {pattern!r} in:\n{self.output(name)}"

    def wait_for_end(self, number: str) -> dict[str, str]:
        ended = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
        assert jobs.until(lambda: self.job(number)["JobState"] in ended), self.job(number)
        return self.job(number)

    def processes(self) -> dict[int, str]:
        """Returns the processes of its jobs and daemons, which have this folder in their command line."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
                if str(self.folder) in command and state != "Z":
                    found[int(entry.name)] = command
        return found

    def ranks(self) -> list[int]:
        return [
            pid for pid, command in self.processes().items() if " dtrain/main.py " in command and "srun " not in command
        ]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    missing = [name for name in NEEDS if shutil.which(name) is None and not Path(f"/usr/sbin/{name}").exists()]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and Slurm (slurmctld, slurmd, slurm-client); missing: {', '.join(missing) or 'root'}")
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "slurm.conf").write_text(CONF.format(folder=folder, ports=[jobs.free_port() for _ in range(3)]))
    # Jobs inherit some variables of the daemons, which therefore do not get pytest's environment.
    path = f"{jobs.BIN}:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    env = {"PATH": path, "HOME": os.environ.get("HOME", "/root"), "SLURM_CONF": str(folder / "slurm.conf")}
    found = Cluster(folder, {**env, "HF_TOKEN": "hf_not_to_be_seen", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""})
    conf = ["-D", "-f", str(folder / "slurm.conf")]
    for name in ("state", "spool.127.0.0.1", "spool.127.0.0.2"):
        (folder / name).mkdir()
    daemons = []
    try:
        for command in (["slurmctld", "-i"], ["slurmd", "-N", "127.0.0.1"], ["slurmd", "-N", "127.0.0.2"]):
            log = (folder / f"{'-'.join(command)}.log").open("w")
            start = [shutil.which(command[0], path=path) or command[0], *conf, *command[1:]]
            daemons.append(subprocess.Popen(start, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
            log.close()
        assert jobs.until(lambda: _idle(found) == 2, LIMIT_S), [log.read_text() for log in folder.glob("*.log")]
        yield found
        for number in found.run("squeue", "--noheader", "--format", "%A").split():
            found.run("scancel", "--signal=KILL", number)
    finally:
        for daemon in reversed(daemons):
            daemon.terminate()
            with suppress(subprocess.TimeoutExpired):
                daemon.wait(10)
        for pid in found.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for daemon in daemons:
            daemon.wait(10)


def _idle(cluster: Cluster) -> int:
    done = subprocess.run(
        ["sinfo", "--noheader", "-N", "--format", "%T"],
        env=cluster.env,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )
    return done.stdout.split().count("idle")


@pytest.mark.slow
def test_slurm_trains_on_two_nodes_and_gets_the_exit_code(tmp_path: Path, cluster: Cluster) -> None:
    good = cluster.submit("good", settings=jobs.settings(cluster.folder, "good"))
    assert cluster.wait_for_end(good)["JobState"] == "COMPLETED", cluster.output("good")
    bad = cluster.submit(
        "bad", settings=jobs.settings(cluster.folder, "bad", optim__name="sgd", optim__learning_rate="1e30", optim__max_grad_norm="null")
    )  # fmt: skip
    ended = cluster.wait_for_end(bad)

    summary = jobs.summary_of(cluster.folder / "good")
    assert (summary["world_size"], summary["launcher"], summary["engine"]) == (2, "slurm", "ddp")
    assert "rank 0 of 2 on 2 nodes (local rank 0 of 1), by slurm" in cluster.output("good")
    assert (ended["JobState"], ended["ExitCode"]) == ("FAILED", "5:0")
    assert cluster.output("bad").splitlines()[-1] == jobs.exit_of(cluster.folder / "bad")["message"]


@pytest.mark.slow
def test_slurms_signal_requeues_a_job_that_continues_and_scancel_ends_it(cluster: Cluster) -> None:
    settings = jobs.settings(cluster.folder, "long", train__max_steps=100000, train__log_every=1, data__workers=1)
    number = cluster.submit("long", settings=settings)
    cluster.wait_for_line("long", "  loss ")
    environments = [Path(f"/proc/{pid}/environ").read_text() for pid in cluster.ranks()]
    # Like --signal, this signals the steps and not the script.
    cluster.run("scancel", "--signal=USR1", number)
    cluster.wait_for_line("long", "Requeued, start 2")
    cluster.wait_for_line("long", "rank 0 of 2 on 2 nodes", times=2)
    resumed = jobs.until(lambda: bool(jobs.read_events(cluster.folder / "long", "resume")))
    restarts = cluster.job(number)["Restarts"]
    steps = cluster.output("long").count("  loss ")
    cluster.wait_for_line("long", "  loss ", times=steps + 1)
    cluster.run("scancel", number)
    ended = cluster.wait_for_end(number)
    gone = jobs.until(lambda: not cluster.ranks(), 30)

    assert environments
    assert not [environment for environment in environments if "hf_not_to_be_seen" in environment]
    assert resumed
    assert restarts == "1"
    assert ended["JobState"] == "CANCELLED"
    assert gone
    assert "start 3" not in cluster.output("long")
    assert cluster.job(number)["JobState"] == "CANCELLED", "it is not requeued"
