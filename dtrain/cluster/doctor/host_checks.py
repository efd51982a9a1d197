"""What hosts said of themselves, judged: answers in, findings out. Pure; network_checks.py judges what is between them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dtrain.cluster.doctor.findings import OK, RED, WARN, Finding, side_by_side
from dtrain.cluster.preflight import LARGEST_OFFSET_S, WORST_OFFSET_S

LEAST_SHM, GOOD_SHM = 128 << 20, 1 << 30
"""Bytes of /dev/shm. A container has 64 MiB unless it is asked for more, and writing past the end kills with SIGBUS."""

LEAST_FILES, GOOD_FILES = 1024, 4096
"""Open files: below the first, sockets to other ranks and workers' pipes run out; below the second, they may."""

LEAST_DISK, GOOD_DISK = 1 << 30, 10 << 30
"""Bytes free where runs are written. A checkpoint of BERT-base with AdamW's moments is 1.3 GB."""

LEAST_MEMORY = 2 << 30
"""Bytes available for each rank."""

LEAST_LOCKED = 1 << 30
"""Bytes that may be locked, where InfiniBand registers its buffers."""

SAME_PIN = "install the same everywhere: pip install -c constraints.txt . in the .venv of each host"

SAME_PYTHON = "make .venv anew there with the Python of the others: PYTHON=/path/to/it launch/quickstart"

SAME_BUILD = "install torch from the same wheel index on every host: its {name} comes with it"


@dataclass(frozen=True)
class Answer:
    """What is known of one host.

    problem: why nothing is; it then has no more. check: whose problem that is: ssh, python or answer.
    look: what agent.look gave. clock_offset_s: how far its clock is ahead of this machine's, at least.
    is_here: it is this machine. devices: which of its GPUs ranks are to use; None for the first ones.
    """

    host: str
    slots: int
    problem: str = ""
    look: Mapping[str, Any] = field(default_factory=dict)
    clock_offset_s: float = 0.0
    is_here: bool = False
    check: str = "ssh"
    devices: tuple[int, ...] | None = None


def of_hosts(answers: Sequence[Answer], *, root: str, folder: str) -> list[Finding]:
    """All findings about the hosts themselves, in the order in which they are shown.

    Args:
        root: where dtrain has to lie on each. folder: where the job is to run.
    """
    found = [finding for answer in answers for finding in _ssh(answer)]
    good = [answer for answer in answers if not answer.problem]
    found += _versions(good)
    found += _code(good, root)
    names = [_own_name] if len(answers) > 1 else []  # a machine that is alone gives its address to nobody
    for one in (_folder(folder), _clock, *names, _shm, _open_files, _locked_memory, _runs, _cache, _memory, _cores):
        found += [finding for answer in good for finding in one(answer)]
    return [*found, *_machines(good), *_gpus(good)]


def split(told: str, host: str) -> tuple[str, str]:
    """A sentence of what is wrong and one of what mends it, as shell.py writes them."""
    words = told.removeprefix(f"{host}: ").rstrip(".")
    problem, _, fix = words.partition(". ")
    return problem, fix or "see to the host and the network between, then run doctor again"


def _ssh(answer: Answer) -> list[Finding]:
    if not answer.problem:
        found = "this machine" if answer.is_here else "logged in without being asked anything"
        return [Finding("ssh", (answer.host,), OK, found)]
    problem, fix = split(answer.problem, answer.host)
    return [Finding(answer.check, (answer.host,), RED, problem, fix)]


def _versions(good: Sequence[Answer]) -> list[Finding]:
    """One row where all are alike; else a row for each package that is not."""
    if not good:
        return []
    pins = {answer.host: {"python": answer.look["python"], **answer.look["versions"]} for answer in good}
    names = list(dict.fromkeys(name for mine in pins.values() for name in mine))
    found, alike = [], []
    for name in names:
        values = {host: str(mine.get(name, "none")) for host, mine in pins.items()}
        if len(set(values.values())) == 1:
            alike.append(f"{name} {values[good[0].host]}")
        else:
            found += side_by_side(name, values, state=RED, fix=SAME_PYTHON if name == "python" else SAME_PIN)
    without = tuple(host for host, mine in pins.items() if "torch" not in mine)
    if without and "torch" not in {finding.check for finding in found}:
        found.append(Finding("torch", without, RED, "not installed", "install dtrain in the .venv that runs this"))
    hosts = tuple(answer.host for answer in good)
    return [Finding("versions", hosts, OK, ", ".join(alike)), *found]


def _code(good: Sequence[Answer], root: str) -> list[Finding]:
    there = {answer.host: answer.look["code"][:12] for answer in good if answer.look["code"] is not None}
    missing = tuple(answer.host for answer in good if answer.look["code"] is None)
    found = side_by_side(
        "dtrain", there, state=RED, fix="bring every host to one commit of dtrain, or share its folder"
    )
    if missing:
        fix = f"put dtrain at {root} on every host, or share that folder"
        found.append(Finding("dtrain", missing, RED, f"it is not at {root}", fix))
    return [
        Finding(each.check, each.hosts, each.state, f"code {each.found}", each.fix) if each.hosts[0] in there else each
        for each in found
    ]


