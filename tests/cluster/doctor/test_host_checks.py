"""The doctor's judgement of hosts: planted answers in, findings out; how they are shown; and the command's own part."""

from __future__ import annotations

import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dtrain.cluster.doctor.conversation import Said
from dtrain.cluster.doctor.findings import (
    OK,
    RED,
    WARN,
    Finding,
    as_json,
    folded,
    last_line,
    named,
    side_by_side,
    table,
)
from dtrain.cluster.doctor.host_checks import Answer, of_hosts
from dtrain.cluster.doctor.network_checks import meeting_place
from dtrain.cluster.hostfile import Host
from dtrain.cluster.job_outcome import Outcome
from dtrain.commands import doctor
from dtrain.commands.arguments import parse
from dtrain.commands.doctor import THIS_MACHINE, Asked, job_of, offset_of, run_doctor
from dtrain.errors import ConfigError, Interrupted
from tests.support.doctor_answers import GIB, GPUS, ROOM, SHM, answered, bad_of

WITHOUT_TOOL = {key: value for key, value in GPUS.items() if key != "driver"}


def _judged(second: Answer) -> list[Finding]:
    """A healthy host, the given one, and a healthy one."""
    alike = {"gpus": GPUS} if second.look.get("gpus") else {}
    answers = [answered("node1", **alike), second, answered("node3", **alike)]
    return of_hosts(answers, root="/opt/dtrain", folder="/work")


# One host


def test_healthy_hosts_are_green_and_agree_in_every_row() -> None:
    findings = _judged(answered("node2"))

    assert bad_of(findings) == []
    assert {row.hosts for row in folded(findings)} == {("node1", "node2", "node3")}
    versions = next(row for row in findings if row.check == "versions")
    assert versions.found == "python 3.11.7, torch 2.13.0, deepspeed 0.19.8"


@pytest.mark.parametrize(
    ("look", "check", "state", "found", "fix"),
    [
        ({"versions": {"torch": "2.12.0", "deepspeed": "0.19.8"}}, "torch", RED, "2.12.0, but 2.13.0 on node1, node3", "constraints.txt"),
        ({"versions": {"torch": "2.13.0"}}, "deepspeed", RED, "none, but 0.19.8 on", "constraints.txt"),
        ({"versions": {"deepspeed": "0.19.8"}}, "torch", RED, "none, but 2.13.0 on", "constraints.txt"),
        ({"python": "3.12.1"}, "python", RED, "3.12.1, but 3.11.7 on", "PYTHON="),
        ({"code": "f" * 64}, "dtrain", RED, "code ffffffffffff, but 0123456789ab on", "one commit"),
        ({"code": None}, "dtrain", RED, "it is not at /opt/dtrain", "put dtrain at /opt/dtrain"),
        ({"folder": False}, "folder", RED, "/work, where a job would run, is not there", "mkdir -p /work"),
        ({"own_address": "127.0.1.1"}, "own name", WARN, "node is 127.0.1.1 there", "/etc/hosts"),
        ({"own_address": None}, "own name", WARN, "does not resolve there", "/etc/hosts"),
        ({"shm": {**SHM, "total": 64 << 20, "free": 64 << 20}}, "/dev/shm", RED, "64 MiB of 64 MiB free", "--shm-size"),
        ({"shm": {**SHM, "free": 1 << 20}}, "/dev/shm", RED, "1 MiB of 16 GiB free", "--shm-size"),
        ({"shm": {**SHM, "total": 512 << 20, "free": 512 << 20}}, "/dev/shm", WARN, "512 MiB of", "--shm-size"),
        ({"shm": {**SHM, "writable": False}}, "/dev/shm", RED, "cannot be written to", "remount,rw"),
        ({"shm": None}, "/dev/shm", WARN, "not there", "mount -t tmpfs"),
        ({"open_files": [1024, 4096]}, "open files", WARN, "1024 at most (hard limit 4096)", "ulimit -n"),
        ({"open_files": [256, None]}, "open files", RED, "256 at most (hard limit none)", "ulimit -n"),
        ({"infiniband": ["mlx5_0"]}, "locked memory", RED, "8 MiB: InfiniBand", "memlock"),
        ({"runs": {**ROOM, "free": 1 << 20}}, "run folder", RED, "1 MiB free in /data", "run.output_dir"),
        ({"runs": {**ROOM, "free": 2 * GIB}}, "run folder", WARN, "2 GiB free in /data", "run.output_dir"),
        ({"runs": {**ROOM, "writable": False}}, "run folder", RED, "/data cannot be written to", "run.output_dir"),
        ({"runs": {"path": "/nfs", "problem": "Stale file handle"}}, "run folder", RED, "/nfs cannot be looked at: Stale", "/nfs there"),
        ({"runs": None}, "run folder", RED, "not there", "run.output_dir"),
        ({"hf_cache": {**ROOM, "free": 1 << 20}}, "hub cache", WARN, "1 MiB free", "HF_HOME"),
        ({"memory": {"total": 4 * GIB, "available": 3 * GIB}}, "memory", WARN, "3 GiB of 4 GiB available for 2 ranks", "slots"),
        ({"cores": 1}, "cores", WARN, "1 cores for 2 ranks", "slots=1"),
        ({"cpu_limit": 1.5}, "cores", WARN, "1.5 of 8 cores by its control group for 2 ranks", "slots=1"),
        ({"machine": "node1"}, "machines", RED, "these names are one machine", "once"),
        ({"gpus": {"names": [], "usable": 0, "driver_problem": "no NVML"}}, "GPUs", RED, "no NVML, but torch sees none", "driver"),
        ({"gpus": {**GPUS, "names": ["H200"], "usable": 1}}, "GPUs", RED, "1 for 2 ranks", "slots=1"),
        ({"gpus": {**GPUS, "usable": 0, "cuda": None}}, "GPUs", RED, "2 x H200, but torch sees none", "built for them"),
        ({"gpus": {"names": ["H200"], "torch_problem": "no libcudart"}}, "GPUs", RED, "what it sees: no libcudart", "torch anew"),
        ({"gpus": {**GPUS, "nccl": "2.20.5"}}, "NCCL", RED, "2.20.5, but 2.27.3 on", "same wheel index"),
        ({"gpus": {**GPUS, "cuda": "12.4"}}, "CUDA", RED, "12.4, but 12.8 on", "same wheel index"),
        ({"gpus": {**GPUS, "driver": "550.9"}}, "driver", WARN, "550.9, but 570.1 on", "NVIDIA's driver"),
        ({"gpus": {**WITHOUT_TOOL, "driver_problem": "no nvidia-smi"}}, "driver", WARN, "cannot be told: no nvidia-smi", "utility"),
    ],
)  # fmt: skip
def test_what_is_wrong_on_one_host_is_named_with_what_mends_it(
    look: Any, check: str, state: str, found: str, fix: str
) -> None:
    (bad,) = bad_of(_judged(answered("node2", **look)))

    assert (bad.check, bad.state) == (check, state)
    assert "node2" in bad.hosts
    assert found in bad.found
    assert fix in bad.fix


