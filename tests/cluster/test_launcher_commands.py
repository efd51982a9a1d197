"""What a job on several hosts starts there, and how it ends, without a host."""

from __future__ import annotations

import json
import shlex
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from dtrain.cluster import launcher_commands
from dtrain.cluster.hostfile import Host
from dtrain.cluster.job_outcome import PartEnd, outcome
from dtrain.cluster.preflight import Look, check, master_of
from dtrain.cluster.ssh import command_on, is_here, python_with, why_not
from dtrain.commands.launch import main, plan_of, read_arguments, shown, with_looks
from dtrain.errors import ConfigError, TopologyError

NOW = 1_000_000.0


def _look(host: str, **found: Any) -> Look:
    basics = {
        "time": NOW,
        "host": host,
        "python": "3.11.7",
        "versions": {"torch": "2.13.0", "deepspeed": "0.19.8"},
        "code": "abc",
        "folder": True,
        "port": 40000,
        "port_is_free": True,
        "cores": 8,
        "cpu_limit": None,
        "addresses": {"node1": "10.0.0.1", "node2": "10.0.0.2"},
    }
    return Look(host, {**basics, **found}, sent=NOW - 0.2, received=NOW + 0.2)


def _plan(*hosts: Host, **changes: Any) -> launcher_commands.Plan:
    given: dict[str, Any] = {
        "hosts": hosts or (Host("node1", 2), Host("node2", 1)),
        "script": Path("/opt/dtrain/dtrain/main.py"),
        "arguments": ["run.name=a b", "data.path=$(touch x)"],
        "folder": Path("/work dir"),
        "note": None,
        "env": {"HF_HOME": "/hf", "HF_TOKEN": "hf_secret"},
        "address": "10.0.0.1",
        "port": 29500,
        "job_id": "id1",
        "name": "dtrain-1",
    }
    return launcher_commands.Plan(**{**given, **changes})


def _note(cause: str, code: int = 1, host: str = "node2", message: str = "it broke") -> Mapping[str, Any]:
    return {"code": code, "cause": cause, "rank": 1, "host": host, "message": message}


# ---------------------------------------------------------------- what travels


def test_only_listed_variables_travel_and_secrets_only_by_name() -> None:
    listed = {"HF_HOME": "/hf", "NCCL_DEBUG": "INFO", "TOKENIZERS_PARALLELISM": "x"}
    others = {
        "HF_TOKEN": "t",
        "TORCH_API_KEY": "k",
        "NCCL_PASS": "p",
        "DTRAIN_JOB_ID": "i",
        "PATH": "/bin",
        "MINE": "1",
    }
    assert launcher_commands.travelling({**listed, **others}, []) == listed
    assert launcher_commands.travelling({**listed, **others}, ["HF_TOKEN", "MINE"]) == {
        **listed,
        "HF_TOKEN": "t",
        "MINE": "1",
    }


@pytest.mark.parametrize("kind", [launcher_commands.torchrun, launcher_commands.deepspeed])
def test_secrets_are_not_shown_and_stand_in_no_command(kind: Any) -> None:
    job = kind(_plan())
    assert "hf_secret" not in shown(job, ["HF_TOKEN"])
    assert "id1" not in shown(job, ["HF_TOKEN"])
    assert all("hf_secret" not in " ".join(part.argv) for part in job.parts)
    assert all(part.env["HF_TOKEN"] == "hf_secret" for part in job.parts)


def test_mpirun_is_told_names_of_variables_not_their_values() -> None:
    job = launcher_commands.mpirun(_plan(), "localhost", Path("/tmp/hosts"))
    words = job.parts[0].argv
    assert [words[at + 1] for at, word in enumerate(words) if word == "-x"] == [
        "DTRAIN_JOB_ID",
        "HF_HOME",
        "HF_TOKEN",
        "MASTER_ADDR",
        "MASTER_PORT",
    ]
    assert "hf_secret" not in " ".join(words)


# ---------------------------------------------------------------- commands


