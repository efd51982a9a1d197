"""The doctor command: looks at every host of a hostfile, and at what is between them, before a job does.

    dtrain/main.py doctor --hostfile hostfiles/cluster
    dtrain/main.py doctor                                # this machine alone

On a host nothing is written but, on the first one and for a moment, an empty file: in the run folder, or where that is
not there yet, in the nearest folder above it. Nothing that it started stays. Exit code 4 if anything is red. `--json`
prints one object:

    green: bool
    hosts: [name]                                 # in the order of ranks
    ok, warn, red: int                            # how many findings have that state
    findings: [{check, hosts: [name], state: "ok"|"warn"|"red", found: str, fix: str}]   # fix: "" where it is ok
    links: null where no process group was formed, else {
        hosts: [name], ranks: int, backend: "gloo"|"nccl",
        pairs: [{hosts: [name, name], latency_s, bandwidth, sizes: [{bytes, seconds}]}],
        all: {latency_s, bandwidth, sizes}        # s for 4 bytes; bytes per second that a rank sends, each way at once
    }
    advice: str                                   # what to set for links like these; "" where there is nothing to say
"""

from __future__ import annotations

import json
import secrets
import signal
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.cluster import launcher_commands
from dtrain.cluster.doctor import host_checks, link_checks, network_checks
from dtrain.cluster.doctor.conversation import FIRST_S, Said, Talks, talking_to
from dtrain.cluster.doctor.findings import RED, Finding, as_json, last_line, table
from dtrain.cluster.doctor.host_checks import Answer
from dtrain.cluster.hostfile import Host, choose, read_hostfile
from dtrain.cluster.preflight import ROOT
from dtrain.cluster.run_job import Job, Part, run_job
from dtrain.distributed.launcher_env import JOB_ID
from dtrain.errors import ConfigError, Interrupted, TopologyError

ANSWER_S, LOOK_S, REACH_S = 15.0, 120.0, 5.0
"""How long an answer may take; one for which torch is imported; a connection to another host."""

CLOCK_QUESTIONS = 3

BLOCKING = {"ssh", "answer", "python", "torch", "dtrain", "machines", "names", "route", "ports", "GPUs", "CUDA", "NCCL"}
"""What is red there keeps a process group from forming, so none is tried."""

HUNG = "Timeout ("
"""How faulthandler begins, which ends a rank that hangs in whatever it is."""

THIS_MACHINE = Host("localhost", 1)


@dataclass(frozen=True)
class Asked:
    """What the user wants to know. hostfile: None for this machine alone. output_dir and replicas: as in the config."""

    hostfile: Path | None
    include: str
    exclude: str
    output_dir: Path
    replicas: int
    as_json: bool


@dataclass(frozen=True)
class Report:
    """measured: as wire_test.py gives it; None where no group was formed. why_not: why that was not tried, in words."""

    hosts: Sequence[str]
    findings: Sequence[Finding]
    measured: Mapping[str, Any] | None = None
    why_not: str = ""


def run_doctor(asked: Asked, env: Mapping[str, str]) -> int:
    """Prints what was found; gives the exit code.

    Raises:
        ConfigError: the hostfile, or a filter of it.
    """
    if asked.hostfile is None and (asked.include or asked.exclude):
        raise ConfigError("--include and --exclude choose among the hosts of a file: give --hostfile FILE, too.")
    hosts = [THIS_MACHINE]
    if asked.hostfile is not None:
        hosts = choose(read_hostfile(asked.hostfile), include=asked.include, exclude=asked.exclude)
    report = examine(hosts, asked, env)
    _show(report, as_json_object=asked.as_json)
    return TopologyError.exit_code if any(finding.state == RED for finding in report.findings) else 0


def _show(report: Report, *, as_json_object: bool) -> None:
    measured = report.measured
    advice = link_checks.advice(measured) if measured is not None else ""
    if as_json_object:
        found = {**as_json(report.findings, report.hosts, measured), "advice": advice}
        sys.stdout.write(json.dumps(found) + "\n")
        return
    rates = link_checks.rates_in_words(measured) if measured is not None else ""
    lines = [table(report.findings, report.hosts, is_tty=sys.stdout.isatty()), report.why_not, advice]
    lines.append(last_line(report.findings, report.hosts, rates))
    sys.stdout.write("\n".join(line for line in lines if line) + "\n")


