"""The commands of a job on several hosts, the checks before it, and its outcome, without a host."""

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
from dtrain.cluster.job_outcome import HostResult, combine_results
from dtrain.cluster.preflight import HostProbe, check_hosts, choose_master, host_addresses
from dtrain.cluster.rounds import RoundHost
from dtrain.cluster.ssh import command_on, explain_exit, is_local, python_command
from dtrain.commands.launch import apply_probes, build_plan, format_commands, main, read_arguments
from dtrain.errors import ConfigError, TopologyError

NOW = 1_000_000.0


def _probe(host: str, **facts: Any) -> HostProbe:
    basic_facts = {
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
    return HostProbe(host, {**basic_facts, **facts}, sent=NOW - 0.2, received=NOW + 0.2)


def _plan(*hosts: Host, **changes: Any) -> launcher_commands.LaunchPlan:
    fields: dict[str, Any] = {
        "hosts": hosts or (Host("node1", 2), Host("node2", 1)),
        "script": Path("/opt/dtrain/dtrain/main.py"),
        "arguments": ["run.name=a b", "data.path=$(touch x)"],
        "folder": Path("/work dir"),
        "exit_file": None,
        "env": {"HF_HOME": "/hf", "HF_TOKEN": "hf_secret"},
        "address": "10.0.0.1",
        "port": 29500,
        "job_id": "id1",
        "name": "dtrain-1",
    }
    return launcher_commands.LaunchPlan(**{**fields, **changes})


def _record(cause: str, code: int = 1, host: str = "node2", message: str = "it broke") -> Mapping[str, Any]:
    return {"code": code, "cause": cause, "rank": 1, "host": host, "message": message}


# ---------------------------------------------------------------- environment variables


def test_only_listed_variables_are_forwarded_and_secrets_only_by_name() -> None:
    listed = {"HF_HOME": "/hf", "CUDA_HOME": "/cuda", "NCCL_DEBUG": "INFO", "TOKENIZERS_PARALLELISM": "x"}
    others = {
        "HF_TOKEN": "t",
        "TORCH_API_KEY": "k",
        "NCCL_PASS": "p",
        "DTRAIN_JOB_ID": "i",
        "PATH": "/bin",
        "MINE": "1",
    }
    assert launcher_commands.forwarded_env({**listed, **others}, []) == listed
    assert launcher_commands.forwarded_env({**listed, **others}, ["HF_TOKEN", "MINE"]) == {
        **listed,
        "HF_TOKEN": "t",
        "MINE": "1",
    }


@pytest.mark.parametrize("kind", [launcher_commands.dtrain, launcher_commands.torchrun, launcher_commands.deepspeed])
def test_secrets_are_not_printed_and_are_in_no_command_line(kind: Any) -> None:
    job = kind(_plan())
    assert "hf_secret" not in format_commands(job, ["HF_TOKEN"])
    assert "id1" not in format_commands(job, ["HF_TOKEN"])
    assert all("hf_secret" not in " ".join(command.argv) for command in job.commands)
    assert all(command.env["HF_TOKEN"] == "hf_secret" for command in job.commands)


def test_mpirun_gets_the_names_of_variables_and_not_their_values() -> None:
    job = launcher_commands.mpirun(_plan(), "localhost", Path("/tmp/hosts"))
    words = job.commands[0].argv
    assert [words[at + 1] for at, word in enumerate(words) if word == "-x"] == [
        "DTRAIN_JOB_ID",
        "HF_HOME",
        "HF_TOKEN",
        "MASTER_ADDR",
        "MASTER_PORT",
    ]
    assert "hf_secret" not in " ".join(words)


# ---------------------------------------------------------------- commands


def test_dtrains_launcher_waits_for_orders_on_several_hosts_and_restarts_alone_on_one() -> None:
    hosts = Host("node1", 2), Host("node2", 1), Host("node3", 2, is_spare=True)
    job = launcher_commands.dtrain(_plan(*hosts, max_restarts=3, addresses=["10.0.0.1", "10.0.0.2", "10.0.0.3"]))
    assert job.commands[0].argv[1:] == [
        "/opt/dtrain/dtrain/main.py",
        "--ranks",
        "2",
        "run.name=a b",
        "data.path=$(touch x)",
    ]
    assert [command.argv[2:4] for command in job.commands] == [["--ranks", "2"], ["--ranks", "1"], ["--ranks", "2"]]
    assert job.rounds is not None
    assert (job.rounds.max_restarts, job.rounds.port) == (3, 0)
    assert job.rounds.hosts[2] == RoundHost("node3", "10.0.0.3", 2, is_spare=True)
    fixed = launcher_commands.dtrain(_plan(fixed_port=5000)).rounds
    assert fixed is not None
    assert fixed.port == 5000

    alone = launcher_commands.dtrain(_plan(Host("node1", 4), max_restarts=3))
    assert alone.commands[0].argv[2:6] == ["--ranks", "4", "--max-restarts", "3"]
    assert alone.rounds is None


def test_torchrun_gets_its_node_rank_on_each_host() -> None:
    one, two = launcher_commands.torchrun(_plan()).commands
    assert [one.host, two.host] == ["node1", "node2"]
    for node_rank, (command, slots) in enumerate([(one, "2"), (two, "1")]):
        words = list(command.argv)
        options = {word: words[at + 1] for at, word in enumerate(words) if word.startswith("--")}
        assert options["--node-rank"] == str(node_rank)
        assert options["--nproc-per-node"] == slots
        assert options["--master-addr"] == "10.0.0.1"
        assert command.env["DTRAIN_JOB_ID"] == "id1"
        assert "id1" not in words
        assert words[-3:] == ["/opt/dtrain/dtrain/main.py", "run.name=a b", "data.path=$(touch x)"]


def test_an_elastic_job_uses_c10d_and_continues_with_fewer_hosts() -> None:
    job = launcher_commands.torchrun(_plan(host_range=(1, 2), max_restarts=3))
    words = list(job.commands[1].argv)
    assert job.min_hosts == 1
    assert words[words.index("--nnodes") + 1] == "1:2"
    assert words[words.index("--max-restarts") + 1] == "3"
    assert words[words.index("--local-addr") + 1] == "node2"
    assert "--node-rank" not in words


def test_every_launcher_uses_only_the_selected_slots() -> None:
    plan = _plan(Host("node1", 2, (0, 2)), Host("node2", 1))
    assert launcher_commands.torchrun(plan).commands[0].env["CUDA_VISIBLE_DEVICES"] == "0,2"
    world = next(word for word in launcher_commands.deepspeed(plan).commands[1].argv if word.startswith("--world_info"))
    import base64

    assert json.loads(base64.urlsafe_b64decode(world.partition("=")[2])) == {"node1": [0, 2], "node2": [0]}


def test_the_remote_shell_gets_every_word_quoted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dtrain.cluster.ssh.is_local", lambda host: False)
    words = command_on("node1", ["/a b/python", "$(touch x)", "a;b", "'"])
    assert words[:2] == ["ssh", "-T"]
    assert words[-2] == "node1"
    assert shlex.split(words[-1]) == ["exec", "/a b/python", "$(touch x)", "a;b", "'"]
    assert not any("StrictHostKeyChecking" in word or "UserKnownHostsFile" in word for word in words)


def test_this_machine_needs_no_ssh() -> None:
    assert is_local("localhost")
    assert is_local("127.0.0.1")
    assert not is_local("192.0.2.1")
    assert not is_local("no-such-host.invalid")
    assert command_on("localhost", ["python", "-"]) == ["python", "-"]


# ---------------------------------------------------------------- the checks before the start


def test_equal_hosts_pass_without_warnings() -> None:
    assert check_hosts([_probe("node1"), _probe("node2")], folder=Path("/runs")) == []


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"versions": {"torch": "2.12.0", "deepspeed": "0.19.8"}}, "node2: torch 2.12.0, but 2.13.0 on node1"),
        ({"versions": {"torch": "2.13.0"}}, "node2: deepspeed none, but 0.19.8 on node1"),
        ({"versions": {}}, "node2: .* has no torch"),
        ({"python": "3.12.1"}, r"node2: python 3\.12\.1, but 3\.11\.7 on node1"),
        ({"code": "xyz"}, "node2: dtrain's code differs from node1"),
        ({"code": None}, "node2: dtrain is not at "),
        ({"folder": False}, "node2: the job's working folder /runs does not exist there"),
    ],
)
def test_a_host_that_may_compute_other_results_is_reported_before_anything_starts(facts: Any, message: str) -> None:
    with pytest.raises(TopologyError, match=rf"Nothing was started:\n{message}"):
        check_hosts([_probe("node1"), _probe("node2", **facts)], folder=Path("/runs"))