@pytest.mark.parametrize(
    ("off", "state", "found"),
    [
        (3600.0, RED, "3600 s ahead of"),
        (-61.0, RED, "61 s behind"),
        (59.0, WARN, "59 s ahead"),
        (-5.0, WARN, "5 s behind"),
    ],
)
def test_a_clock_is_red_from_where_launch_refuses_it(off: float, state: str, found: str) -> None:
    (bad,) = bad_of(_judged(answered("node2", off=off)))

    assert (bad.check, bad.state, found in bad.found) == ("clock", state, True)
    assert bad_of(_judged(answered("node2", off=1.9))) == []


def test_a_clock_is_judged_by_what_the_question_itself_took() -> None:
    assert offset_of(Said({"time": 100.5}, sent=100.0, received=101.0)) == 0.0
    assert offset_of(Said({"time": 161.0}, sent=100.0, received=101.0)) == 60.0
    assert offset_of(Said({"time": 40.0}, sent=100.0, received=101.0)) == -60.0


@pytest.mark.parametrize(
    ("problem", "check", "found", "fix"),
    [
        ("node2: the command there ended with 1: no space left", "answer", "ended with 1", "run doctor again"),
        ("node2: its sshd does not take your key. Put it there: ssh-copy-id node2.", "ssh", "does not take", "ssh-copy-id node2"),
        ("node2: it does not answer. Is it on, and is the network up?", "ssh", "it does not answer", "Is it on"),
        ("node2: there is no Python at /x. Make the same .venv there as here.", "python", "no Python at /x", "same .venv"),
        ("node2: no answer within 9 s to the question for 'look'. Does a disk hang?", "answer", "no answer within 9 s", "disk"),
        ("node2: ssh failed: kex", "ssh", "ssh failed: kex", "run doctor again"),
    ],
)  # fmt: skip
def test_a_host_that_does_not_answer_is_red_and_the_rest_is_judged(
    problem: str, check: str, found: str, fix: str
) -> None:
    findings = of_hosts(
        [answered("node1"), Answer("node2", 1, problem, check=check)], root="/opt/dtrain", folder="/work"
    )

    (bad,) = bad_of(findings)
    assert (bad.check, bad.hosts) == (check, ("node2",))
    assert found in bad.found
    assert fix in bad.fix
    assert {"versions", "clock", "run folder"} <= {row.check for row in findings if row.hosts == ("node1",)}