def test_torchrun_is_told_its_place_on_each_host() -> None:
    one, two = launcher_commands.torchrun(_plan()).parts
    assert [one.host, two.host] == ["node1", "node2"]
    for place, (part, slots) in enumerate([(one, "2"), (two, "1")]):
        words = list(part.argv)
        options = {word: words[at + 1] for at, word in enumerate(words) if word.startswith("--")}
        assert options["--node-rank"] == str(place)
        assert options["--nproc-per-node"] == slots
        assert options["--master-addr"] == "10.0.0.1"
        assert part.env["DTRAIN_JOB_ID"] == "id1"
        assert "id1" not in words
        assert words[-3:] == ["/opt/dtrain/dtrain/main.py", "run.name=a b", "data.path=$(touch x)"]


def test_an_elastic_job_meets_by_c10d_and_goes_on_with_less() -> None:
    job = launcher_commands.torchrun(_plan(nodes=(1, 2), max_restarts=3))
    words = list(job.parts[1].argv)
    assert job.least == 1
    assert words[words.index("--nnodes") + 1] == "1:2"
    assert words[words.index("--max-restarts") + 1] == "3"
    assert words[words.index("--local-addr") + 1] == "node2"
    assert "--node-rank" not in words


def test_slots_that_are_left_out_are_left_out_by_every_launcher() -> None:
    plan = _plan(Host("node1", 2, (0, 2)), Host("node2", 1))
    assert launcher_commands.torchrun(plan).parts[0].env["CUDA_VISIBLE_DEVICES"] == "0,2"
    world = next(word for word in launcher_commands.deepspeed(plan).parts[1].argv if word.startswith("--world_info"))
    import base64

    assert json.loads(base64.urlsafe_b64decode(world.partition("=")[2])) == {"node1": [0, 2], "node2": [0]}


def test_nothing_reaches_a_far_shell_unquoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrain.cluster.ssh.is_here", lambda host: False)
    words = command_on("node1", ["/a b/python", "$(touch x)", "a;b", "'"])
    assert words[:2] == ["ssh", "-T"]
    assert words[-2] == "node1"
    assert shlex.split(words[-1]) == ["exec", "/a b/python", "$(touch x)", "a;b", "'"]
    assert not any("StrictHostKeyChecking" in word or "UserKnownHostsFile" in word for word in words)


def test_this_machine_needs_no_ssh() -> None:
    assert is_here("localhost")
    assert is_here("127.0.0.1")
    assert not is_here("192.0.2.1")
    assert not is_here("no-such-host.invalid")
    assert command_on("localhost", ["python", "-"]) == ["python", "-"]


# ---------------------------------------------------------------- the look before


def test_hosts_that_are_alike_pass_without_a_word() -> None:
    assert check([_look("node1"), _look("node2")], folder=Path("/runs")) == []


@pytest.mark.parametrize(
    ("found", "told"),
    [
        ({"versions": {"torch": "2.12.0", "deepspeed": "0.19.8"}}, "node2: torch 2.12.0, but 2.13.0 on node1"),
        ({"versions": {"torch": "2.13.0"}}, "node2: deepspeed none, but 0.19.8 on node1"),
        ({"versions": {}}, "node2: .* has no torch"),
        ({"python": "3.12.1"}, r"node2: python 3\.12\.1, but 3\.11\.7 on node1"),
        ({"code": "xyz"}, "node2: dtrain's code is another than on node1"),
        ({"code": None}, "node2: dtrain is not at "),
        ({"folder": False}, "node2: the folder /runs, where the job is to run, is not there"),
    ],
)
def test_a_host_that_would_compute_otherwise_is_named_before_anything_starts(found: Any, told: str) -> None:
    with pytest.raises(TopologyError, match=rf"Nothing was started:\n{told}"):
        check([_look("node1"), _look("node2", **found)], folder=Path("/runs"))


def test_two_names_of_one_machine_are_refused() -> None:
    looks = [_look("node1", machine="boot one"), _look("10.0.0.1", machine="boot one"), _look("node3")]
    with pytest.raises(TopologyError, match=r"10\.0\.0\.1: the same machine as node1"):
        check(looks, folder=Path("/runs"))


def test_a_far_python_finds_what_a_job_there_would() -> None:
    import sys

    assert python_with({"HF_HOME": "/hf"}) == [sys.executable]
    assert python_with({"PYTHONPATH": "/a b", "HF_TOKEN": "t"}) == ["env", "PYTHONPATH=/a b", sys.executable]