def test_two_names_of_one_machine_are_refused() -> None:
    probes = [_probe("node1", machine="boot one"), _probe("10.0.0.1", machine="boot one"), _probe("node3")]
    with pytest.raises(TopologyError, match=r"10\.0\.0\.1: this is the same machine as node1"):
        check_hosts(probes, folder=Path("/runs"))


def test_the_remote_python_has_the_search_paths_of_a_job() -> None:
    import sys

    assert python_command({"HF_HOME": "/hf"}) == [sys.executable]
    assert python_command({"PYTHONPATH": "/a b", "HF_TOKEN": "t"}) == ["env", "PYTHONPATH=/a b", sys.executable]


def test_all_hosts_that_cannot_take_part_are_listed() -> None:
    probes = [
        HostProbe("node1", problem="node1: off"),
        _probe("node2", folder=False),
        HostProbe("node3", problem="node3: off"),
    ]
    with pytest.raises(TopologyError) as error:
        check_hosts(probes, folder=Path("/runs"))
    assert [line.split(":")[0] for line in str(error.value).splitlines()[1:]] == ["node1", "node3", "node2"]


@pytest.mark.parametrize(("ahead", "message"), [(3600.0, "3600 s ahead"), (-61.0, "61 s behind")])
def test_a_clock_that_is_far_off_is_refused(ahead: float, message: str) -> None:
    with pytest.raises(TopologyError, match=f"node2: its clock is {message}"):
        check_hosts([_probe("node1"), _probe("node2", time=NOW + ahead)], folder=Path("/runs"))


