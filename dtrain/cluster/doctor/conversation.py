"""Sends the doctor's orders to agents on all hosts in parallel, and waits for each answer up to a time limit.

A host runs only `python` with a text that is sent over ssh (agent.py), so this also works if dtrain is not there. An
agent ends when its standard input is closed, by this process or by its death.
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

from dtrain.cluster.remote_source import CPU, HERE, PROBE, join_sources
from dtrain.cluster.ssh import CONNECT_TIMEOUT_S, NO_SSH, explain_exit, is_local, start_on

AGENT_FILES = (CPU, PROBE, HERE / "doctor" / "host_facts.py", HERE / "doctor" / "agent.py")

START_AGENT = (
    # Without the current folder on sys.path, whose files could hide the standard library's.
    "import sys; sys.path[:] = filter(None, sys.path); import json; agent = {'__name__': 'agent'}; "
    "exec(json.loads(sys.stdin.readline()), agent); agent['follow_orders']()"
)

SSH_FAILED = 255
"""ssh's own exit code; any other is the remote command's."""

FIRST_ANSWER_TIMEOUT_S = CONNECT_TIMEOUT_S + 20.0
"""Time from the start of ssh to the first answer. A slow login is not a failure."""

END_TIMEOUT_S = 5.0
"""Time for an agent to end after its input is closed."""


@dataclass(frozen=True)
class HostReply:
    """One answer of an agent.

    Attributes:
        answer: the agent's JSON object; empty if there is none.
        problem: why there is no answer; empty if there is one.
        sent: when the order was sent, by this machine's clock, in seconds since 1970.
        received: when the answer arrived, by the same clock.
        check: the doctor's check that the problem belongs to: ssh, python or answer.
    """

    answer: Mapping[str, Any]
    problem: str = ""
    sent: float = 0.0
    received: float = 0.0
    check: str = "answer"


class Conversation:
    """A conversation with one host's agent.

    Attributes:
        host: the host's name.
        problem: why the conversation has ended; empty while it has not.
        is_local: whether the host is this machine.
    """

    def __init__(self, host: str, agent_source: str) -> None:
        self.host, self.problem, self.is_local = host, "", is_local(host)
        self._check = "answer"
        self._number = 0
        self._answers: SimpleQueue[dict[str, Any] | None] = SimpleQueue()
        self._stderr_lines: list[str] = []
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._process = start_on(host, [sys.executable, "-c", START_AGENT])
        except FileNotFoundError:
            self._check = "ssh"
            self.problem = f"{host}: {NO_SSH}"
            return
        self._readers = [threading.Thread(target=read, daemon=True) for read in (self._read_answers, self._read_stderr)]
        for reader in self._readers:
            reader.start()
        self._write(agent_source)

    def ask(self, order: Mapping[str, Any], *, timeout_s: float) -> HostReply:
        """Sends an order and waits for the answer. If it does not arrive in time, later orders are not sent."""
        self._number += 1
        sent, deadline = time.time(), time.monotonic() + timeout_s
        if not self.problem:
            self._write({**order, "number": self._number})
        while not self.problem:
            try:
                answer = self._answers.get(timeout=max(deadline - time.monotonic(), 0.0))
            except Empty:
                self.problem = (
                    f"{self.host}: no answer to the order {order['order']!r} within {timeout_s:g} s. Does one of its disks "
                    "hang (a network file system), or a driver?"
                )
                break
            received = time.time()
            if answer is None:
                self.problem = self._explain_end()
            elif answer["number"] == self._number:
                return HostReply(answer, sent=sent, received=received)
        return HostReply({}, self.problem, check=self._check)

    def request_end(self) -> None:
        """Closes the agent's input. May be called while another thread waits for an answer."""
        if self._process is None:
            return
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()

    def close(self, deadline: float) -> None:
        """Waits for the local process to end, and kills it at the deadline (by time.monotonic)."""
        if self._process is None:
            return
        try:
            self._process.wait(0.0 if self.problem else max(deadline - time.monotonic(), 0.0))
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        for reader, stream in zip(self._readers, (self._process.stdout, self._process.stderr), strict=True):
            reader.join(END_TIMEOUT_S)
            if stream is not None and not reader.is_alive():
                stream.close()

    def _write(self, message: Any) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        # Before the first answer, never more than a pipe holds, so that a host that reads nothing does not block this.
        with contextlib.suppress(OSError, ValueError):  # the process has ended, or its input was closed
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def _read_answers(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            try:
                answer = json.loads(line)
            except ValueError:  # output of a login script on the host, or the empty line before an answer
                continue
            if isinstance(answer, dict) and "number" in answer:
                self._answers.put(answer)
        self._answers.put(None)

    def _read_stderr(self) -> None:
        assert self._process is not None
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._stderr_lines = [*self._stderr_lines[-40:], line.decode("utf-8", "replace")]

    def _explain_end(self) -> str:
        assert self._process is not None
        self._readers[1].join(END_TIMEOUT_S)
        try:
            code = self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return f"{self.host}: the agent has closed its output, but does not end."
        if code in (126, 127):
            self._check = "python"
            return f"{self.host}: there is no Python at {sys.executable}. Create the same .venv there as here."
        self._check = "ssh" if code == SSH_FAILED else "answer"
        return explain_exit(self.host, code, "".join(self._stderr_lines))


class Conversations:
    """Conversations with all hosts, in the order of the hosts.

    Attributes:
        local_hosts: the names of hosts that are this machine.
    """

    def __init__(self, hosts: Sequence[str]) -> None:
        agent_source = join_sources(AGENT_FILES)
        # Each host has one thread until the end, because ssh is set up to die with the thread that started it.
        self._pools = [ThreadPoolExecutor(1) for _ in hosts]
        starts = [pool.submit(Conversation, host, agent_source) for pool, host in zip(self._pools, hosts, strict=True)]
        self._conversations = [start.result() for start in starts]
        self.local_hosts = {each.host for each in self._conversations if each.is_local}

    def ask(
        self, order: Mapping[str, Any] | Callable[[str], Mapping[str, Any] | None], *, timeout_s: float
    ) -> dict[str, HostReply]:
        """Sends orders to all hosts in parallel and returns their replies.

        Args:
            order: the same order for all hosts, or a function that returns a host's order, or None to skip the host.
        """
        orders = {each.host: order(each.host) if callable(order) else order for each in self._conversations}
        pending = {
            each.host: pool.submit(each.ask, host_order, timeout_s=timeout_s)
            for pool, each in zip(self._pools, self._conversations, strict=True)
            if (host_order := orders[each.host]) is not None
        }
        return {host: future.result() for host, future in pending.items()}

    def close(self) -> None:
        """Ends all conversations, even while an answer is pending, so that Ctrl-C takes effect immediately."""
        deadline = time.monotonic() + END_TIMEOUT_S
        for conversation in self._conversations:
            conversation.request_end()
        for conversation in self._conversations:
            conversation.close(deadline)
        for pool in self._pools:
            pool.shutdown()


@contextlib.contextmanager
def open_conversations(hosts: Sequence[str]) -> Iterator[Conversations]:
    """Yields conversations with the hosts, and ends them afterwards."""
    conversations = Conversations(hosts)
    try:
        yield conversations
    finally:
        conversations.close()
