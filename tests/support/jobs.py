"""Real jobs for tests: dtrain started by python, torchrun, deepspeed or mpirun, bounded in time, leaving nothing behind.

Launchers put ranks in sessions of their own and a dead launcher's ranks belong to nobody, so a job's processes are
told by a mark in their environment, and only those are ever signalled.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from dtrain.runs import jsonl
from tests.support import tiny

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
MAIN = "dtrain/main.py"
SCRIPT = "runs_dtrain.py"
"""What a test's own script is called that runs dtrain with a fault in it."""

HELPERS = ("dtrain-monitor", "dtrain-launcher")
"""Processes that have a rank's command line, but a name of their own."""

MARK = "DTRAIN_TEST_JOB"
LIMIT_S = 150.0
"""How long a job may take: 10 s is usual, but the machine may be busy."""

SETTINGS = {
    "train.max_steps": "3",
    "train.log_every": "1",
    "train.eval_every": "never",
    "train.global_batch_size": "8",
    "train.micro_batch_size": "2",
    "tracking.tensorboard": "false",
}
ENDLESS = {"train.max_steps": "1000000", "train.epochs": "null", "train.log_every": "5"}


def settings(folder: Path, name: str, **more: object) -> list[str]:
    """A tiny classification run below `folder`. `more`: section__key=value."""
    made = folder.parent / "made"
    if not made.exists():
        tiny.write_cola(made / "cola", train=40, dev=7)
        tiny.write_model(made / "model")
    values = {
        "run.output_dir": str(folder),
        "run.name": name,
        "task.name": "classification",
        "model.name_or_path": str(made / "model"),
        "data.name": "cola",
        "data.path": str(made / "cola"),
        "data.max_length": "32",
        **SETTINGS,
        **{key.replace("__", "."): str(value) for key, value in more.items()},
    }
    return [f"{key}={value}" for key, value in values.items()]


def train(folder: Path, **more: object) -> list[str]:
    """A run without an end, named `run`. more: section__key=value."""
    endless = {key.replace(".", "__"): value for key, value in ENDLESS.items()}
    return settings(folder, "run", **{**endless, **more})


def launcher(name: str) -> str:
    """The program, from the environment that the tests run in; skips the test where it is not installed."""
    beside = BIN / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def python() -> list[str]:
    return [sys.executable, MAIN]


def torchrun(ranks: int = 2, *options: str) -> list[str]:
    return [launcher("torchrun"), *(options or ["--standalone"]), "--nproc-per-node", str(ranks), MAIN]


def forked(ranks: int = 2, *options: str) -> list[str]:
    """dtrain's own launcher."""
    return [*python(), "train", "--ranks", str(ranks), *options]


def forked_script(script: Path, ranks: int = 2) -> list[str]:
    """A test's own script that runs dtrain, on ranks of dtrain's own launcher: half the time of torchrun."""
    return [sys.executable, str(script), "train", "--ranks", str(ranks)]


def deepspeed(*options: str) -> list[str]:
    # Its launcher takes no port 0; one that was free a moment ago is the best there is.
    chosen = options or ("--num_accelerators", "2", "--master_addr", "127.0.0.1")
    return [launcher("deepspeed"), *chosen, "--master_port", str(free_port()), MAIN]


def mpirun(ranks: int = 2) -> list[str]:
    start = [launcher("mpirun"), "--oversubscribe", "--bind-to", "none", "-np", str(ranks)]
    return [*start, sys.executable, MAIN]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@dataclass
