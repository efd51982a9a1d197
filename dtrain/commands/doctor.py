"""The doctor command: checks every host of a hostfile, and the network between them, before a job runs.

    dtrain/main.py doctor --hostfile hostfiles/cluster
    dtrain/main.py doctor                                # only this machine

It writes nothing to the hosts except, on the first one for a moment, an empty file in the run folder, or in the nearest
existing folder above it. No process of it remains. Exit code 4 if any finding is red. `--json` prints one object:

    green: bool
    hosts: [name]                                 # in the order of ranks
    ok, warn, red: int                            # number of findings with that state
    findings: [{check, hosts: [name], state: "ok"|"warn"|"red", found: str, fix: str}]   # fix: "" if ok
    links: null if no process group was formed, else {
        hosts: [name], ranks: int, backend: "gloo"|"nccl",
        pairs: [{hosts: [name, name], latency_s, bandwidth, sizes: [{bytes, seconds}]}],
        all: {latency_s, bandwidth, sizes}        # s for 4 bytes; bytes/s that a rank sends, both directions in parallel
        precision: [{host, fp32_s, bf16_s, found}]   # forward and backward of a small model; hosts without GPUs
    }
    advice: str                                   # recommended settings for these links; "" if there are none
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
from dtrain.cluster.doctor.conversation import FIRST_ANSWER_TIMEOUT_S, Conversations, HostReply, open_conversations
from dtrain.cluster.doctor.findings import RED, Finding, as_json, format_summary, format_table
from dtrain.cluster.doctor.host_checks import HostReport
from dtrain.cluster.hostfile import Host, read_hostfile, select_hosts
from dtrain.cluster.preflight import ROOT
from dtrain.cluster.run_job import HostCommand, MultiHostJob, run_job
from dtrain.distributed.launcher_env import JOB_ID
from dtrain.errors import ConfigError, Interrupted, TopologyError

ANSWER_TIMEOUT_S, FACTS_TIMEOUT_S, PORT_TIMEOUT_S = 15.0, 120.0, 5.0
"""Time limits of an answer, of the facts, which import torch, and of a connection to another host."""

CLOCK_SAMPLES = 3

BLOCKING = {"ssh", "answer", "python", "torch", "dtrain", "machines", "names", "route", "ports", "GPUs", "CUDA", "NCCL"}
"""If one of these checks is red, a process group cannot form, so none is started."""

HUNG = "Timeout ("
"""The first output of faulthandler when it ends a rank that hangs."""

THIS_MACHINE = Host("localhost", 1)


@dataclass(frozen=True)
class DoctorOptions:
    """The options of the command.

    Attributes:
        hostfile: the hosts to check; None for this machine only.
        include: filter of hosts, or empty.
        exclude: filter of hosts, or empty.
        output_dir: run.output_dir of the config.
        replicas: checkpoint.replicas of the config.
        as_json: print JSON instead of a table.
    """

    hostfile: Path | None
    include: str
    exclude: str
    output_dir: Path
    replicas: int
    as_json: bool


@dataclass(frozen=True)
class DoctorReport:
    """All results.

    Attributes:
        hosts: the names of all hosts.
        findings: in the order in which they are shown.
        measured: the result of link_test.py; None if no process group was formed.
        note: why no process group was started; empty if one was.
    """

    hosts: Sequence[str]
    findings: Sequence[Finding]
    measured: Mapping[str, Any] | None = None
    note: str = ""


def run_doctor(options: DoctorOptions, env: Mapping[str, str]) -> int:
    """Prints the findings and returns the exit code.

    Raises:
        ConfigError: the hostfile or a filter is wrong.
    """
    if options.hostfile is None and (options.include or options.exclude):
        raise ConfigError("--include and --exclude select hosts of a hostfile: add --hostfile FILE.")
    hosts = [THIS_MACHINE]
    if options.hostfile is not None:
        hosts = select_hosts(read_hostfile(options.hostfile), include=options.include, exclude=options.exclude)
    report = examine(hosts, options, env)
    _print_report(report, json_output=options.as_json)
    return TopologyError.exit_code if any(finding.state == RED for finding in report.findings) else 0


def _print_report(report: DoctorReport, *, json_output: bool) -> None:
    measured = report.measured
    advice = link_checks.recommend(measured) if measured is not None else ""
    if json_output:
        result = {**as_json(report.findings, report.hosts, measured), "advice": advice}
        sys.stdout.write(json.dumps(result) + "\n")
        return
    rates = link_checks.format_rates(measured) if measured is not None else ""
    lines = [format_table(report.findings, report.hosts, is_tty=sys.stdout.isatty()), report.note, advice]
    lines.append(format_summary(report.findings, report.hosts, rates))
    sys.stdout.write("\n".join(line for line in lines if line) + "\n")


def examine(hosts: Sequence[Host], options: DoctorOptions, env: Mapping[str, str]) -> DoctorReport:
    """Checks the hosts, the network between them, and a process group over all of them unless a finding prevents it."""
    names = [host.name for host in hosts]
    folder = Path.cwd()
    output_dir = folder / options.output_dir
    with open_conversations(names) as conversations:
        reports = _collect_reports(conversations, hosts, folder, output_dir)
        good = [report for report in reports if not report.problem]
        findings = host_checks.check_hosts(reports, root=str(ROOT), folder=str(folder))
        master, name_findings = network_checks.find_master(good)
        findings += name_findings
        routes: dict[str, dict[str, Any]] = {}
        if master is not None and len(good) > 1:
            routes, network_findings = _check_network(conversations, good, master)
            findings += network_findings
        if len(good) > 1:
            findings += _check_shared_folder(conversations, good, output_dir, options.replicas)
    blocked = {finding.check for finding in findings if finding.state == RED} & BLOCKING
    if blocked or master is None:
        return DoctorReport(names, findings, note="The process group was not tested: first fix what is red.")
    if sys.stderr.isatty():
        pairs = len(link_checks.host_pairs(len(hosts))) or 1
        sys.stderr.write(f"Measuring {pairs} pairs. Each takes a few seconds.\n")
    measured, problem = measure_links(build_link_test(hosts, reports, master, env))
    if measured is None:
        fix = "fix the reported problem; or set the network interface on every host: export GLOO_SOCKET_IFNAME"
        return DoctorReport(names, [*findings, Finding("process group", tuple(names), RED, problem, fix)])
    findings += [*link_checks.check_links(measured, routes), *link_checks.check_precision(measured)]
    return DoctorReport(names, findings, measured)


def _collect_reports(
    conversations: Conversations, hosts: Sequence[Host], folder: Path, output_dir: Path
) -> list[HostReport]:
    """Returns what each host reports about itself."""
    clocks = [conversations.ask({"order": "clock"}, timeout_s=FIRST_ANSWER_TIMEOUT_S)]
    clocks += [conversations.ask({"order": "clock"}, timeout_s=ANSWER_TIMEOUT_S) for _ in range(CLOCK_SAMPLES - 1)]
    names = [host.name for host in hosts]
    order = {"order": "facts", "root": str(ROOT), "folder": str(folder), "hosts": names, "output_dir": str(output_dir)}
    replies = conversations.ask(order, timeout_s=FACTS_TIMEOUT_S)
    reports = []
    for host in hosts:
        reply = replies[host.name]
        problem = reply.problem or str(reply.answer.get("problem", ""))
        offsets = [clock_offset_s(clock[host.name]) for clock in clocks if not problem]
        reports.append(
            HostReport(
                host.name,
                host.slots,
                problem,
                facts={} if problem else reply.answer,
                clock_offset_s=min(offsets, key=abs, default=0.0),
                is_local=host.name in conversations.local_hosts,
                check=reply.check,
                devices=host.devices,
            )
        )
    return reports


def clock_offset_s(reply: HostReply) -> float:
    """Returns the smallest possible offset of a clock from this machine's, in seconds; positive if it is ahead."""
    at = float(reply.answer["time"])
    return max(at - reply.received, 0.0) + min(at - reply.sent, 0.0)


