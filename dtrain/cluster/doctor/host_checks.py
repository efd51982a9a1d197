"""Evaluates the facts about each host: reports in, findings out. Pure. network_checks.py covers the network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dtrain.cluster.doctor.findings import OK, RED, WARN, Finding, compare_values
from dtrain.cluster.preflight import CLOCK_WARNING_S, MAX_CLOCK_OFFSET_S

MIN_SHM, GOOD_SHM = 128 << 20, 1 << 30
"""Minimum size of /dev/shm in bytes. A container has 64 MiB by default. Writing past the end kills the process with SIGBUS."""

MIN_OPEN_FILES, GOOD_OPEN_FILES = 1024, 4096
"""Limit of open files. Below the first, sockets to other ranks and pipes of workers exhaust it; below the second they may."""

MIN_DISK, GOOD_DISK = 1 << 30, 10 << 30
"""Minimum free bytes where runs are written. A checkpoint of BERT-base with AdamW's moments takes 1.3 GB."""

MIN_RANK_MEMORY = 2 << 30
"""Minimum available memory for each rank, in bytes."""

MIN_LOCKED_MEMORY = 1 << 30
"""Minimum number of bytes that may be locked. InfiniBand locks its buffers."""

SAME_VERSIONS = "install the same versions everywhere: pip install -c constraints.txt . in the .venv of each host"

SAME_PYTHON = "recreate .venv there with the Python of the others: PYTHON=/path/to/it launch/quickstart"

SAME_BUILD = "install torch from the same wheel index on every host; {name} is part of it"


@dataclass(frozen=True)
class HostReport:
    """The known facts about one host.

    Attributes:
        host: the host's name.
        slots: number of ranks on the host.
        problem: why nothing is known; empty if the host answered.
        facts: the answer of agent.collect_facts; empty if there is a problem.
        clock_offset_s: smallest possible offset of its clock from this machine's; positive if its clock is ahead.
        is_local: whether the host is this machine.
        check: the check that the problem belongs to: ssh, python or answer.
        devices: numbers of the GPUs that ranks use; None for the first ones.
    """

    host: str
    slots: int
    problem: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)
    clock_offset_s: float = 0.0
    is_local: bool = False
    check: str = "ssh"
    devices: tuple[int, ...] | None = None


HostCheck = Callable[[HostReport], list[Finding]]


def check_hosts(reports: Sequence[HostReport], *, root: str, folder: str) -> list[Finding]:
    """Returns all findings about single hosts, in the order in which they are shown.

    Args:
        root: where dtrain must be on each host.
        folder: the working folder of a job.
    """
    findings = [finding for report in reports for finding in _check_ssh(report)]
    good = [report for report in reports if not report.problem]
    findings += _check_versions(good)
    findings += _check_code(good, root)
    name_checks = [_check_host_name] if len(reports) > 1 else []  # a single machine gives its address to no other
    checks: list[HostCheck] = [
        _folder_check(folder),
        _check_clock,
        *name_checks,
        _check_shm,
        _check_open_files,
        _check_locked_memory,
        _check_run_folder,
        _check_hub_cache,
        _check_memory,
        _check_cores,
    ]
    for check in checks:
        findings += [finding for report in good for finding in check(report)]
    return [*findings, *_check_machines(good), *_check_gpus(good)]


def split_message(message: str, host: str) -> tuple[str, str]:
    """Splits a message as ssh.explain_exit writes it into the problem and the fix."""
    problem, _, fix = message.removeprefix(f"{host}: ").rstrip(".").partition(". ")
    return problem, fix or "check the host and the network to it, then run doctor again"


def _check_ssh(report: HostReport) -> list[Finding]:
    if not report.problem:
        found = "this machine" if report.is_local else "logs in without a password"
        return [Finding("ssh", (report.host,), OK, found)]
    problem, fix = split_message(report.problem, report.host)
    return [Finding(report.check, (report.host,), RED, problem, fix)]


