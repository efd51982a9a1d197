"""Starts the contestants of a row and lets them compute in turns; or runs them whole, one after the other.

Nothing here looks at what a contestant is: it gets a Spec and answers with times, or with counts.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.benchmarks.suite import machine
from tests.benchmarks.suite.gate import send
from tests.benchmarks.suite.spec import Spec

START_TIMEOUT_S = 300
BLOCK_TIMEOUT_S = 600
END_TIMEOUT_S = 120
STOP_TIMEOUT_S = 20
RUN_TIMEOUT_S = 3600
TAIL = 4000


@dataclass
class Lane:
    """What is known of one contestant.

    Attributes:
        status: "ran", "not installed", or why there are no figures.
        samples: one list per quantity, e.g. cpu_s; the n-th values of all contestants were measured one after another.
        figures: numbers that are the same in every run, or taken once.
    """

    name: str
    status: str = "ran"
    samples: dict[str, list[float]] = field(default_factory=dict)
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def ran(self) -> bool:
        return self.status == "ran"

    def add(self, **values: float) -> None:
        for name, value in values.items():
            self.samples.setdefault(name, []).append(value)


class ContestantError(Exception):
    """A contestant's process ended with an error, or did not answer in time; the message ends with what it printed."""


class Process:
    """A contestant's process, or its launcher if it has several ranks. Killed with all its children at the end."""

    def __init__(self, command: Sequence[str], output: Path, environment: Mapping[str, str] | None = None) -> None:
        output.mkdir(parents=True, exist_ok=True)
        self._log = output / "log.txt"
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                cwd=machine.ROOT,
                env={**quiet_environment(), **(environment or {})},
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._process.poll() is None:
            self._process.terminate()  # torchrun's ranks are in groups of their own: it ends them
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_TIMEOUT_S)
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(END_TIMEOUT_S)

    def wait(self, timeout: float) -> float:
        """Waits for the end; returns the CPU time of the process and of the children that it has waited for."""
        deadline = time.monotonic() + timeout
        while True:
            pid, status, usage = os.wait4(self._process.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > deadline:
                raise ContestantError(f"did not end within {timeout:.0f} s\n{self.tail()}")
            time.sleep(0.01)
        self._process.returncode = code = os.waitstatus_to_exitcode(status)
        if code != 0:
            raise ContestantError(f"exit {code}\n{self.tail()}")
        return usage.ru_utime + usage.ru_stime

    def has_ended(self) -> bool:
        return self._process.poll() is not None

    def tail(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")[-TAIL:].strip()


class Runner:
    """A contestant that waits at its gate between two blocks."""

    def __init__(self, spec: Spec, stack: ExitStack) -> None:
        spec.output.mkdir(parents=True, exist_ok=True)
        address = spec.output / "gate"
        self.spec = replace(spec, gate=address)
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(address))
        listener.listen(1)
        listener.settimeout(1)
        self.process = stack.enter_context(Process(command_of(self.spec), spec.output, environment_of(spec)))
        connection = stack.enter_context(self._accept(listener))
        connection.settimeout(BLOCK_TIMEOUT_S)
        self._file = stack.enter_context(connection.makefile("rw", encoding="utf-8"))
        self._receive()  # the warm-up

    def _accept(self, listener: socket.socket) -> socket.socket:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            try:
                return listener.accept()[0]
            except TimeoutError:
                if self.process.has_ended():
                    break
        raise ContestantError(f"did not start\n{self.process.tail()}")

    def _receive(self) -> dict[str, float]:
        try:
            line = self._file.readline()
        except TimeoutError:
            line = ""
        if not line:
            raise ContestantError(f"stopped in its steps\n{self.process.tail()}")
        message: dict[str, float] = json.loads(line)
        return message

    def run_block(self) -> dict[str, float]:
        """Lets the contestant compute one block; returns its times per step, in seconds."""
        self._go()
        message = self._receive()
        return {name: message[name] / self.spec.block for name in ("cpu_s", "wall_s")}

    def finish(self) -> dict[str, Any]:
        """Lets it run to its end; returns what it found."""
        self._go()
        self.process.wait(END_TIMEOUT_S)
        return result_of(self.spec)

    def _go(self) -> None:
        send(self._file, {"go": True})


def race(specs: Sequence[Spec], *, rounds: int) -> list[Lane]:
    """Runs all contestants in turns; returns their times per step.

    Each round takes one block of each, every second round in the opposite order. A spec's steps are set here.
    """
    lanes = [Lane(spec.contestant.name, spec.contestant.unavailable() or "ran") for spec in specs]
    with ExitStack() as stack:
        runners: dict[str, Runner] = {}
        for lane, spec in zip(lanes, specs, strict=True):
            if lane.ran:
                full = replace(spec, steps=spec.warm + rounds * spec.block)
                _attempt(lane, lambda full=full, lane=lane: runners.update({lane.name: Runner(full, stack)}))  # type: ignore[misc]
        for turn in range(rounds):
            for lane in lanes if turn % 2 == 0 else reversed(lanes):
                if lane.ran:
                    _attempt(lane, lambda lane=lane: lane.add(**runners[lane.name].run_block()))  # type: ignore[misc]
        for lane in lanes:
            if lane.ran:
                _attempt(lane, lambda lane=lane: lane.figures.update(runners[lane.name].finish()))  # type: ignore[misc]
    return lanes


def run_whole(spec: Spec) -> dict[str, Any]:
    """Runs one contestant from start to end; returns what it found, with its whole CPU and wall time.

    Raises:
        ContestantError: it failed.
    """
    home = str(spec.cache_folder)
    cpu, wall = run_command(command_of(spec), spec.output, {"HF_HOME": home, "XDG_CACHE_HOME": home})
    return {**result_of(spec), "whole_cpu_s": cpu, "whole_wall_s": wall}


def run_command(
    command: Sequence[str], output: Path, environment: Mapping[str, str] | None = None
) -> tuple[float, float]:
    """Runs a command to its end; returns CPU time (children included) and wall time, in seconds."""
    begin = time.perf_counter()
    with Process(command, output, environment) as process:
        cpu = process.wait(RUN_TIMEOUT_S)
    return cpu, time.perf_counter() - begin


def count(specs: Sequence[Spec]) -> list[Lane]:
    """Runs each contestant once, counting; nothing is timed, so two run at a time."""
    lanes = [Lane(spec.contestant.name, spec.contestant.unavailable() or "ran") for spec in specs]
    pairs = [(lane, replace(spec, counted=True)) for lane, spec in zip(lanes, specs, strict=True) if lane.ran]
    for start in range(0, len(pairs), 2):
        with ExitStack() as stack:
            group = pairs[start : start + 2]
            started = [stack.enter_context(Process(command_of(spec), spec.output)) for _, spec in group]
            for (lane, spec), process in zip(group, started, strict=True):
                _attempt(lane, lambda process=process: process.wait(START_TIMEOUT_S))  # type: ignore[misc]
                if lane.ran:
                    lane.figures = result_of(spec)
    return lanes


def result_of(spec: Spec) -> dict[str, Any]:
    """Returns what rank 0 found; tokens are added up over the ranks."""
    results = [
        json.loads((spec.output / f"result-{rank}.json").read_text(encoding="utf-8")) for rank in range(spec.ranks)
    ]
    laps = [_added(list(lap)) for lap in zip(*(result.get("laps", []) for result in results), strict=True)]
    return {**_added(results), "laps": laps}


def _added(counts: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the first rank's, with the tokens of all ranks."""
    tokens = {name: sum(count[name] for count in counts) for name in counts[0] if name.startswith("tokens_")}
    return {**counts[0], **tokens}


def command_of(spec: Spec) -> list[str]:
    """Returns the command line of a contestant's process, or of torchrun for several ranks."""
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(spec.ranks)] if spec.ranks > 1 else []
    )
    return [sys.executable, *launcher, "-m", "tests.benchmarks.suite.worker", str(spec.write())]


def quiet_environment() -> dict[str, str]:
    """Returns the environment of every contestant: one thread per rank, no network, no GPU."""
    return {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONDONTWRITEBYTECODE": "",  # else all of dtrain is compiled at each start, and no library is
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(machine.ROOT), os.environ.get("PYTHONPATH")])),
    }


def environment_of(spec: Spec) -> dict[str, str]:
    """Returns what a contestant's environment has besides: the GPUs of this process, if it may use them."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return {"CUDA_VISIBLE_DEVICES": "0" if visible is None else visible} if spec.gpu else {}


def _attempt(lane: Lane, action: Any) -> None:
    """Does it, or writes into the lane why it failed: the row goes on with the others."""
    try:
        action()
    except (ContestantError, OSError, subprocess.SubprocessError) as error:
        lane.status = f"failed: {error}"