def examine(hosts: Sequence[Host], asked: Asked, env: Mapping[str, str]) -> Report:
    """Everything: hosts, what is between them, and a process group over all of them if nothing is in its way."""
    names = [host.name for host in hosts]
    folder = Path.cwd()
    with talking_to(names) as talks:
        answers = _look(talks, hosts, folder, folder / asked.output_dir)
        good = [answer for answer in answers if not answer.problem]
        findings = host_checks.of_hosts(answers, root=str(ROOT), folder=str(folder))
        place, about_names = network_checks.meeting_place(good)
        findings += about_names
        ways: dict[str, dict[str, Any]] = {}
        if place is not None and len(good) > 1:
            ways, between = _between(talks, good, place)
            findings += between
        if len(good) > 1:
            findings += _shared(talks, good, folder / asked.output_dir, asked.replicas)
    in_the_way = sorted({finding.check for finding in findings if finding.state == RED} & BLOCKING)
    if in_the_way or place is None:
        return Report(names, findings, why_not="No process group was tried: first mend what is red.")
    if sys.stderr.isatty():
        sys.stderr.write(f"Measuring {len(link_checks.pairs_of(len(hosts))) or 1} pairs, some seconds each.\n")
    job = job_of(hosts, answers, place, env)
    measured, problem = form_group(job)
    if measured is None:
        told, fix = problem, "mend what is told above; or name the interface on every host: export GLOO_SOCKET_IFNAME"
        return Report(names, [*findings, Finding("process group", tuple(names), RED, told, fix)])
    return Report(names, [*findings, *link_checks.of_links(measured, ways)], measured)


def _look(talks: Talks, hosts: Sequence[Host], folder: Path, output_dir: Path) -> list[Answer]:
    """What each host says of itself."""
    clocks = [talks.ask({"do": "clock"}, timeout_s=FIRST_S)]
    clocks += [talks.ask({"do": "clock"}, timeout_s=ANSWER_S) for _ in range(CLOCK_QUESTIONS - 1)]
    names = [host.name for host in hosts]
    order = {"do": "look", "root": str(ROOT), "folder": str(folder), "hosts": names, "output_dir": str(output_dir)}
    looks = talks.ask(order, timeout_s=LOOK_S)
    answers = []
    for host in hosts:
        said = looks[host.name]
        problem = said.problem or str(said.found.get("problem", ""))
        offsets = [offset_of(clock[host.name]) for clock in clocks if not problem]
        off = min(offsets, key=abs, default=0.0)
        found, is_here = {} if problem else said.found, host.name in talks.here
        answers.append(Answer(host.name, host.slots, problem, found, off, is_here, said.check, host.devices))
    return answers


def offset_of(said: Said) -> float:
    """How far a clock is off this machine's, at least, in seconds; positive where it is ahead."""
    at = float(said.found["time"])
    return max(at - said.received, 0.0) + min(at - said.sent, 0.0)


def _between(talks: Talks, good: Sequence[Answer], place: str) -> tuple[dict[str, dict[str, Any]], list[Finding]]:
    """How each host talks to the meeting place, and who reaches whom on ports like those of ranks."""
    names = [answer.host for answer in good]
    word = secrets.token_hex(16)
    opened = talks.ask(
        lambda host: {"do": "listen", "to": place, "word": word} if host in names else None, timeout_s=ANSWER_S
    )
    ways = {
        host: {**said.found, "problem": said.problem or said.found.get("problem", "")} for host, said in opened.items()
    }
    open_ways = {host: way for host, way in ways.items() if not way["problem"]}

    def order(host: str) -> dict[str, Any] | None:
        targets = [
            {"host": to, "address": way["address"], "port": way["port"], "word": word}
            for to, way in open_ways.items()
            if to != host
        ]
        return {"do": "reach", "targets": targets, "seconds": REACH_S} if host in open_ways else None

    came = talks.ask(order, timeout_s=ANSWER_S + 2 * REACH_S)
    reached = {
        host: {to: said.problem or said.found.get(to, said.found.get("problem")) for to in open_ways if to != host}
        for host, said in came.items()
    }
    return ways, [*network_checks.of_ways(ways, place), *network_checks.of_ports(reached, open_ways)]