def test_all_hosts_that_cannot_take_part_are_listed() -> None:
    looks = [Look("node1", problem="node1: off"), _look("node2", folder=False), Look("node3", problem="node3: off")]
    with pytest.raises(TopologyError) as error:
        check(looks, folder=Path("/runs"))
    assert [line.split(":")[0] for line in str(error.value).splitlines()[1:]] == ["node1", "node3", "node2"]


@pytest.mark.parametrize(("ahead", "told"), [(3600.0, "3600 s ahead"), (-61.0, "61 s behind")])
def test_a_clock_that_is_far_off_is_refused(ahead: float, told: str) -> None:
    with pytest.raises(TopologyError, match=f"node2: its clock is {told}"):
        check([_look("node1"), _look("node2", time=NOW + ahead)], folder=Path("/runs"))


@pytest.mark.parametrize(("ahead", "told"), [(59.0, "59 s ahead"), (-5.0, "5 s behind"), (1.0, None)])
def test_a_clock_that_is_off_is_a_warning(ahead: float, told: str | None) -> None:
    warnings = check([_look("node1"), _look("node2", time=NOW + ahead)], folder=Path("/runs"))
    assert [told in line for line in warnings if told] == [True] * (told is not None)
    assert len(warnings) == (told is not None)


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("root@node2: Permission denied (publickey).", "does not take your key. Put it there: ssh-copy-id node2"),
        ("No ED25519 host key is known\nHost key verification failed.", "not known here. Log in once"),
        ("ssh: Could not resolve hostname node2: Name or service not known", "does not resolve here"),
        ("ssh: connect to host node2 port 22: Connection refused", "no sshd answers"),
        ("ssh: connect to host node2 port 22: Connection timed out", "does not answer. Is it on"),
        ("kex_exchange_identification: read: Connection reset", "ssh failed: kex_exchange_identification"),
    ],
)
def test_what_ssh_says_is_answered_with_what_mends_it(said: str, told: str) -> None:
    assert told in why_not("node2", 255, said)
    assert why_not("node2", 255, said).startswith("node2: ")


def test_ranks_meet_at_the_address_that_the_others_see() -> None:
    seen_there = _look("node1", addresses={"node1": "127.0.1.1", "node2": "10.0.0.2"})
    assert master_of([seen_there, _look("node2")]) == ("10.0.0.1", 40000)
    assert master_of([_look("node1")])[0] == "127.0.0.1"
    with pytest.raises(TopologyError, match="node2: node1, where the ranks meet, resolves to 127"):
        master_of([_look("node1"), _look("node2", addresses={"node1": "127.0.0.1"})])
    with pytest.raises(TopologyError, match="node2: node1, where the ranks meet, does not resolve there"):
        master_of([_look("node1"), _look("node2", addresses={})])


def test_every_host_has_as_many_threads_a_rank() -> None:
    looks = [_look("node1", cores=16), _look("node2", cores=3)]
    plan = _plan(Host("node1", 2), Host("node2", 1))
    assert with_looks(plan, looks, port=None).env["OMP_NUM_THREADS"] == "3"
    limited = [_look("node1", cores=16), _look("node2", cores=64, cpu_limit=2.5)]
    assert with_looks(plan, limited, port=None).env["OMP_NUM_THREADS"] == "2"
    mine = with_looks(_plan(env={"OMP_NUM_THREADS": "5"}), looks, port=None)
    assert mine.env["OMP_NUM_THREADS"] == "5"
    with pytest.raises(TopologyError, match="node1: port 29500 is taken"):
        with_looks(plan, [_look("node1", port_is_free=False), looks[1]], port=29500)


# ---------------------------------------------------------------- the end


def test_a_job_has_ended_well_only_if_every_part_has() -> None:
    assert outcome([PartEnd("node1", 0), PartEnd("node2", 0, _note("done", 0))], "torchrun") == (0, "", None)
    assert outcome([PartEnd("node1", 0), PartEnd("node2", 0, lost="node2: gone")], "torchrun") == (
        4,
        "node2: gone",
        None,
    )
    assert outcome([PartEnd("node1", 0), PartEnd("node2", 3)], "torchrun").code == 3
    # deepspeed's launcher gives 0 where a signal ended it
    assert outcome([PartEnd("node1", 0, _note("DataError", 3))], "deepspeed").code == 3