def _check_versions(good: Sequence[HostReport]) -> list[Finding]:
    """Returns one row for all packages whose versions agree, and rows for each package that differs."""
    if not good:
        return []
    versions = {report.host: {"python": report.facts["python"], **report.facts["versions"]} for report in good}
    names = list(dict.fromkeys(name for host_versions in versions.values() for name in host_versions))
    findings, equal = [], []
    for name in names:
        values = {host: str(host_versions.get(name, "none")) for host, host_versions in versions.items()}
        if len(set(values.values())) == 1:
            equal.append(f"{name} {values[good[0].host]}")
        else:
            fix = SAME_PYTHON if name == "python" else SAME_VERSIONS
            findings += compare_values(name, values, state=RED, fix=fix)
    without_torch = tuple(host for host, host_versions in versions.items() if "torch" not in host_versions)
    if without_torch and "torch" not in {finding.check for finding in findings}:
        fix = "install dtrain in the .venv that runs this"
        findings.append(Finding("torch", without_torch, RED, "not installed", fix))
    hosts = tuple(report.host for report in good)
    return [Finding("versions", hosts, OK, ", ".join(equal)), *findings]


def _check_code(good: Sequence[HostReport], root: str) -> list[Finding]:
    hashes = {report.host: report.facts["code"][:12] for report in good if report.facts["code"] is not None}
    missing = tuple(report.host for report in good if report.facts["code"] is None)
    fix = "check out the same commit of dtrain on every host, or share its folder"
    findings = [
        Finding(each.check, each.hosts, each.state, f"code {each.found}", each.fix)
        for each in compare_values("dtrain", hashes, state=RED, fix=fix)
    ]
    if missing:
        fix = f"copy dtrain to {root} on every host, or share that folder"
        findings.append(Finding("dtrain", missing, RED, f"it is not at {root}", fix))
    return findings


def _folder_check(folder: str) -> HostCheck:
    def check_folder(report: HostReport) -> list[Finding]:
        if report.facts["folder"]:
            return []
        fix = f"create it there, or start from a folder that every host has: mkdir -p {folder}"
        return [Finding("folder", (report.host,), RED, f"a job's working folder {folder} does not exist", fix)]

    return check_folder


def _check_clock(report: HostReport) -> list[Finding]:
    offset = report.clock_offset_s
    if abs(offset) <= CLOCK_WARNING_S:
        return [Finding("clock", (report.host,), OK, f"within {CLOCK_WARNING_S:g} s of this machine's")]
    side = "ahead of" if offset > 0 else "behind"
    fix = "synchronize both clocks over the network: apt-get install chrony"
    state = RED if abs(offset) > MAX_CLOCK_OFFSET_S else WARN  # the same limit as at launch
    return [Finding("clock", (report.host,), state, f"{abs(offset):.0f} s {side} this machine's", fix)]


def _check_host_name(report: HostReport) -> list[Finding]:
    name, address = report.facts["host"], report.facts["own_address"]
    if address is None:
        found, problem = f"{name} does not resolve there", "a plain `torchrun --rdzv-backend c10d` fails"
    elif address.startswith("127."):
        found, problem = f"{name} resolves to {address} there", "other programs send that address to their peers"
    else:
        return [Finding("host name", (report.host,), OK, "resolves to an address that other hosts can reach")]
    fix = f"set the network address of {name} in /etc/hosts there; dtrain does not need it, but {problem}"
    return [Finding("host name", (report.host,), WARN, found, fix)]


def _check_shm(report: HostReport) -> list[Finding]:
    shm = report.facts["shm"]
    if shm is None:
        fix = "mount -t tmpfs -o size=8G shm /dev/shm"
        return [Finding("/dev/shm", (report.host,), WARN, "does not exist: data workers and NCCL use it", fix)]
    if not shm.get("writable"):
        fix = "chmod 1777 /dev/shm; if it is mounted read-only: mount -o remount,rw /dev/shm"
        problem = shm.get("problem") or "not writable"
        return [Finding("/dev/shm", (report.host,), RED, f"{problem}: data workers and NCCL need it", fix)]
    if shm["total"] >= GOOD_SHM and shm["free"] >= MIN_SHM:
        return [Finding("/dev/shm", (report.host,), OK, "enough")]
    found = f"{format_bytes(shm['free'])} of {format_bytes(shm['total'])} free: when it is full, workers and NCCL get SIGBUS"
    fix = "mount -o remount,size=8G /dev/shm; in a container: docker run --shm-size 8g, or --ipc=host"
    state = RED if min(shm["total"], shm["free"]) < MIN_SHM else WARN
    return [Finding("/dev/shm", (report.host,), state, found, fix)]


