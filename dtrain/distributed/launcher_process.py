"""Finds the launcher among the ancestors of this process, and the command that the user typed to start the job."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from dtrain.distributed.process_info import is_running, read_stat
from dtrain.distributed.topology import Topology

LAUNCHER_PATTERNS = {
    "dtrain": r".*",  # the parent, whatever started it
    "torchrun": r"torchrun|torch\.distributed\.(run|launch)",
    # launch.py is the parent; the runner above it is what the user started, and its death leaves launch.py alive.
    "deepspeed": r"deepspeed|deepspeed\.launcher\.runner",
    "openmpi": r"mpirun|mpiexec|prterun|prted|orterun|orted",
    "mpich": r"mpirun|mpiexec(\.hydra)?|hydra_\w+|pmi_proxy",
    "intelmpi": r"mpirun|mpiexec(\.hydra)?|hydra_\w+|pmi_proxy",
    "slurm": r"slurmstepd.*",
}
"""By topology.launcher, a pattern for a word in the command line of its process. `none` and `env` have no launcher."""

MAX_WORDS = 6
"""How many words of a command line are matched: the interpreter and its options come before the name."""

MAX_GENERATIONS = 5
"""How many ancestors are searched: shells and wrappers may come between the launcher and this process."""


class Ancestor(NamedTuple):
    """A process between the launcher and this one, or the launcher.

    Attributes:
        pid: process id.
        started: start time, as in ProcessIdentity.
        command: command line, separated by NUL.
    """

    pid: int
    started: str
    command: str

    @property
    def is_running(self) -> bool:
        """Whether the process is still running."""
        return is_running(self.pid, self.started)


def how_to_go_on(topology: Topology, changes: Sequence[str] = ()) -> str:
    """Returns a sentence that says which command goes on with a run that was stopped.

    Args:
        changes: settings that the first command did not have.
    """
    words = typed_command(topology)
    if words is None:
        return f"The same command{' with ' + ' '.join(changes) if changes else ''} goes on."
    return f"This command goes on:\n{shlex.join([*words, *changes])}"


def typed_command(topology: Topology) -> tuple[str, ...] | None:
    """Returns the words of the command that started the job, launcher included.

    The answer of the first call is kept: a launcher may be gone when a message needs its command.

    Returns:
        None where it is not known: Python code called `fit`, several nodes, a launch script, srun.
    """
    if topology.num_nodes > 1 or topology.exit_file is not None or topology.launcher in ("env", "slurm"):
        return None
    return _typed_words(topology.launcher)


@cache
def _typed_words(launcher: str) -> tuple[str, ...] | None:
    if not (sys.argv and re.fullmatch(r"main\.py|__main__\.py|dtrain", Path(sys.argv[0]).name)):
        return None
    words = list(sys.orig_argv)
    if launcher not in ("none", "dtrain"):  # a rank that dtrain has forked has its launcher's command line
        chain = find_ancestors(os.getpid(), LAUNCHER_PATTERNS[launcher])
        if not chain or not is_launcher(chain[-1], LAUNCHER_PATTERNS[launcher]):
            return None
        words = chain[-1].command.rstrip("\0").split("\0")
    return _as_typed(words)


def _as_typed(words: Sequence[str]) -> tuple[str, ...]:
    """Removes the interpreter that the kernel puts before a script with a `#!` line, and the folder of one on the PATH."""
    if Path(words[0]).name == "prterun":  # what Open MPI's mpirun becomes
        return ("mpirun", *words[1:])
    script = words[1] if len(words) > 1 else ""
    is_python = re.fullmatch(r"python[\d.]*", Path(words[0]).name) is not None
    if not (is_python and "/" in script and not script.endswith(".py") and os.access(script, os.X_OK)):
        return tuple(words)
    name = Path(script).name
    return (name if shutil.which(name) == script else script, *words[2:])


def find_ancestors(pid: int, launcher: str) -> list[Ancestor]:
    """Returns the processes from the parent of `pid` up to the launcher; the parent alone if there is no launcher.

    Args:
        launcher: regular expression that one word of the launcher's command line matches, without its folder.
    """
    chain: list[Ancestor] = []
    for _ in range(MAX_GENERATIONS):
        parent = _parent(pid)
        process = _read_ancestor(parent) if parent is not None else None
        if process is None:
            break
        chain.append(process)
        if is_launcher(process, launcher):
            return chain
        pid = process.pid
    return chain[:1]


def is_launcher(process: Ancestor, launcher: str) -> bool:
    """Returns whether a word of the command line matches the launcher's pattern."""
    words = process.command.split("\0")[:MAX_WORDS]
    return any(re.fullmatch(launcher, word.rpartition("/")[2]) for word in words)


def _parent(pid: int) -> int | None:
    stat = read_stat(pid)
    return int(stat[1]) if stat is not None and int(stat[1]) > 0 else None


def _read_ancestor(pid: int) -> Ancestor | None:
    stat = read_stat(pid)
    try:
        command = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return None
    return None if stat is None else Ancestor(pid, stat[19], command)