def _folder(folder: str) -> Any:
    def judge(answer: Answer) -> list[Finding]:
        if answer.look["folder"]:
            return []
        fix = f"make it there, or run from a folder that every host has: mkdir -p {folder}"
        return [Finding("folder", (answer.host,), RED, f"{folder}, where a job would run, is not there", fix)]

    return judge


def _clock(answer: Answer) -> list[Finding]:
    off = answer.clock_offset_s
    if abs(off) <= LARGEST_OFFSET_S:
        return [Finding("clock", (answer.host,), OK, f"within {LARGEST_OFFSET_S:g} s of this machine's")]
    way = "ahead of" if off > 0 else "behind"
    fix = "let the network set it, here and there: apt-get install chrony"
    state = RED if abs(off) > WORST_OFFSET_S else WARN  # as launch judges it
    return [Finding("clock", (answer.host,), state, f"{abs(off):.0f} s {way} this machine's", fix)]


def _own_name(answer: Answer) -> list[Finding]:
    name, address = answer.look["host"], answer.look["own_address"]
    if address is None:
        found, why = f"{name} does not resolve there", "a bare `torchrun --rdzv-backend c10d` dies of it"
    elif address.startswith("127."):
        found, why = f"{name} is {address} there", "other programs than dtrain give that address to their peers"
    else:
        return [Finding("own name", (answer.host,), OK, "resolves to an address that others can reach")]
    fix = f"give {name} its network address in /etc/hosts there; dtrain finds the interface by itself, but {why}"
    return [Finding("own name", (answer.host,), WARN, found, fix)]


def _shm(answer: Answer) -> list[Finding]:
    shm = answer.look["shm"]
    if shm is None:
        fix = "mount -t tmpfs -o size=8G shm /dev/shm"
        return [Finding("/dev/shm", (answer.host,), WARN, "not there: data workers and NCCL want it", fix)]
    if not shm.get("writable"):
        fix = "chmod 1777 /dev/shm; where it is mounted read-only: mount -o remount,rw /dev/shm"
        told = shm.get("problem") or "cannot be written to"
        return [Finding("/dev/shm", (answer.host,), RED, f"{told}: data workers and NCCL need it", fix)]
    free = f"{size(shm['free'])} of {size(shm['total'])} free"
    if shm["total"] >= GOOD_SHM and shm["free"] >= LEAST_SHM:
        return [Finding("/dev/shm", (answer.host,), OK, "enough")]
    fix = "mount -o remount,size=8G /dev/shm; in a container: docker run --shm-size 8g, or --ipc=host"
    state = RED if min(shm["total"], shm["free"]) < LEAST_SHM else WARN
    return [Finding("/dev/shm", (answer.host,), state, f"{free}: past its end workers and NCCL die of SIGBUS", fix)]


def _open_files(answer: Answer) -> list[Finding]:
    soft, hard = answer.look["open_files"]
    if soft is None or soft >= GOOD_FILES:
        return [Finding("open files", (answer.host,), OK, f"{GOOD_FILES} or more")]
    fix = "ulimit -n 65536, for good in /etc/security/limits.conf: * - nofile 65536"
    state = RED if soft < LEAST_FILES else WARN
    return [Finding("open files", (answer.host,), state, f"{soft} at most (hard limit {hard or 'none'})", fix)]


def _locked_memory(answer: Answer) -> list[Finding]:
    if not answer.look["infiniband"]:
        return [Finding("locked memory", (answer.host,), OK, "only InfiniBand needs it, and there is none")]
    soft, _ = answer.look["locked_memory"]
    if soft is None or soft >= LEAST_LOCKED:
        return [Finding("locked memory", (answer.host,), OK, "enough for InfiniBand")]
    fix = "* - memlock unlimited in /etc/security/limits.conf; in a container: --ulimit memlock=-1"
    return [Finding("locked memory", (answer.host,), RED, f"{size(soft)}: InfiniBand cannot register buffers", fix)]


def _runs(answer: Answer) -> list[Finding]:
    return _disk("run folder", answer.host, answer.look["runs"], "set run.output_dir to a larger disk, or make room")


def _cache(answer: Answer) -> list[Finding]:
    cache, runs = answer.look["hf_cache"], answer.look["runs"]
    if cache == runs:
        return []
    return _disk("hub cache", answer.host, cache, "set HF_HOME to a larger disk, or make room", lowest=WARN)


def _disk(check: str, host: str, disk: Mapping[str, Any] | None, fix: str, *, lowest: str = RED) -> list[Finding]:
    if disk is None:
        return [Finding(check, (host,), lowest, "not there, and nothing above it is", fix)]
    if "problem" in disk:
        mend = f"see to {disk['path']} there (its file system, its mode), or {fix}"
        return [Finding(check, (host,), lowest, f"{disk['path']} cannot be looked at: {disk['problem']}", mend)]
    where = f"{size(disk['free'])} free in {disk['path']}"
    if not disk["writable"]:
        return [Finding(check, (host,), lowest, f"{disk['path']} cannot be written to", fix)]
    if disk["free"] < LEAST_DISK:
        return [Finding(check, (host,), lowest, where, fix)]
    if disk["free"] < GOOD_DISK:
        return [Finding(check, (host,), WARN, where, fix)]
    return [Finding(check, (host,), OK, f"writable, {size(GOOD_DISK)} or more free in {disk['path']}")]