@pytest.mark.parametrize(("ahead", "message"), [(59.0, "59 s ahead"), (-5.0, "5 s behind"), (1.0, None)])
def test_a_clock_that_is_off_is_a_warning(ahead: float, message: str | None) -> None:
    warnings = check_hosts([_probe("node1"), _probe("node2", time=NOW + ahead)], folder=Path("/runs"))
    assert [message in line for line in warnings if message] == [True] * (message is not None)
    assert len(warnings) == (message is not None)


@pytest.mark.parametrize(
    ("stderr", "message"),
    [
        ("root@node2: Permission denied (publickey).", "rejects your key. Copy the key to the host: ssh-copy-id node2"),
        ("No ED25519 host key is known\nHost key verification failed.", "not known here. Log in once"),
        ("ssh: Could not resolve hostname node2: Name or service not known", "does not resolve here"),
        ("ssh: connect to host node2 port 22: Connection refused", "no sshd answers"),
        ("ssh: connect to host node2 port 22: Connection timed out", "does not answer. Is it on"),
        ("kex_exchange_identification: read: Connection reset", "ssh failed: kex_exchange_identification"),
    ],
)
def test_known_messages_of_ssh_get_an_explanation_with_a_fix(stderr: str, message: str) -> None:
    assert message in explain_exit("node2", 255, stderr)
    assert explain_exit("node2", 255, stderr).startswith("node2: ")


def test_the_master_has_the_address_that_the_others_see() -> None:
    resolves_locally = _probe("node1", addresses={"node1": "127.0.1.1", "node2": "10.0.0.2"})
    assert choose_master([resolves_locally, _probe("node2")]) == ("10.0.0.1", 40000)
    assert choose_master([_probe("node1")])[0] == "127.0.0.1"
    with pytest.raises(TopologyError, match="node2: the master's name node1 resolves to 127"):
        choose_master([_probe("node1"), _probe("node2", addresses={"node1": "127.0.0.1"})])
    with pytest.raises(TopologyError, match="node2: the master's name node1 does not resolve there"):
        choose_master([_probe("node1"), _probe("node2", addresses={})])


