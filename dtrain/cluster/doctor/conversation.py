"""The near end of the doctor's questions: one conversation with each host, all at once, each answer waited for so long.

On a host runs nothing but `python` with a text that comes through ssh (agent.py), so it also works where dtrain is not.
Closing its standard input ends it, whoever closes it.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any

from dtrain.cluster.remote_source import CORES, HERE, PROBE, as_one_text
from dtrain.cluster.ssh import CONNECT_S, is_here, start_on, why_not

TEXTS = (CORES, PROBE, HERE / "doctor" / "host_facts.py", HERE / "doctor" / "agent.py")

BOOT = (
    # Nothing of the folder that it starts in may stand for a library.
    "import sys; sys.path[:] = filter(None, sys.path); import json; there = {'__name__': 'asked'}; "
    "exec(json.loads(sys.stdin.readline()), there); there['answer']()"
)

SSH_FAILED = 255
"""ssh's own exit code; every other one is the remote command's."""

END_S = 5.0
"""How long an agent may take to end once its input has."""


@dataclass(frozen=True)
class Said:
    """One answer.

    problem: why there is none. check: whose problem that is, ssh, python or answer.
    sent, received: by this machine's clock, seconds since 1970.
    """

    found: Mapping[str, Any]
    problem: str = ""
    sent: float = 0.0
    received: float = 0.0
    check: str = "answer"


class Talk:
    """A conversation with one host. problem: why it has ended, once it has. is_here: the host is this machine."""

    def __init__(self, host: str, text: str) -> None:
        self.host, self.problem, self.is_here = host, "", is_here(host)
        self._check = "answer"
        self._number = 0
        self._answers: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self._complaints: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._process = start_on(host, [sys.executable, "-c", BOOT])
        except FileNotFoundError:
            self._check = "ssh"
            self.problem = f"{host}: there is no ssh on this machine. Install it: apt-get install openssh-client"
            return
        self._readers = [
            threading.Thread(target=read, daemon=True) for read in (self._read_answers, self._read_complaints)
        ]
        for reader in self._readers:
            reader.start()
        self._write(text)

    def ask(self, order: Mapping[str, Any], *, timeout_s: float) -> Said:
        """Sends an order and waits for its answer; a host that does not give one in time is not asked again."""
        self._number += 1
        sent, deadline = time.time(), time.monotonic() + timeout_s
        if not self.problem:
            self._write({**order, "number": self._number})
        while not self.problem:
            try:
                found = self._answers.get(timeout=max(deadline - time.monotonic(), 0.0))
            except Empty:
                self.problem = (
                    f"{self.host}: no answer within {timeout_s:g} s to the question for {order['do']!r}. Does a disk of it "
                    "hang (a network file system), or its driver?"
                )
                break
            received = time.time()
            if found is None:
                self.problem = self._why_it_ended()
            elif found["number"] == self._number:
                return Said(found, sent=sent, received=received)
        return Said({}, self.problem, check=self._check)

    def let_go(self) -> None:
        """Tells it to end, there and here; also while another thread waits for an answer."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def close(self, deadline: float) -> None:
        """Ends it, by force from the deadline on (by time.monotonic)."""
        if self._process is None:
            return
        try:
            self._process.wait(0.0 if self.problem else max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for reader, stream in zip(self._readers, (self._process.stdout, self._process.stderr), strict=True):
            reader.join(END_S)
            if stream is not None and not reader.is_alive():
                stream.close()

    def _write(self, what: Any) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        # Never more than a pipe holds before the first answer, so that a host that reads nothing stops nobody.
        with contextlib.suppress(OSError, ValueError):  # it has ended; it was let go
            self._process.stdin.write(json.dumps(what).encode() + b"\n")
            self._process.stdin.flush()

    def _read_answers(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                found = json.loads(line)
            except ValueError:  # a login script of the host that prints, or the empty line before an answer
                continue
            if isinstance(found, dict) and "number" in found:
                self._answers.put(found)
        self._answers.put(None)

    def _read_complaints(self) -> None:
        assert self._process is not None
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._complaints = [*self._complaints[-40:], line.decode("utf-8", "replace")]

    def _why_it_ended(self) -> str:
        assert self._process is not None
        self._readers[1].join(END_S)
        try:
            code = self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            return f"{self.host}: it has closed its output, and does not end."
        if code in (126, 127):
            self._check = "python"
            return f"{self.host}: there is no Python at {sys.executable}. Make the same .venv there as here."
        self._check = "ssh" if code == SSH_FAILED else "answer"
        return why_not(self.host, code, "".join(self._complaints))


class Talks:
    """Conversations with all hosts, in their order."""

    def __init__(self, hosts: Sequence[str]) -> None:
        text = as_one_text(TEXTS)
        # A thread for each until the end: ssh is told to die with the thread that started it.
        self._pools = [ThreadPoolExecutor(1) for _ in hosts]
        starts = [pool.submit(Talk, host, text) for pool, host in zip(self._pools, hosts, strict=True)]
        self._talks = [start.result() for start in starts]
        self.here = {talk.host for talk in self._talks if talk.is_here}

    def ask(
        self, order: Mapping[str, Any] | Callable[[str], Mapping[str, Any] | None], *, timeout_s: float
    ) -> dict[str, Said]:
        """Asks every host the same at the same time, or what `order` gives for it; it is left out where that is None."""
        orders = {talk.host: order(talk.host) if callable(order) else order for talk in self._talks}
        waiting = {
            talk.host: pool.submit(talk.ask, given, timeout_s=timeout_s)
            for pool, talk in zip(self._pools, self._talks, strict=True)
            if (given := orders[talk.host]) is not None
        }
        return {host: future.result() for host, future in waiting.items()}

    def close(self) -> None:
        """Ends all, also while they are asked: Ctrl-C does not wait for an answer."""
        deadline = time.monotonic() + END_S
        for talk in self._talks:
            talk.let_go()
        for talk in self._talks:
            talk.close(deadline)
        for pool in self._pools:
            pool.shutdown()


@contextlib.contextmanager
def talking_to(hosts: Sequence[str]) -> Iterator[Talks]:
    """Conversations, ended at the end."""
    talks = Talks(hosts)
    try:
        yield talks
    finally:
        talks.close()


FIRST_S = CONNECT_S + 20.0
"""From the start of ssh to the first answer: a slow login is none that fails."""