def _memory(answer: Answer) -> list[Finding]:
    memory = answer.look["memory"]
    if memory is None:
        return []
    each = memory["available"] / answer.slots
    if each >= LEAST_MEMORY:
        return [Finding("memory", (answer.host,), OK, f"{size(LEAST_MEMORY)} or more for each rank")]
    found = f"{size(memory['available'])} of {size(memory['total'])} available for {ranks(answer.slots)}"
    return [Finding("memory", (answer.host,), WARN, found, "end what else runs there, or give it fewer slots")]


def _cores(answer: Answer) -> list[Finding]:
    cores, quota = float(answer.look["cores"]), answer.look["cpu_limit"]
    found = (
        f"{cores:g} cores" if quota is None or quota >= cores else f"{quota:g} of {cores:g} cores by its control group"
    )
    if min(cores, quota or cores) >= answer.slots:
        return [Finding("cores", (answer.host,), OK, "one or more for each rank")]
    fix = f"slots={max(int(min(cores, quota or cores)), 1)} in the hostfile, or a larger quota"
    return [Finding("cores", (answer.host,), WARN, f"{found} for {ranks(answer.slots)}", fix)]


def _machines(good: Sequence[Answer]) -> list[Finding]:
    by_machine: dict[str, list[str]] = {}
    for answer in good:
        by_machine.setdefault(answer.look["machine"], []).append(answer.host)
    fix = "name each machine once in the hostfile, with slots for all its ranks"
    return [
        Finding("machines", tuple(hosts), RED, "these names are one machine", fix)
        for hosts in by_machine.values()
        if len(hosts) > 1
    ]


def usable(answer: Answer) -> int:
    """How many GPUs ranks can use there."""
    return int((answer.look["gpus"] or {}).get("usable", 0))


def _gpus(good: Sequence[Answer]) -> list[Finding]:
    if not any(answer.look["gpus"] for answer in good):
        hosts = tuple(answer.host for answer in good)
        return [Finding("GPUs", hosts, OK, "none: ranks compute on the CPU")] if good else []
    # Where torch sees none anywhere, a job runs on the CPUs of all.
    missing = RED if any(map(usable, good)) else WARN
    found = [finding for answer in good for finding in _gpus_of(answer, missing)]
    for name, key, state, fix in (
        ("driver", "driver", WARN, "install the same package of NVIDIA's driver on every host"),
        ("CUDA", "cuda", RED, SAME_BUILD.format(name="CUDA")),
        ("NCCL", "nccl", RED, SAME_BUILD.format(name="NCCL")),
    ):
        values = {a.host: str(value) for a in good if usable(a) and (value := a.look["gpus"].get(key))}
        found += side_by_side(name, values, state=state, fix=fix)
    return found


def _gpus_of(answer: Answer, missing: str) -> list[Finding]:
    """missing: the state of a host without any."""
    gpus, hosts = answer.look["gpus"], (answer.host,)
    if gpus is None:
        if missing == WARN:
            return [Finding("GPUs", hosts, OK, "none: ranks compute on the CPU")]
        return [Finding("GPUs", hosts, RED, "none, but others have some", f"leave it out: --exclude {answer.host}")]
    count, names = usable(answer), gpus["names"]
    if "torch_problem" in gpus:
        fix = "install torch anew there; a driver that hangs needs a restart"
        return [Finding("GPUs", hosts, RED, f"torch does not say what it sees: {gpus['torch_problem']}", fix)]
    if count == 0:
        fix = "install the torch that is built for them, and a driver that is new enough for it"
        told = f"{len(names)} x {names[0]}" if names else gpus["driver_problem"]
        so = ": ranks compute on the CPU" if missing == WARN else ""
        return [Finding("GPUs", hosts, missing, f"{told}, but torch sees none{so}", fix)]
    found = [Finding("GPUs", hosts, OK, f"{count} x {names[0]}")]
    highest = max(answer.devices or (answer.slots - 1,))
    if highest >= count and answer.devices is not None:
        told = f"device {highest} is not there: {count}, numbered from 0"
        found = [Finding("GPUs", hosts, RED, told, "name others: --include, --exclude")]
    elif highest >= count:
        found = [Finding("GPUs", hosts, RED, f"{count} for {ranks(answer.slots)}", f"slots={count} in the hostfile")]
    if "driver_problem" in gpus:
        fix = "put nvidia-smi there: in a container NVIDIA_DRIVER_CAPABILITIES=compute,utility; or mend the driver"
        found.append(Finding("driver", hosts, WARN, f"its version cannot be told: {gpus['driver_problem']}", fix))
    return found


def ranks(count: int) -> str:
    """A number of ranks, in words."""
    return "1 rank" if count == 1 else f"{count} ranks"


def size(count: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"