def _check_network(
    conversations: Conversations, good: Sequence[HostReport], master: str
) -> tuple[dict[str, dict[str, Any]], list[Finding]]:
    """Returns each host's route to the master, and findings about routes and about ports like those of ranks."""
    names = [report.host for report in good]
    token = secrets.token_hex(16)
    listen = {"order": "listen", "to": master, "token": token}
    opened = conversations.ask(lambda host: listen if host in names else None, timeout_s=ANSWER_TIMEOUT_S)
    routes = {
        host: {**reply.answer, "problem": reply.problem or reply.answer.get("problem", "")}
        for host, reply in opened.items()
    }
    open_routes = {host: route for host, route in routes.items() if not route["problem"]}

    def connect(host: str) -> dict[str, Any] | None:
        targets = [
            {"host": to, "address": route["address"], "port": route["port"], "token": token}
            for to, route in open_routes.items()
            if to != host
        ]
        return {"order": "connect", "targets": targets, "timeout_s": PORT_TIMEOUT_S} if host in open_routes else None

    replies = conversations.ask(connect, timeout_s=ANSWER_TIMEOUT_S + 2 * PORT_TIMEOUT_S)
    problems = {
        host: {
            to: reply.problem or reply.answer.get(to, reply.answer.get("problem")) for to in open_routes if to != host
        }
        for host, reply in replies.items()
    }
    findings = [*network_checks.check_routes(routes, master), *network_checks.check_ports(problems, open_routes)]
    return routes, findings