def test_ranks_on_all_hosts_have_the_same_number_of_threads() -> None:
    probes = [_probe("node1", cores=16), _probe("node2", cores=3)]
    plan = _plan(Host("node1", 2), Host("node2", 1))
    assert apply_probes(plan, probes, port=None).env["OMP_NUM_THREADS"] == "3"
    limited = [_probe("node1", cores=16), _probe("node2", cores=64, cpu_limit=2.5)]
    assert apply_probes(plan, limited, port=None).env["OMP_NUM_THREADS"] == "2"
    mine = apply_probes(_plan(env={"OMP_NUM_THREADS": "5"}), probes, port=None)
    assert mine.env["OMP_NUM_THREADS"] == "5"
    with pytest.raises(TopologyError, match="node1: port 29500 is in use"):
        apply_probes(plan, [_probe("node1", port_is_free=False), probes[1]], port=29500)


# ---------------------------------------------------------------- the outcome


def test_a_job_succeeds_only_if_every_host_does() -> None:
    assert combine_results([HostResult("node1", 0), HostResult("node2", 0, _record("done", 0))], "torchrun") == (
        0,
        "",
        None,
    )
    assert combine_results([HostResult("node1", 0), HostResult("node2", 0, lost="node2: gone")], "torchrun") == (
        4,
        "node2: gone",
        None,
    )
    assert combine_results([HostResult("node1", 0), HostResult("node2", 3)], "torchrun").code == 3
    # deepspeed's launcher gives 0 where a signal ended it
    assert combine_results([HostResult("node1", 0, _record("DataError", 3))], "deepspeed").code == 3


def test_an_elastic_job_succeeds_if_a_remaining_host_does() -> None:
    lost = HostResult("node2", 255, lost="node2: it does not answer")
    assert combine_results([lost, HostResult("node1", 0)], "torchrun", is_elastic=True).code == 0
    assert combine_results([HostResult("node1", 0), lost], "torchrun", is_elastic=True).code == 0
    assert combine_results([HostResult("node1", 1), lost], "torchrun", is_elastic=True).code == 4
    assert combine_results([lost, HostResult("node1", 0)], "torchrun").code == 4


@pytest.mark.parametrize(
    ("results", "code", "message"),
    [
        # an exception on node2; node1 only knows that it lost a peer
        (
            [HostResult("node1", 1, _record("TopologyError", 4)), HostResult("node2", 1, _record("ValueError", 1))],
            1,
            "rank 1 on node2: it broke",
        ),
        # torchrun replaces every code with 1
        ([HostResult("node1", 1, _record("DataError", 3)), HostResult("node2", 1)], 3, "rank 1 on node2: it broke"),
        # the launcher of node2 was killed: the host itself knows the cause
        (
            [HostResult("node2", -9), HostResult("node1", 1, _record("TopologyError", 4))],
            4,
            "node2: torchrun was killed by SIGKILL",
        ),
        # its ranks were told to stop, and recorded that
        ([HostResult("node2", -9, _record("Interrupted", 1))], 4, "node2: torchrun was killed by SIGKILL"),
        # they saved the run: exit.json says 75, and so does the script
        (
            [HostResult("node2", -9, _record("Preempted", 75)), HostResult("node1", 1, _record("Preempted", 75))],
            75,
            "rank 1 on node2: it broke",
        ),
        ([HostResult("node1", 4, _record("TopologyError", 4, message="node2 is gone"))], 4, "node2 is gone"),
        # a rank was killed: node2's launcher reports only 1
        ([HostResult("node2", 1), HostResult("node1", 1, _record("TopologyError", 4))], 4, "rank 1 on node2: it broke"),
        # preempted: all ranks agreed to stop
        ([HostResult("node2", 1), HostResult("node1", 1, _record("Preempted", 75))], 75, "rank 1 on node2: it broke"),
        ([HostResult("node1", 0), HostResult("node2", 127, problem="No such file")], 4, "node2: cannot start torchrun"),
        ([HostResult("node2", 255, lost="node2: it does not answer")], 4, "node2: it does not answer"),
        ([HostResult("node1", 2), HostResult("node2", 1, was_killed=True)], 2, "node1: torchrun exited with code 2"),
        ([HostResult("node2", 1, was_killed=True)], 1, "node2: torchrun exited with code 1"),
        ([HostResult("node1", 1, _record("ValueError", 1, message="a\nb"))], 1, "rank 1 on node2: a"),
        # it ended late, but it knows the cause
        (
            [
                HostResult("node1", 1, _record("TopologyError", 4)),
                HostResult("node2", -9, _record("ValueError"), was_killed=True),
            ],
            1,
            "rank 1 on node2: it broke",
        ),
        (
            [
                HostResult("node1", 1, _record("TopologyError", 4)),
                HostResult("node2", 1, _record("ValueError"), was_killed=True),
            ],
            1,
            "rank 1 on node2: it broke",
        ),
        (
            [
                HostResult("node1", 1, _record("DataError", 3)),
                HostResult("node2", 1, _record("Interrupted"), was_killed=True),
            ],
            3,
            "rank 1 on node2: it broke",
        ),
    ],
)
def test_the_host_closest_to_the_cause_determines_the_outcome(
    results: list[HostResult], code: int, message: str
) -> None:
    outcome = combine_results(results, "torchrun")
    assert outcome.code == code
    assert outcome.message.startswith(message)