class Job:
    """A running job. out, err: the lines it has printed so far, complete once it has ended."""

    process: subprocess.Popen[str]
    mark: str
    out: list[str]
    err: list[str]
    readers: list[threading.Thread]

    @property
    def text(self) -> str:
        return "\n".join([*self.out, *self.err])

    @property
    def said(self) -> list[str]:
        """What dtrain printed, without what launchers print to the same stream."""
        return [line for line in self.out if line.strip() and not line.startswith("[20")]

    def members(self) -> dict[int, list[str]]:
        """Command lines of the job's living processes, by number; the launcher is among them."""
        return {pid: command for pid, command in _processes(self.mark).items() if _is_alive(pid)}

    def ranks(self) -> list[int]:
        """Processes that run dtrain itself, in the order of their ranks."""
        found = [
            pid
            for pid, words in self.members().items()
            if len(words) > 1
            and Path(words[0]).name.startswith("python")
            and any(MAIN in word or word.endswith(SCRIPT) for word in words[1:3])
            and _name(pid) not in HELPERS
        ]
        return sorted(
            found,
            # Forked ranks show the environment of their launcher, which starts them in order.
            key=lambda pid: (
                int(_environment(pid).get("RANK", _environment(pid).get("OMPI_COMM_WORLD_RANK", "0"))),
                pid,
            ),
        )

    def named(self, word: str) -> int:
        """The one process with that word in its command line that is not a rank."""
        found = [
            pid
            for pid, words in self.members().items()
            if any(word in each for each in words[:4]) and pid not in self.ranks()
        ]
        assert len(found) == 1, self.members()
        return found[0]

    def wait_for(self, text: str, *, seconds: float = LIMIT_S) -> None:
        """Until a line of standard output holds `text`."""
        self._wait(lambda: any(text in line for line in self.out), seconds, f"no line with {text!r}")

    def maps(self, pid: int) -> list[str]:
        """The files that a process has in its memory."""
        try:
            return Path(f"/proc/{pid}/maps").read_text().splitlines()
        except OSError:
            return []

    def has_ended(self) -> bool:
        """Whether the launcher has: then what a test waits for may never come."""
        return self.process.poll() is not None

    def gone_within(self, seconds: float) -> bool:
        """Whether no process of the job is left, at the latest after so long."""
        return until(lambda: self.has_ended() and not self.members(), seconds)

    def end(self, seconds: float = LIMIT_S) -> int:
        """Waits for the launcher's end and gives its exit code; the output is complete then."""
        assert until(self.has_ended, seconds), f"it runs {seconds:.0f} s later; it printed:\n{self.text}"
        code: int = self.process.returncode
        for reader in self.readers:
            reader.join(timeout=10)
        return code

    def _wait(self, done: Callable[[], bool], seconds: float, otherwise: str) -> None:
        ended = until(lambda: done() or self.has_ended(), seconds)
        for reader in self.readers if self.has_ended() else ():
            reader.join(timeout=10)
        assert ended, f"nothing happened within {seconds:.0f} s; it printed:\n{self.text}"
        assert done(), f"{otherwise}; it printed:\n{self.text}"


@contextmanager
def started(command: Sequence[str], *, env: Mapping[str, str] | None = None, mark: str | None = None) -> Iterator[Job]:
    """Starts a job in the checkout, in a process group of its own, and kills what is left of it at the end.

    mark: what its processes are told by, for a launcher to which the caller has to hand it.
    """
    mark = mark or uuid.uuid4().hex
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_"))
    }
    own = {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        MARK: mark,
    }
    # What is ignored here would be ignored there: a background job of a shell ignores Ctrl-C, and so would its tests.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**kept, **own, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    finally:
        signal.signal(signal.SIGINT, before)
    job = Job(process, mark, [], [], [])
    for stream, lines in ((process.stdout, job.out), (process.stderr, job.err)):
        job.readers.append(threading.Thread(target=_read, args=(stream, lines), daemon=True))
        job.readers[-1].start()
    try:
        yield job
    finally:
        _clean_up(job)


def run(command: Sequence[str], *, env: Mapping[str, str] | None = None) -> Job:
    """Runs a job to its end."""
    with started(command, env=env) as job:
        job.end()
    return job


def exit_of(folder: Path) -> dict[str, Any]:
    """exit.json of a run folder."""
    found: dict[str, Any] = json.loads((folder / "exit.json").read_text())
    return found


def read_events(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    """The whole lines of metrics.jsonl of one kind; a last one that is being written does not count."""
    return [event for event in jsonl.read_events(folder / "metrics.jsonl") if event["event"] == kind]


def summary_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    return found


def own_traceback(job: Job) -> bool:
    """Whether a Python traceback through dtrain's own code was printed (a launcher may print its own)."""
    return f'File "{ROOT}/dtrain/' in job.text


def _read(stream: Any, lines: list[str]) -> None:
    with stream:
        lines.extend(_each(stream))


def _each(stream: Any) -> Iterator[str]:
    for line in stream:
        yield line.rstrip("\n")


def _clean_up(job: Job) -> None:
    for _ in range(50):  # a launcher may start a process while we look
        left = job.members()
        for pid in left:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        job.process.poll()
        if not left:
            break
        until(lambda: not job.members(), 0.2)
    job.process.wait(10)
    for reader in job.readers:
        reader.join(timeout=10)


def _processes(mark: str) -> dict[int, list[str]]:
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        pid = int(folder.name)
        if _environment(pid).get(MARK) == mark:
            try:
                found[pid] = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:
                continue
    return found


def _environment(pid: int) -> dict[str, str]:
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:  # another user's, or gone
        return {}
    return dict(entry.partition("=")[::2] for entry in entries if "=" in entry)


def _name(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def until(done: Callable[[], bool], seconds: float = LIMIT_S) -> bool:
    """Whether it came about within that time."""
    deadline = time.monotonic() + seconds
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