def _shared(talks: Talks, good: Sequence[Answer], output_dir: Path, replicas: int) -> list[Finding]:
    """Whether what the first host writes into the run folder is there on the others."""
    first, *others = [answer.host for answer in good]
    if not good[0].look["folder"]:  # else the mark would go to wherever is nearest
        return []
    order = {"do": "mark", "folder": str(output_dir), "name": f".dtrain-doctor-{secrets.token_hex(8)}"}
    marker = talks.ask(lambda host: order if host == first else None, timeout_s=ANSWER_S)[first]
    mark = marker.found or {"problem": marker.problem}
    look = {"do": "see", "path": mark.get("path")}
    seen = talks.ask(lambda host: look if host in others and look["path"] else None, timeout_s=ANSWER_S)
    told = {host: said.found or {"problem": said.problem} for host, said in seen.items()}
    return network_checks.of_folder(mark, told, first, replicas)


def job_of(hosts: Sequence[Host], answers: Sequence[Answer], place: str, env: Mapping[str, str]) -> Job:
    """One rank on each host, or one for each slot where torch sees GPUs; on a machine that is alone one for each, or two."""
    has_gpus = any(map(host_checks.usable, answers))
    counts = [host.slots if has_gpus else 1 for host in hosts]
    if len(hosts) == 1 and not has_gpus:
        counts = [2]
    elif hosts[0] is THIS_MACHINE:  # without a hostfile there are no slots
        counts = [host_checks.usable(answers[0])]
    firsts = [sum(counts[:at]) for at in range(len(hosts))]
    asked = json.dumps({"firsts": firsts, "hosts": [host.name for host in hosts]})
    common = launcher_commands.travelling(env, [])
    common |= {"PYTHONPATH": ":".join(filter(None, [str(ROOT), common.get("PYTHONPATH", "")])), "OMP_NUM_THREADS": "1"}
    # Never another job's ranks; and no root's bytecode in a user's checkout.
    common |= {JOB_ID: secrets.token_hex(16), "PYTHONDONTWRITEBYTECODE": "1"}
    common |= {"MASTER_ADDR": place, "MASTER_PORT": str(answers[0].look["port"]), "WORLD_SIZE": str(sum(counts))}
    parts = []
    for at, (host, count) in enumerate(zip(hosts, counts, strict=True)):
        own = {"RANK": str(firsts[at]), "LOCAL_WORLD_SIZE": str(count)}
        own |= {"GROUP_RANK": str(at), "GROUP_WORLD_SIZE": str(len(hosts))}
        own |= {"LOCAL_RANK": "0"} if count == 1 else {}
        own |= {} if host.devices is None else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, host.devices))}
        argv = [sys.executable, "-m", "dtrain.commands.link_test", asked]
        parts.append(Part(host.name, argv, {**common, **own}))
    taken = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1})
    return Job("the doctor's rank", parts, ROOT, launcher_takes=taken)


class _Heard:
    """What the ranks print, kept instead of shown."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {"out": "", "err": ""}

    def show(self, place: int, frame: Mapping[str, str]) -> None:
        for name, text in frame.items():
            self.texts[name] += text

    def finish(self) -> None:
        return


def form_group(job: Job) -> tuple[Mapping[str, Any] | None, str]:
    """What the ranks measured, or why they did not.

    Raises:
        Interrupted: this process was asked to end, and has ended its ranks: what they say tells nothing of the hosts.
    """
    heard = _Heard()
    ended = run_job(job, screen=heard)
    if ended.asked is not None:
        raise Interrupted(f"Stopped by {signal.Signals(ended.asked).name}.")
    said = [found for line in heard.texts["out"].splitlines() if isinstance(found := _parsed(line), dict)]
    measured = next((found for found in said if "pairs" in found), None)
    if ended.code == 0 and measured is not None:
        return measured, ""
    problems = [str(found["problem"]) for found in said if "problem" in found]
    complaints = heard.texts["err"].strip().splitlines()
    hung = [line for line in complaints if line.startswith(HUNG)]
    if hung:
        between = [f" between {' and '.join(found['next'])}" for found in said if "next" in found] or [""]
        complaints = [f"no answer within {hung[0].removeprefix(HUNG).partition(')')[0]}{between[-1]}"]
    told = problems[:1] or complaints[-1:] or [ended.message]
    return None, " ".join(told[0].split())


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:  # a library's word
        return None