def test_an_elastic_job_has_ended_well_if_those_who_were_left_have() -> None:
    lost = PartEnd("node2", 255, lost="node2: it does not answer")
    assert outcome([lost, PartEnd("node1", 0)], "torchrun", is_elastic=True).code == 0
    assert outcome([PartEnd("node1", 0), lost], "torchrun", is_elastic=True).code == 0
    assert outcome([PartEnd("node1", 1), lost], "torchrun", is_elastic=True).code == 4
    assert outcome([lost, PartEnd("node1", 0)], "torchrun").code == 4


@pytest.mark.parametrize(
    ("ends", "code", "told"),
    [
        # an exception on node2, whose news node1 has only from afar
        (
            [PartEnd("node1", 1, _note("TopologyError", 4)), PartEnd("node2", 1, _note("ValueError", 1))],
            1,
            "rank 1 on node2: it broke",
        ),
        # torchrun makes a 1 of everything
        ([PartEnd("node1", 1, _note("DataError", 3)), PartEnd("node2", 1)], 3, "rank 1 on node2: it broke"),
        # the launcher of node2 was killed: its own host knows best
        (
            [PartEnd("node2", -9), PartEnd("node1", 1, _note("TopologyError", 4))],
            4,
            "node2: torchrun was killed by SIGKILL",
        ),
        # its ranks were told to end, and wrote that down
        ([PartEnd("node2", -9, _note("Interrupted", 1))], 4, "node2: torchrun was killed by SIGKILL"),
        ([PartEnd("node1", 4, _note("TopologyError", 4, message="node2 is gone"))], 4, "node2 is gone"),
        # a rank was killed: node2's launcher says no more than 1
        ([PartEnd("node2", 1), PartEnd("node1", 1, _note("TopologyError", 4))], 4, "rank 1 on node2: it broke"),
        # pre-empted, agreed by all
        ([PartEnd("node2", 1), PartEnd("node1", 1, _note("Preempted", 75))], 75, "rank 1 on node2: it broke"),
        ([PartEnd("node1", 0), PartEnd("node2", 127, problem="No such file")], 4, "node2: torchrun cannot be started"),
        ([PartEnd("node2", 255, lost="node2: it does not answer")], 4, "node2: it does not answer"),
        ([PartEnd("node1", 2), PartEnd("node2", 1, was_killed=True)], 2, "node1: torchrun ended with 2"),
        ([PartEnd("node2", 1, was_killed=True)], 1, "node2: torchrun ended with 1"),
        ([PartEnd("node1", 1, _note("ValueError", 1, message="a\nb"))], 1, "rank 1 on node2: a"),
        # it needed long to end, but it knows more
        (
            [
                PartEnd("node1", 1, _note("TopologyError", 4)),
                PartEnd("node2", -9, _note("ValueError"), was_killed=True),
            ],
            1,
            "rank 1 on node2: it broke",
        ),
        (
            [PartEnd("node1", 1, _note("TopologyError", 4)), PartEnd("node2", 1, _note("ValueError"), was_killed=True)],
            1,
            "rank 1 on node2: it broke",
        ),
        (
            [PartEnd("node1", 1, _note("DataError", 3)), PartEnd("node2", 1, _note("Interrupted"), was_killed=True)],
            3,
            "rank 1 on node2: it broke",
        ),
    ],
)
def test_the_part_that_was_closest_speaks_for_the_job(ends: list[PartEnd], code: int, told: str) -> None:
    found = outcome(ends, "torchrun")
    assert found.code == code
    assert found.message.startswith(told)


def test_a_signal_that_was_asked_for_is_no_accident() -> None:
    before_ranks = outcome([PartEnd("node1", -15)], "deepspeed", asked=15)
    assert (before_ranks.code, before_ranks.asked) == (143, 15)
    assert "as you asked" in before_ranks.message
    saved = outcome([PartEnd("node1", -15, _note("Preempted", 75))], "deepspeed", asked=15)
    assert (saved.code, saved.message) == (75, "rank 1 on node2: it broke")
    assert outcome([PartEnd("node1", -9)], "deepspeed", asked=15).code == 4