def _check_open_files(report: HostReport) -> list[Finding]:
    soft, hard = report.facts["open_files"]
    if soft is None or soft >= GOOD_OPEN_FILES:
        return [Finding("open files", (report.host,), OK, f"limit {GOOD_OPEN_FILES} or more")]
    fix = "ulimit -n 65536; permanently, in /etc/security/limits.conf: * - nofile 65536"
    state = RED if soft < MIN_OPEN_FILES else WARN
    return [Finding("open files", (report.host,), state, f"limit {soft} (hard limit {hard or 'none'})", fix)]


def _check_locked_memory(report: HostReport) -> list[Finding]:
    if not report.facts["infiniband"]:
        return [Finding("locked memory", (report.host,), OK, "no InfiniBand, which would need it")]
    soft, _ = report.facts["locked_memory"]
    if soft is None or soft >= MIN_LOCKED_MEMORY:
        return [Finding("locked memory", (report.host,), OK, "enough for InfiniBand")]
    found = f"limit {format_bytes(soft)}: InfiniBand cannot register its buffers"
    fix = "* - memlock unlimited in /etc/security/limits.conf; in a container: --ulimit memlock=-1"
    return [Finding("locked memory", (report.host,), RED, found, fix)]


def _check_run_folder(report: HostReport) -> list[Finding]:
    return _check_disk(
        "run folder", report.host, report.facts["runs"], "set run.output_dir to a larger disk, or free space"
    )


def _check_hub_cache(report: HostReport) -> list[Finding]:
    cache, runs = report.facts["hf_cache"], report.facts["runs"]
    if cache == runs:
        return []
    return _check_disk("hub cache", report.host, cache, "set HF_HOME to a larger disk, or free space", worst=WARN)


def _check_disk(check: str, host: str, disk: Mapping[str, Any] | None, fix: str, *, worst: str = RED) -> list[Finding]:
    """Returns the finding about a folder's disk.

    Args:
        disk: as host_facts.disk_space gives it.
        worst: the state of a disk that cannot be used.
    """
    if disk is None:
        return [Finding(check, (host,), worst, "neither it nor any folder above it exists", fix)]
    path = disk["path"]
    if "problem" in disk:
        fix = f"check the file system and the mode of {path} there, or {fix}"
        return [Finding(check, (host,), worst, f"cannot access {path}: {disk['problem']}", fix)]
    found = f"{format_bytes(disk['free'])} free in {path}"
    if not disk["writable"]:
        return [Finding(check, (host,), worst, f"{path} is not writable", fix)]
    if disk["free"] < MIN_DISK:
        return [Finding(check, (host,), worst, found, fix)]
    if disk["free"] < GOOD_DISK:
        return [Finding(check, (host,), WARN, found, fix)]
    return [Finding(check, (host,), OK, f"writable, {format_bytes(GOOD_DISK)} or more free in {path}")]


def _check_memory(report: HostReport) -> list[Finding]:
    memory = report.facts["memory"]
    if memory is None:
        return []
    if memory["available"] / report.slots >= MIN_RANK_MEMORY:
        return [Finding("memory", (report.host,), OK, f"{format_bytes(MIN_RANK_MEMORY)} or more for each rank")]
    amounts = f"{format_bytes(memory['available'])} of {format_bytes(memory['total'])}"
    found = f"{amounts} available for {format_ranks(report.slots)}"
    return [Finding("memory", (report.host,), WARN, found, "end other programs there, or reduce its slots")]


def _check_cores(report: HostReport) -> list[Finding]:
    cores, quota = float(report.facts["cores"]), report.facts["cpu_limit"]
    usable = min(cores, quota or cores)
    if usable >= report.slots:
        return [Finding("cores", (report.host,), OK, "one or more for each rank")]
    count = f"{cores:g}" if quota is None or quota >= cores else f"{quota:g} of {cores:g} (cgroup limit)"
    fix = f"slots={max(int(usable), 1)} in the hostfile, or a larger limit"
    return [Finding("cores", (report.host,), WARN, f"{count} for {format_ranks(report.slots)}", fix)]