def _check_shared_folder(
    conversations: Conversations, good: Sequence[HostReport], output_dir: Path, replicas: int
) -> list[Finding]:
    """Returns findings about whether a file that the first host writes into the run folder is visible on the others."""
    first, *others = [report.host for report in good]
    if not good[0].facts["folder"]:  # the marker would be written to some folder above
        return []
    create = {"order": "create_marker", "folder": str(output_dir), "name": f".dtrain-doctor-{secrets.token_hex(8)}"}
    reply = conversations.ask(lambda host: create if host == first else None, timeout_s=ANSWER_TIMEOUT_S)[first]
    marker = reply.answer or {"problem": reply.problem}
    find = {"order": "find_marker", "path": marker.get("path")}
    replies = conversations.ask(
        lambda host: find if host in others and find["path"] else None, timeout_s=ANSWER_TIMEOUT_S
    )
    answers = {host: reply.answer or {"problem": reply.problem} for host, reply in replies.items()}
    return network_checks.check_shared_folder(marker, answers, first, replicas)


def build_link_test(
    hosts: Sequence[Host], reports: Sequence[HostReport], master: str, env: Mapping[str, str]
) -> MultiHostJob:
    """Returns the job that runs link_test.py.

    With several hosts, each has one rank, or one per slot if torch sees GPUs. A single host without GPUs has two ranks.
    """
    has_gpus = any(map(host_checks.count_gpus, reports))
    counts = [host.slots if has_gpus else 1 for host in hosts]
    if len(hosts) == 1 and not has_gpus:
        counts = [2]
    elif hosts[0] is THIS_MACHINE:  # without a hostfile the number of slots is unknown
        counts = [host_checks.count_gpus(reports[0])]
    first_ranks = [sum(counts[:index]) for index in range(len(hosts))]
    request = json.dumps({"firsts": first_ranks, "hosts": [host.name for host in hosts]})
    common = launcher_commands.forwarded_env(env, [])
    common |= {"PYTHONPATH": ":".join(filter(None, [str(ROOT), common.get("PYTHONPATH", "")])), "OMP_NUM_THREADS": "1"}
    # The job's own ID keeps out ranks of other jobs. Bytecode that root writes could not be removed by the checkout's user.
    common |= {JOB_ID: secrets.token_hex(16), "PYTHONDONTWRITEBYTECODE": "1"}
    common |= {"MASTER_ADDR": master, "MASTER_PORT": str(reports[0].facts["port"]), "WORLD_SIZE": str(sum(counts))}
    commands = []
    for index, (host, count) in enumerate(zip(hosts, counts, strict=True)):
        host_env = {"RANK": str(first_ranks[index]), "LOCAL_WORLD_SIZE": str(count)}
        host_env |= {"GROUP_RANK": str(index), "GROUP_WORLD_SIZE": str(len(hosts))}
        host_env |= {"LOCAL_RANK": "0"} if count == 1 else {}
        host_env |= {} if host.devices is None else {"CUDA_VISIBLE_DEVICES": ",".join(map(str, host.devices))}
        argv = [sys.executable, "-m", "dtrain.commands.link_test", request]
        commands.append(HostCommand(host.name, argv, {**common, **host_env}))
    launcher_signals = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1})
    return MultiHostJob("the link test", commands, ROOT, launcher_signals=launcher_signals)


class _CapturedOutput:
    """An output sink that collects what the ranks print.

    Attributes:
        texts: by stream name, `out` or `err`.
    """

    def __init__(self) -> None:
        self.texts: dict[str, str] = {"out": "", "err": ""}

    def show(self, index: int, frame: Mapping[str, str]) -> None:
        for name, text in frame.items():
            self.texts[name] += text

    def finish(self) -> None:
        return


def measure_links(job: MultiHostJob) -> tuple[Mapping[str, Any] | None, str]:
    """Returns what the ranks measured, or None and why they failed.

    Raises:
        Interrupted: a signal stopped this process and its ranks. Their output then says nothing about the hosts.
    """
    output = _CapturedOutput()
    outcome = run_job(job, output=output)
    if outcome.stop_signal is not None:
        raise Interrupted(f"Stopped by {signal.Signals(outcome.stop_signal).name}.")
    messages = [message for line in output.texts["out"].splitlines() if isinstance(message := _parse(line), dict)]
    measured = next((message for message in messages if "pairs" in message), None)
    if outcome.code == 0 and measured is not None:
        return measured, ""
    problems = [str(message["problem"]) for message in messages if "problem" in message]
    error_lines = output.texts["err"].strip().splitlines()
    hung = [line for line in error_lines if line.startswith(HUNG)]
    if hung:
        links = [f" between {' and '.join(message['next'])}" for message in messages if "next" in message] or [""]
        error_lines = [f"no answer within {hung[0].removeprefix(HUNG).partition(')')[0]}{links[-1]}"]
    problem = (problems[:1] or error_lines[-1:] or [outcome.message])[0]
    return None, " ".join(problem.split())


def _parse(line: str) -> Any:
    try:
        return json.loads(line)
    except ValueError:  # output of a library
        return None