# ---------------------------------------------------------------- the command line


def _hostfile(folder: Path) -> str:
    (folder / "hosts").write_text("node1 slots=2\nnode2 slots=1\n")
    return str(folder / "hosts")


def test_what_is_not_known_here_is_dtrains() -> None:
    given = read_arguments(
        ["torchrun", "hosts", "--config", "c.yaml", "--max-restarts", "2", "a.b=1", "--", "--dry-run"]
    )
    assert given.rest == ["--config", "c.yaml", "a.b=1", "--dry-run"]
    assert not given.dry_run
    assert given.max_restarts == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["torchrun"], "the following arguments are required: hostfile"),
        (["torchrun", "HOSTS", "train.max_stepss=1"], "Did you mean train.max_steps"),
        (["torchrun", "HOSTS", "--master-port", "0"], "is not a port"),
        (["torchrun", "HOSTS", "--nnodes", "2"], "least and the largest number"),
        (["torchrun", "HOSTS", "--nnodes", "2:3"], "such as 1:2"),
        (["torchrun", "HOSTS", "--nnodes", "2:1"], "from 1 to the 2 that take part"),
        (["torchrun", "--config", "configs/cola.yaml"], "the hostfile is missing: configs/cola.yaml stands where"),
        (
            ["torchrun", "HOSTS", "--dryrun"],
            "--dryrun is not an option. Did you mean --dry-run? See launch/torchrun.sh",
        ),
        (["mpirun", "HOSTS", "--master_port=5"], "--master_port is not an option. Did you mean --master-port?"),
        (["deepspeed", "HOSTS", "--max-restarts", "1"], "are torchrun's"),
        (["torchrun", "HOSTS", "--export", "NOT_THERE"], "there is no such variable"),
        (["torchrun", "HOSTS", "--include", "node9"], "no host 'node9'"),
        (["torchrun", "HOSTS-", "--dry-run"], "cannot be read"),
        (["mpirun", "HOSTS", "--include", "node1:1", "--dry-run"], "of node1, name all or none"),
    ],
)
def test_a_mistake_ends_it_with_two_before_any_host_is_asked(
    words: list[str], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [word.replace("HOSTS", _hostfile(tmp_path)) for word in words]
    assert main(words, {}) == 2
    said = capsys.readouterr().out
    assert told in said
    assert said.count("error:") == 1


def test_a_dry_run_prints_the_commands_and_asks_nobody(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dtrain.commands.launch.look_at", lambda *a, **k: pytest.fail("a host was asked"))
    begin = time.monotonic()
    assert main(["torchrun", _hostfile(tmp_path), "--dry-run", "train.max_steps=3"], {"HF_TOKEN": "hf_x"}) == 0
    one, two = capsys.readouterr().out.splitlines()
    assert one.startswith("node1$ cd ")
    assert "--node-rank 1" in two
    assert two.endswith("dtrain/main.py train.max_steps=3")
    assert time.monotonic() - begin < 20


def test_what_is_exported_is_never_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["torchrun", _hostfile(tmp_path), "--dry-run", "--export", "MINE"]
    assert main(words, {"MINE": "private", "HF_HOME": "/hf"}) == 0
    said = capsys.readouterr().out
    assert said.count("MINE=...") == 2
    assert said.count("HF_HOME=/hf") == 2
    assert "private" not in said


def test_a_plan_names_where_the_end_is_written(tmp_path: Path) -> None:
    given = read_arguments(["torchrun", _hostfile(tmp_path), f"run.output_dir={tmp_path}/out", "run.name=a"])
    assert plan_of(given, {}).note == tmp_path / "out" / "a" / "exit.json"
    other = read_arguments(["torchrun", _hostfile(tmp_path), "run.name=a/../b"])
    with pytest.raises(ConfigError):
        plan_of(other, {})


def test_mpirun_is_told_to_stop_in_a_way_that_leaves_time() -> None:
    job = launcher_commands.mpirun(_plan(), "localhost", Path("/tmp/hosts"))
    assert job.signals is not None
    assert job.signals[signal.SIGTERM] == signal.SIGUSR1
    assert job.launcher_takes == {signal.SIGUSR1}