def _check_machines(good: Sequence[HostReport]) -> list[Finding]:
    by_machine: dict[str, list[str]] = {}
    for report in good:
        by_machine.setdefault(report.facts["machine"], []).append(report.host)
    fix = "list each machine once in the hostfile, with slots for all its ranks"
    return [
        Finding("machines", tuple(hosts), RED, "these names are the same machine", fix)
        for hosts in by_machine.values()
        if len(hosts) > 1
    ]


def count_gpus(report: HostReport) -> int:
    """Returns the number of GPUs that ranks can use on a host."""
    return int((report.facts["gpus"] or {}).get("usable", 0))


def _check_gpus(good: Sequence[HostReport]) -> list[Finding]:
    if not any(report.facts["gpus"] for report in good):
        hosts = tuple(report.host for report in good)
        return [Finding("GPUs", hosts, OK, "none: ranks compute on the CPU")] if good else []
    # If torch sees no GPU on any host, a job runs on the CPUs.
    missing_state = RED if any(map(count_gpus, good)) else WARN
    findings = [finding for report in good for finding in _check_host_gpus(report, missing_state)]
    for name, key, state, fix in (
        ("driver", "driver", WARN, "install the same version of NVIDIA's driver on every host"),
        ("CUDA", "cuda", RED, SAME_BUILD.format(name="CUDA")),
        ("NCCL", "nccl", RED, SAME_BUILD.format(name="NCCL")),
    ):
        values = {each.host: str(value) for each in good if count_gpus(each) and (value := each.facts["gpus"].get(key))}
        findings += compare_values(name, values, state=state, fix=fix)
    return findings


def _check_host_gpus(report: HostReport, missing_state: str) -> list[Finding]:
    """Returns the findings about one host's GPUs.

    Args:
        missing_state: the state of a host without usable GPUs.
    """
    gpus, hosts = report.facts["gpus"], (report.host,)
    if gpus is None:
        if missing_state == WARN:
            return [Finding("GPUs", hosts, OK, "none: ranks compute on the CPU")]
        return [Finding("GPUs", hosts, RED, "none, but other hosts have some", f"remove it: --exclude {report.host}")]
    count, names = count_gpus(report), gpus["names"]
    if "torch_problem" in gpus:
        fix = "reinstall torch there; if the driver hangs, restart the host"
        return [Finding("GPUs", hosts, RED, f"torch cannot list its devices: {gpus['torch_problem']}", fix)]
    if count == 0:
        fix = "install the torch build for these GPUs, and a driver that is new enough for it"
        found = f"{len(names)} x {names[0]}" if names else gpus["driver_problem"]
        consequence = ": ranks compute on the CPU" if missing_state == WARN else ""
        return [Finding("GPUs", hosts, missing_state, f"{found}, but torch sees none{consequence}", fix)]
    findings = [Finding("GPUs", hosts, OK, f"{count} x {names[0]}")]
    highest = max(report.devices or (report.slots - 1,))
    if highest >= count and report.devices is not None:
        found = f"device {highest} does not exist: the host has {count}, numbered from 0"
        findings = [Finding("GPUs", hosts, RED, found, "select other devices: --include, --exclude")]
    elif highest >= count:
        found = f"{count} for {format_ranks(report.slots)}"
        findings = [Finding("GPUs", hosts, RED, found, f"slots={count} in the hostfile")]
    if "driver_problem" in gpus:
        fix = "install nvidia-smi; in a container: NVIDIA_DRIVER_CAPABILITIES=compute,utility; or repair the driver"
        findings.append(Finding("driver", hosts, WARN, f"unknown version: {gpus['driver_problem']}", fix))
    return findings


def format_ranks(count: int) -> str:
    """Returns a number of ranks as text."""
    return "1 rank" if count == 1 else f"{count} ranks"


def format_bytes(count: float) -> str:
    """Returns a number of bytes as text."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