def test_a_requested_stop_is_not_a_failure_of_the_launcher() -> None:
    before_ranks = combine_results([HostResult("node1", -15)], "deepspeed", stop_signal=15)
    assert (before_ranks.code, before_ranks.stop_signal) == (143, 15)
    assert "as requested" in before_ranks.message
    saved = combine_results([HostResult("node1", -15, _record("Preempted", 75))], "deepspeed", stop_signal=15)
    assert (saved.code, saved.message) == (75, "rank 1 on node2: it broke")
    assert combine_results([HostResult("node1", -9)], "deepspeed", stop_signal=15).code == 4


# ---------------------------------------------------------------- the command line


SPARE = "node3 slots=2 spare\n"


def _hostfile(folder: Path, first: str = "") -> str:
    (folder / "hosts").write_text(f"{first}node1 slots=2\nnode2 slots=1\n")
    return str(folder / "hosts")


def test_unknown_arguments_are_passed_to_dtrain() -> None:
    options = read_arguments(
        ["torchrun", "hosts", "--config", "c.yaml", "--max-restarts", "2", "a.b=1", "--", "--dry-run"]
    )
    assert options.rest == ["--config", "c.yaml", "a.b=1", "--dry-run"]
    assert not options.dry_run
    assert options.max_restarts == 2


def test_a_spare_host_comes_last_gives_one_restart_and_is_left_out_by_other_launchers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = build_plan(read_arguments(["dtrain", _hostfile(tmp_path, SPARE)]), {})
    assert [(host.name, host.is_spare) for host in plan.hosts] == [("node1", False), ("node2", False), ("node3", True)]
    assert plan.max_restarts == 1
    plan = build_plan(read_arguments(["torchrun", _hostfile(tmp_path, SPARE), "--nnodes", "1:2"]), {})
    assert [host.name for host in plan.hosts] == ["node1", "node2"]
    assert plan.max_restarts == 0


