"""The doctor's checks of hosts with constructed reports, the output of findings, and the command itself."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dtrain.cluster.doctor.conversation import HostReply
from dtrain.cluster.doctor.findings import (
    OK,
    RED,
    WARN,
    Finding,
    as_json,
    compare_values,
    format_hosts,
    format_summary,
    format_table,
    merge_findings,
)
from dtrain.cluster.doctor.host_checks import HostReport, check_hosts
from dtrain.cluster.doctor.network_checks import find_master
from dtrain.cluster.hostfile import Host
from dtrain.cluster.job_outcome import JobOutcome
from dtrain.commands import doctor
from dtrain.commands.arguments import parse
from dtrain.commands.doctor import THIS_MACHINE, DoctorOptions, build_link_test, clock_offset_s, run_doctor
from dtrain.errors import ConfigError, Interrupted
from tests.support.doctor_reports import DISK, GIB, GPUS, SHM, healthy, not_ok

WITHOUT_TOOL = {key: value for key, value in GPUS.items() if key != "driver"}


def _check_second(second: HostReport) -> list[Finding]:
    """Returns the findings for a healthy host, the given one, and another healthy one."""
    same = {"gpus": GPUS} if second.facts.get("gpus") else {}
    reports = [healthy("node1", **same), second, healthy("node3", **same)]
    return check_hosts(reports, root="/opt/dtrain", folder="/work")


# One host


def test_healthy_hosts_are_green_and_agree_in_every_row() -> None:
    findings = _check_second(healthy("node2"))

    assert not_ok(findings) == []
    assert {row.hosts for row in merge_findings(findings)} == {("node1", "node2", "node3")}
    versions = next(row for row in findings if row.check == "versions")
    assert versions.found == "python 3.11.7, torch 2.13.0, deepspeed 0.19.8"


@pytest.mark.parametrize(
    ("facts", "check", "state", "found", "fix"),
    [
        ({"versions": {"torch": "2.12.0", "deepspeed": "0.19.8"}}, "torch", RED, "2.12.0, but 2.13.0 on node1, node3", "constraints.txt"),
        ({"versions": {"torch": "2.13.0"}}, "deepspeed", RED, "none, but 0.19.8 on", "constraints.txt"),
        ({"versions": {"deepspeed": "0.19.8"}}, "torch", RED, "none, but 2.13.0 on", "constraints.txt"),
        ({"python": "3.12.1"}, "python", RED, "3.12.1, but 3.11.7 on", "PYTHON="),
        ({"code": "f" * 64}, "dtrain", RED, "code ffffffffffff, but 0123456789ab on", "same commit"),
        ({"code": None}, "dtrain", RED, "it is not at /opt/dtrain", "copy dtrain to /opt/dtrain"),
        ({"folder": False}, "folder", RED, "a job's working folder /work does not exist", "mkdir -p /work"),
        ({"own_address": "127.0.1.1"}, "host name", WARN, "node resolves to 127.0.1.1 there", "/etc/hosts"),
        ({"own_address": None}, "host name", WARN, "does not resolve there", "/etc/hosts"),
        ({"shm": {**SHM, "total": 64 << 20, "free": 64 << 20}}, "/dev/shm", RED, "64 MiB of 64 MiB free", "--shm-size"),
        ({"shm": {**SHM, "free": 1 << 20}}, "/dev/shm", RED, "1 MiB of 16 GiB free", "--shm-size"),
        ({"shm": {**SHM, "total": 512 << 20, "free": 512 << 20}}, "/dev/shm", WARN, "512 MiB of", "--shm-size"),
        ({"shm": {**SHM, "writable": False}}, "/dev/shm", RED, "not writable", "remount,rw"),
        ({"shm": None}, "/dev/shm", WARN, "does not exist", "mount -t tmpfs"),
        ({"open_files": [1024, 4096]}, "open files", WARN, "limit 1024 (hard limit 4096)", "ulimit -n"),
        ({"open_files": [256, None]}, "open files", RED, "limit 256 (hard limit none)", "ulimit -n"),
        ({"infiniband": ["mlx5_0"]}, "locked memory", RED, "8 MiB: InfiniBand", "memlock"),
        ({"runs": {**DISK, "free": 1 << 20}}, "run folder", RED, "1 MiB free in /data", "run.output_dir"),
        ({"runs": {**DISK, "free": 2 * GIB}}, "run folder", WARN, "2 GiB free in /data", "run.output_dir"),
        ({"runs": {**DISK, "writable": False}}, "run folder", RED, "/data is not writable", "run.output_dir"),
        ({"runs": {"path": "/nfs", "problem": "Stale file handle"}}, "run folder", RED, "cannot access /nfs: Stale", "/nfs there"),
        ({"runs": None}, "run folder", RED, "neither it nor any folder above it exists", "run.output_dir"),
        ({"hf_cache": {**DISK, "free": 1 << 20}}, "hub cache", WARN, "1 MiB free", "HF_HOME"),
        ({"memory": {"total": 4 * GIB, "available": 3 * GIB}}, "memory", WARN, "3 GiB of 4 GiB available for 2 ranks", "slots"),
        ({"cores": 1}, "cores", WARN, "1 for 2 ranks", "slots=1"),
        ({"cpu_limit": 1.5}, "cores", WARN, "1.5 of 8 (cgroup limit) for 2 ranks", "slots=1"),
        ({"machine": "node1"}, "machines", RED, "these names are the same machine", "once"),
        ({"gpus": {"names": [], "usable": 0, "driver_problem": "no NVML"}}, "GPUs", RED, "no NVML, but torch sees none", "driver"),
        ({"gpus": {**GPUS, "names": ["H200"], "usable": 1}}, "GPUs", RED, "1 for 2 ranks", "slots=1"),
        ({"gpus": {**GPUS, "usable": 0, "cuda": None}}, "GPUs", RED, "2 x H200, but torch sees none", "torch build for these"),
        ({"gpus": {"names": ["H200"], "torch_problem": "no libc"}}, "GPUs", RED, "cannot list its devices: no libc", "reinstall"),
        ({"gpus": {**GPUS, "nccl": "2.20.5"}}, "NCCL", RED, "2.20.5, but 2.27.3 on", "same wheel index"),
        ({"gpus": {**GPUS, "cuda": "12.4"}}, "CUDA", RED, "12.4, but 12.8 on", "same wheel index"),
        ({"gpus": {**GPUS, "driver": "550.9"}}, "driver", WARN, "550.9, but 570.1 on", "NVIDIA's driver"),
        ({"gpus": {**WITHOUT_TOOL, "driver_problem": "no nvidia-smi"}}, "driver", WARN, "unknown version: no nvidia-smi", "utility"),
    ],
)  # fmt: skip
def test_a_problem_on_one_host_is_reported_with_its_fix(
    facts: Any, check: str, state: str, found: str, fix: str
) -> None:
    (bad,) = not_ok(_check_second(healthy("node2", **facts)))

    assert (bad.check, bad.state) == (check, state)
    assert "node2" in bad.hosts
    assert found in bad.found
    assert fix in bad.fix


@pytest.mark.parametrize(
    ("offset_s", "state", "found"),
    [
        (3600.0, RED, "3600 s ahead of"),
        (-61.0, RED, "61 s behind"),
        (59.0, WARN, "59 s ahead"),
        (-5.0, WARN, "5 s behind"),
    ],
)
def test_a_clock_is_red_if_launch_would_refuse_it(offset_s: float, state: str, found: str) -> None:
    (bad,) = not_ok(_check_second(healthy("node2", offset_s=offset_s)))

    assert (bad.check, bad.state, found in bad.found) == ("clock", state, True)
    assert not_ok(_check_second(healthy("node2", offset_s=1.9))) == []


def test_the_duration_of_the_question_is_not_a_clock_offset() -> None:
    assert clock_offset_s(HostReply({"time": 100.5}, sent=100.0, received=101.0)) == 0.0
    assert clock_offset_s(HostReply({"time": 161.0}, sent=100.0, received=101.0)) == 60.0
    assert clock_offset_s(HostReply({"time": 40.0}, sent=100.0, received=101.0)) == -60.0


@pytest.mark.parametrize(
    ("problem", "check", "found", "fix"),
    [
        ("node2: the remote command exited with code 1: no space left", "answer", "exited with code 1", "run doctor again"),
        ("node2: its sshd rejects your key. Copy the key to the host: ssh-copy-id node2.", "ssh", "rejects your key", "ssh-copy-id node2"),
        ("node2: it does not answer. Is it on, and is the network up?", "ssh", "it does not answer", "Is it on"),
        ("node2: there is no Python at /x. Create the same .venv there as here.", "python", "no Python at /x", "same .venv"),
        ("node2: no answer to the order 'facts' within 9 s. Does a disk hang?", "answer", "within 9 s", "disk"),
        ("node2: ssh failed: kex", "ssh", "ssh failed: kex", "run doctor again"),
    ],
)  # fmt: skip
def test_a_host_that_does_not_answer_is_red_and_the_others_are_checked(
    problem: str, check: str, found: str, fix: str
) -> None:
    findings = check_hosts(
        [healthy("node1"), HostReport("node2", 1, problem, check=check)], root="/opt/dtrain", folder="/work"
    )

    (bad,) = not_ok(findings)
    assert (bad.check, bad.hosts) == (check, ("node2",))
    assert found in bad.found
    assert fix in bad.fix
    assert {"versions", "clock", "run folder"} <= {row.check for row in findings if row.hosts == ("node1",)}


def test_gpus_that_torch_sees_on_no_host_are_a_warning() -> None:
    unseen = {"names": ["H200"], "usable": 0, "cuda": None, "nccl": None, "driver": "570.1"}
    reports = [healthy("node1", gpus=unseen), healthy("node2", gpus=unseen), healthy("node3")]

    findings = check_hosts(reports, root="/", folder="/")

    assert [(row.check, row.hosts, row.state) for row in not_ok(merge_findings(findings))] == [
        ("GPUs", ("node1", "node2"), WARN)
    ]
    assert any(
        row.hosts == ("node3",) and row.found.startswith("none: ranks") for row in findings if row.check == "GPUs"
    )


@pytest.mark.parametrize(("devices", "exists"), [((0, 1), True), ((1,), True), ((6, 7), False)])
def test_selected_devices_that_do_not_exist_are_red(devices: tuple[int, ...], exists: bool) -> None:
    report = replace(healthy("node1", slots=len(devices), gpus=GPUS), devices=devices)

    bad = not_ok(check_hosts([report], root="/", folder="/"))

    assert [(row.check, row.state, row.found) for row in bad] == (
        [] if exists else [("GPUs", RED, "device 7 does not exist: the host has 2, numbered from 0")]
    )


def test_locked_memory_has_a_row_even_without_infiniband() -> None:
    (row,) = [row for row in merge_findings(_check_second(healthy("node2"))) if row.check == "locked memory"]

    assert (row.state, row.found) == (OK, "no InfiniBand, which would need it")


def test_a_host_without_gpus_among_others_is_red() -> None:
    reports = [healthy("node1", gpus=GPUS), healthy("node2")]

    (bad,) = not_ok(check_hosts(reports, root="/", folder="/"))

    assert (bad.check, bad.hosts, bad.found) == ("GPUs", ("node2",), "none, but other hosts have some")


def test_a_single_machine_may_have_any_name() -> None:
    assert not_ok(check_hosts([healthy("localhost", own_address="127.0.1.1")], root="/", folder="/")) == []


def test_checks_work_if_no_host_answers() -> None:
    assert [row.check for row in check_hosts([HostReport("node1", 1, "node1: off")], root="/", folder="/")] == ["ssh"]
    assert find_master([]) == ("127.0.0.1", [])


# Output


def test_the_most_common_value_counts_and_of_two_the_first_hosts() -> None:
    three = compare_values("x", {"a": "1", "b": "2", "c": "2"}, state=RED, fix="f")
    two = compare_values("x", {"a": "1", "b": "2"}, state=RED, fix="f")

    assert [(row.hosts, row.state) for row in three] == [(("b", "c"), OK), (("a",), RED)]
    assert [(row.hosts, row.state) for row in two] == [(("a",), OK), (("b",), RED)]
    assert two[1].found == "2, but 1 on a"
    assert compare_values("x", {}, state=RED, fix="") == []


def test_the_table_merges_hosts_and_shows_fixes() -> None:
    findings = [
        Finding("ssh", ("a",), OK, "fine"),
        Finding("ssh", ("b",), OK, "fine"),
        Finding("clock", ("b",), RED, "off", "chrony"),
        Finding("MTU", ("a",), WARN, "1500", "9000"),
    ]

    assert format_table(findings, ["a", "b"], is_tty=False).splitlines() == [
        "ok    ssh    all 2 hosts  fine",
        "red   clock  b            off",
        "      fix: chrony",
        "warn  MTU    a            1500",
        "      fix: 9000",
    ]
    assert "\x1b[31mred" in format_table(findings, ["a", "b"], is_tty=True)
    assert format_summary(findings, ["a", "b"]) == "1 red: clock (b), 1 warning"
    assert format_summary(findings[:2], ["a", "b"], "1 Gbit/s") == "All green: 2 hosts, 1 Gbit/s"
    assert as_json(findings, ["a", "b"], None)["red"] == 1
    pairs = [Finding("pair", ("a", "b"), OK, "1 Gbit/s"), Finding("pair", ("a", "c"), OK, "1 Gbit/s")]
    assert [row.hosts for row in merge_findings(pairs)] == [("a", "b"), ("a", "c")]
    assert format_hosts(list("abcdef")) == "a, b, c and 3 more"


# The command


def test_the_link_tests_ranks_get_their_environment() -> None:
    hosts = [Host("node1", 4), Host("node2", 2, (1, 3))]
    one, two = build_link_test(
        hosts, [healthy("node1"), healthy("node2")], "10.0.0.1", {"HF_TOKEN": "t", "HF_HOME": "/h"}
    ).commands
    assert {key: two.env[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "MASTER_PORT")} == {
        "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "GROUP_RANK": "1", "MASTER_PORT": "40000",
    }  # fmt: skip
    assert "HF_TOKEN" not in one.env
    with_gpus = [healthy(name, gpus=GPUS) for name in ("node1", "node2")]
    commands = build_link_test(hosts, with_gpus, "10.0.0.1", {}).commands
    assert [(each.env["RANK"], each.env["LOCAL_WORLD_SIZE"], each.env["WORLD_SIZE"]) for each in commands] == [
        ("0", "4", "6"),
        ("4", "2", "6"),
    ]
    assert commands[1].env["CUDA_VISIBLE_DEVICES"] == "1,3"
    assert len({command.env["DTRAIN_JOB_ID"] for command in commands}) == 1
    assert commands[0].env["PYTHONDONTWRITEBYTECODE"] == "1"


@pytest.mark.parametrize(
    ("host", "gpus", "ranks"),
    [
        (THIS_MACHINE, None, "2"),
        (THIS_MACHINE, {**GPUS, "names": ["H200"] * 8, "usable": 2}, "2"),  # CUDA_VISIBLE_DEVICES selects two of them
        (THIS_MACHINE, {**GPUS, "usable": 0}, "2"),
        (Host("node1", 2, (0, 2)), {**GPUS, "names": ["H200"] * 8, "usable": 8}, "2"),
        (Host("localhost", 1), {**GPUS, "usable": 2}, "1"),
        (Host("node1", 4), None, "2"),
    ],
)
def test_a_single_machine_has_a_rank_for_each_usable_gpu_or_two(host: Host, gpus: Any, ranks: str) -> None:
    (command,) = build_link_test([host], [healthy(host.name, gpus=gpus)], "127.0.0.1", {}).commands

    assert (command.env["LOCAL_WORLD_SIZE"], command.env["WORLD_SIZE"]) == (ranks, ranks)


def _failed_link_test(
    monkeypatch: pytest.MonkeyPatch, out: list[dict[str, Any]], err: str, stop_signal: int | None
) -> str:
    """Returns the problem that the doctor reports for ranks with this output and exit code 4."""

    def run(job: Any, *, output: Any) -> JobOutcome:
        output.show(0, {"out": "".join(json.dumps(line) + "\n" for line in out), "err": err})
        return JobOutcome(4, "node1: the link test was killed by SIGTERM", stop_signal)

    monkeypatch.setattr(doctor, "run_job", run)
    job = build_link_test([Host("node1", 1), Host("node2", 1)], [healthy("node1"), healthy("node2")], "10.0.0.1", {})
    measured, problem = doctor.measure_links(job)
    assert measured is None
    return problem


def test_the_reason_why_ranks_form_no_group_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    hung = 'Timeout (0:03:15)!\nThread 0x0 (most recent call first):\n  File "link_test.py", line 190 in <module>\n'
    pair = {"next": ["node1", "node2"]}

    assert _failed_link_test(monkeypatch, [pair], hung, None) == "no answer within 0:03:15 between node1 and node2"
    assert _failed_link_test(monkeypatch, [pair, {"problem": "between\na and b"}], hung, None) == "between a and b"
    assert "killed by SIGTERM" in _failed_link_test(monkeypatch, [], "", None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stopped_doctor_reports_no_finding(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Interrupted):
        _failed_link_test(monkeypatch, [], "", int(number))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--hostfile", "f"], "--hostfile works only with doctor"),
        (["--exclude", "node1"], "--exclude works only with doctor"),
        (["evaluate", "--json"], "--json works only with goodput and doctor"),
    ],
)
def test_other_commands_refuse_the_doctors_options(words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(words)


@pytest.mark.parametrize(
    ("hostfile", "include", "message"),
    [
        (None, "node1", "add --hostfile FILE"),
        ("none", "", "cannot read the hostfile"),
        ("hosts", "node9", "no host 'node9'"),
    ],
)
def test_a_wrong_hostfile_is_refused_before_any_host_is_contacted(
    hostfile: str | None, include: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hosts").write_text("node1 slots=1\n")
    monkeypatch.setattr(doctor, "open_conversations", lambda hosts: pytest.fail("a host was contacted"))
    options = DoctorOptions(tmp_path / hostfile if hostfile else None, include, "", Path("runs"), 2, as_json=False)

    with pytest.raises(ConfigError, match=message):
        run_doctor(options, {})