def test_devices_that_no_hosts_torch_sees_are_a_warning() -> None:
    unseen = {"names": ["H200"], "usable": 0, "cuda": None, "nccl": None, "driver": "570.1"}
    answers = [answered("node1", gpus=unseen), answered("node2", gpus=unseen), answered("node3")]

    findings = of_hosts(answers, root="/", folder="/")

    assert [(row.check, row.hosts, row.state) for row in bad_of(folded(findings))] == [
        ("GPUs", ("node1", "node2"), WARN)
    ]
    assert any(
        row.hosts == ("node3",) and row.found.startswith("none: ranks") for row in findings if row.check == "GPUs"
    )


@pytest.mark.parametrize(("devices", "is_there"), [((0, 1), True), ((1,), True), ((6, 7), False)])
def test_devices_chosen_by_number_are_there_or_red(devices: tuple[int, ...], is_there: bool) -> None:
    chosen = replace(answered("node1", slots=len(devices), gpus=GPUS), devices=devices)

    bad = bad_of(of_hosts([chosen], root="/", folder="/"))

    assert [(row.check, row.state, row.found) for row in bad] == (
        [] if is_there else [("GPUs", RED, "device 7 is not there: 2, numbered from 0")]
    )


def test_what_only_some_networks_need_has_a_row_all_the_same() -> None:
    (row,) = [row for row in folded(_judged(answered("node2"))) if row.check == "locked memory"]

    assert (row.state, row.found) == (OK, "only InfiniBand needs it, and there is none")


def test_a_host_without_gpus_among_others_is_red() -> None:
    answers = [answered("node1", gpus=GPUS), answered("node2")]

    (bad,) = bad_of(of_hosts(answers, root="/", folder="/"))

    assert (bad.check, bad.hosts, bad.found) == ("GPUs", ("node2",), "none, but others have some")


def test_a_machine_that_is_alone_may_have_any_name() -> None:
    assert bad_of(of_hosts([answered("localhost", own_address="127.0.1.1")], root="/", folder="/")) == []


def test_nobody_that_answers_is_no_reason_to_fail() -> None:
    assert [row.check for row in of_hosts([Answer("node1", 1, "node1: off")], root="/", folder="/")] == ["ssh"]
    assert meeting_place([]) == ("127.0.0.1", [])


# What is shown


def test_of_values_the_most_frequent_counts_and_of_two_the_first_hosts() -> None:
    three = side_by_side("x", {"a": "1", "b": "2", "c": "2"}, state=RED, fix="f")
    two = side_by_side("x", {"a": "1", "b": "2"}, state=RED, fix="f")

    assert [(row.hosts, row.state) for row in three] == [(("b", "c"), OK), (("a",), RED)]
    assert [(row.hosts, row.state) for row in two] == [(("a",), OK), (("b",), RED)]
    assert two[1].found == "2, but 1 on a"
    assert side_by_side("x", {}, state=RED, fix="") == []


def test_the_table_folds_hosts_and_tells_fixes() -> None:
    findings = [
        Finding("ssh", ("a",), OK, "fine"),
        Finding("ssh", ("b",), OK, "fine"),
        Finding("clock", ("b",), RED, "off", "chrony"),
        Finding("MTU", ("a",), WARN, "1500", "9000"),
    ]

    assert table(findings, ["a", "b"], is_tty=False).splitlines() == [
        "ok    ssh    all 2 hosts  fine",
        "red   clock  b            off",
        "      fix: chrony",
        "warn  MTU    a            1500",
        "      fix: 9000",
    ]
    assert "\x1b[31mred" in table(findings, ["a", "b"], is_tty=True)
    assert last_line(findings, ["a", "b"]) == "1 red: clock (b), 1 warning"
    assert last_line(findings[:2], ["a", "b"], "1 Gbit/s") == "All green: 2 hosts, 1 Gbit/s"
    assert as_json(findings, ["a", "b"], None)["red"] == 1
    pairs = [Finding("pair", ("a", "b"), OK, "1 Gbit/s"), Finding("pair", ("a", "c"), OK, "1 Gbit/s")]
    assert [row.hosts for row in folded(pairs)] == [("a", "b"), ("a", "c")]
    assert named(list("abcdef")) == "a, b, c and 3 more"


# The command