def test_every_host_has_the_address_that_another_one_sees() -> None:
    seen = {"node1": "10.0.0.1", "node2": "127.0.1.1", "node3": "10.0.0.3"}
    probes = [_probe(name, addresses=seen) for name in seen]
    assert host_addresses(probes) == ["10.0.0.1", "node2", "10.0.0.3"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["torchrun"], "the following arguments are required: hostfile"),
        (["torchrun", "HOSTS", "train.max_stepss=1"], "Did you mean train.max_steps"),
        (["torchrun", "HOSTS", "--master-port", "0"], "is not a port"),
        (["torchrun", "HOSTS", "--nnodes", "2"], "is not MIN:MAX"),
        (["torchrun", "HOSTS", "--nnodes", "2:3"], "Example: 1:2"),
        (["torchrun", "HOSTS", "--nnodes", "2:1"], "1 <= MIN <= MAX <= 2"),
        (
            ["torchrun", "--config", "configs/cola.yaml"],
            "the hostfile is missing: the first argument is configs/cola.yaml",
        ),
        (
            ["torchrun", "HOSTS", "--dryrun"],
            "--dryrun is not an option. Did you mean --dry-run? See launch/torchrun.sh",
        ),
        (["mpirun", "HOSTS", "--master_port=5"], "--master_port is not an option. Did you mean --master-port?"),
        (["deepspeed", "HOSTS", "--max-restarts", "1"], "torchrun.sh: deepspeed does not restart a job."),
        (["dtrain", "HOSTS", "--max-restarts", "-1"], "--max-restarts -1 is not a number of restarts"),
        (["dtrain", "HOSTS", "--nnodes", "1:2"], "dtrain.sh goes on with all hosts that are left: use --max-restarts"),
        (["dtrain", "HOSTS", "--include", "node3"], "all selected hosts are spare"),
        (["dtrain", "HOSTS", "--max-restarts", "0"], "node3 is a spare host, which --max-restarts 0 never uses"),
        (["dtrain", "HOSTS", "--ranks", "4"], "--ranks is for one machine without a hostfile."),
        (["torchrun", "HOSTS", "--export", "NOT_THERE"], "this variable is not set here"),
        (["torchrun", "HOSTS", "--include", "node9"], "no host 'node9'"),
        (["torchrun", "HOSTS-", "--dry-run"], "cannot read the hostfile"),
        (["mpirun", "HOSTS", "--include", "node1:1", "--dry-run"], "include or exclude all slots of node1"),
    ],
)
def test_a_wrong_argument_exits_with_2_before_any_host_is_probed(
    words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spare = SPARE if "node3" in message or "spare" in message else ""
    words = [word.replace("HOSTS", _hostfile(tmp_path, spare)) for word in words]
    assert main(words, {}) == 2
    printed = capsys.readouterr().out
    assert message in printed
    assert printed.count("error:") == 1


def test_a_dry_run_prints_the_commands_and_probes_no_host(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dtrain.commands.launch.probe_hosts", lambda *a, **k: pytest.fail("a host was probed"))
    begin = time.monotonic()
    assert main(["torchrun", _hostfile(tmp_path), "--dry-run", "train.max_steps=3"], {"HF_TOKEN": "hf_x"}) == 0
    one, two = capsys.readouterr().out.splitlines()
    assert one.startswith("node1$ cd ")
    assert "--node-rank 1" in two
    assert two.endswith("dtrain/main.py train.max_steps=3")
    assert time.monotonic() - begin < 20
    assert main(["dtrain", _hostfile(tmp_path, SPARE), "--dry-run"], {}) == 0
    *commands, warning = capsys.readouterr().out.splitlines()
    assert [command.partition("$")[0] for command in commands] == ["node1", "node2", "node3"]
    assert "wait for orders of this script" in warning


def test_exported_values_are_never_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["torchrun", _hostfile(tmp_path), "--dry-run", "--export", "MINE"]
    assert main(words, {"MINE": "private", "HF_HOME": "/hf"}) == 0
    printed = capsys.readouterr().out
    assert printed.count("MINE=...") == 2
    assert printed.count("HF_HOME=/hf") == 2
    assert "private" not in printed


def test_a_plan_has_the_path_of_exit_json(tmp_path: Path) -> None:
    options = read_arguments(["torchrun", _hostfile(tmp_path), f"run.output_dir={tmp_path}/out", "run.name=a"])
    assert build_plan(options, {}).exit_file == tmp_path / "out" / "a" / "exit.json"
    other = read_arguments(["torchrun", _hostfile(tmp_path), "run.name=a/../b"])
    with pytest.raises(ConfigError):
        build_plan(other, {})


def test_mpirun_is_stopped_by_a_signal_that_leaves_time_to_save() -> None:
    job = launcher_commands.mpirun(_plan(), "localhost", Path("/tmp/hosts"))
    assert job.signal_map is not None
    assert job.signal_map[signal.SIGTERM] == signal.SIGUSR1
    assert job.launcher_signals == {signal.SIGUSR1}