def test_ranks_are_told_their_places() -> None:
    hosts = [Host("node1", 4), Host("node2", 2, (1, 3))]
    one, two = job_of(
        hosts, [answered("node1"), answered("node2")], "10.0.0.1", {"HF_TOKEN": "t", "HF_HOME": "/h"}
    ).parts
    assert {key: two.env[key] for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "GROUP_RANK", "MASTER_PORT")} == {
        "RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "GROUP_RANK": "1", "MASTER_PORT": "40000",
    }  # fmt: skip
    assert "HF_TOKEN" not in one.env
    with_gpus = [answered(name, gpus=GPUS) for name in ("node1", "node2")]
    parts = job_of(hosts, with_gpus, "10.0.0.1", {}).parts
    assert [(part.env["RANK"], part.env["LOCAL_WORLD_SIZE"], part.env["WORLD_SIZE"]) for part in parts] == [
        ("0", "4", "6"),
        ("4", "2", "6"),
    ]
    assert parts[1].env["CUDA_VISIBLE_DEVICES"] == "1,3"
    assert len({part.env["DTRAIN_JOB_ID"] for part in parts}) == 1
    assert parts[0].env["PYTHONDONTWRITEBYTECODE"] == "1"


@pytest.mark.parametrize(
    ("host", "gpus", "ranks"),
    [
        (THIS_MACHINE, None, "2"),
        (THIS_MACHINE, {**GPUS, "names": ["H200"] * 8, "usable": 2}, "2"),  # CUDA_VISIBLE_DEVICES leaves two of them
        (THIS_MACHINE, {**GPUS, "usable": 0}, "2"),
        (Host("node1", 2, (0, 2)), {**GPUS, "names": ["H200"] * 8, "usable": 8}, "2"),
        (Host("localhost", 1), {**GPUS, "usable": 2}, "1"),
        (Host("node1", 4), None, "2"),
    ],
)
def test_one_machine_has_as_many_ranks_as_it_can_have(host: Host, gpus: Any, ranks: str) -> None:
    (part,) = job_of([host], [answered(host.name, gpus=gpus)], "127.0.0.1", {}).parts

    assert (part.env["LOCAL_WORLD_SIZE"], part.env["WORLD_SIZE"]) == (ranks, ranks)


def _ended(monkeypatch: pytest.MonkeyPatch, out: list[dict[str, Any]], err: str, asked: int | None) -> str:
    """What the doctor makes of ranks that said this, and ended with 4."""

    def run(job: Any, *, screen: Any) -> Outcome:
        screen.show(0, {"out": "".join(json.dumps(line) + "\n" for line in out), "err": err})
        return Outcome(4, "node1: the doctor's rank was killed by SIGTERM", asked)

    monkeypatch.setattr(doctor, "run_job", run)
    job = job_of([Host("node1", 1), Host("node2", 1)], [answered("node1"), answered("node2")], "10.0.0.1", {})
    measured, problem = doctor.form_group(job)
    assert measured is None
    return problem


def test_why_ranks_found_no_group_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    hung = 'Timeout (0:03:15)!\nThread 0x0 (most recent call first):\n  File "wire_test.py", line 190 in <module>\n'
    pair = {"next": ["node1", "node2"]}

    assert _ended(monkeypatch, [pair], hung, None) == "no answer within 0:03:15 between node1 and node2"
    assert _ended(monkeypatch, [pair, {"problem": "between\na and b"}], hung, None) == "between a and b"
    assert "killed by SIGTERM" in _ended(monkeypatch, [], "", None)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_doctor_that_is_stopped_gives_no_verdict(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Interrupted):
        _ended(monkeypatch, [], "", int(number))


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["train", "--hostfile", "f"], "--hostfile works only with doctor"),
        (["--exclude", "node1"], "--exclude works only with doctor"),
        (["evaluate", "--json"], "--json works only with goodput and doctor"),
    ],
)
def test_the_doctors_options_are_its_own(words: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        parse(words)


@pytest.mark.parametrize(
    ("hostfile", "include", "told"),
    [(None, "node1", "give --hostfile FILE"), ("none", "", "cannot be read"), ("hosts", "node9", "no host 'node9'")],
)
def test_a_wrong_hostfile_is_refused_before_any_host_is_asked(
    hostfile: str | None, include: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "hosts").write_text("node1 slots=1\n")
    monkeypatch.setattr(doctor, "talking_to", lambda hosts: pytest.fail("a host was asked"))
    asked = Asked(tmp_path / hostfile if hostfile else None, include, "", Path("runs"), 2, as_json=False)

    with pytest.raises(ConfigError, match=told):
        run_doctor(asked, {})
