"""`simulate-cluster exec`: runs a command on a node."""

from __future__ import annotations

import os
import select
import signal
import sys
from typing import NoReturn

from simulated import linux
from simulated.cluster import HOME, TMPDIR, Cluster, ClusterError, Node, init_of

FORWARDED = {
    *(signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT),
    *(signal.SIGUSR1, signal.SIGUSR2, signal.SIGALRM, signal.SIGCONT),
}
SENT_BY_KERNEL = 0x80
"""si_code of a signal from a terminal, which goes to its complete process group, and so to the command if it belongs to it."""

CANNOT_START, NOT_FOUND = 126, 127


def execute(cluster: Cluster, node: Node, command: list[str]) -> int:
    """Runs a command in all namespaces of a node, in this folder and environment, and returns its exit code.

    Signals to this process are forwarded to the command; SIGKILL ends both. The exit code is 128 plus the signal's number if
    a signal ended the command.
    """
    init = init_of(cluster, node)
    try:
        namespaces = {name: os.open(f"/proc/{init}/ns/{name}", os.O_RDONLY) for name in linux.NAMESPACES}
    except OSError:
        raise ClusterError(f"{node.name} has just ended.") from None
    folder = os.getcwd()  # noqa: PTH109  # it is entered by its path on the node
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    watched = FORWARDED | {signal.SIGCHLD}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, watched)
    parent_end, held_end = os.pipe()
    linux.setns(namespaces["pid"], "pid")  # takes effect for child processes
    child = os.fork()
    if child == 0:
        try:
            os.close(held_end)
            linux.die_with_parent()
            if select.select([parent_end], [], [], 0)[0]:  # the parent died before the line above
                os._exit(CANNOT_START)
            _enter(namespaces, node, folder)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            _start(command, cluster, node)
        except OSError as error:
            _fail(node, str(error), CANNOT_START)
        finally:
            os._exit(CANNOT_START)
    for descriptor in namespaces.values():
        os.close(descriptor)
    return _wait(child, watched)


def _enter(namespaces: dict[str, int], node: Node, folder: str) -> None:
    for name, descriptor in namespaces.items():
        if name != "pid":
            linux.setns(descriptor, name)
    try:
        os.chdir(folder)
    except OSError as error:
        _fail(node, f"{folder}: {error.strerror} on the node", CANNOT_START)
    if not os.isatty(0):
        os.setsid()  # so that a signal to this process's group reaches the command only once, from this process
    for number in (signal.SIGPIPE, signal.SIGXFSZ, *FORWARDED):
        # Python ignores the first two and has a handler for SIGINT. Signals that the caller ignores stay ignored (nohup).
        if number not in FORWARDED or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)


def _start(command: list[str], cluster: Cluster, node: Node) -> NoReturn:
    node_env = {"HOME": HOME, "HOSTNAME": node.name, "TMPDIR": TMPDIR}
    environment = {"OMP_NUM_THREADS": str(cluster.threads), **os.environ, **node_env}
    try:
        os.execvpe(command[0], command, environment)
    except FileNotFoundError:
        _fail(node, f"{command[0]}: not found", NOT_FOUND)
    except OSError as error:
        _fail(node, f"{command[0]}: {error.strerror}", CANNOT_START)


def _fail(node: Node, message: str, code: int) -> NoReturn:
    sys.stderr.write(f"{node.name}: {message}\n")
    sys.stderr.flush()
    os._exit(code)


def _wait(child: int, watched: set[signal.Signals]) -> int:
    while True:
        received = signal.sigwaitinfo(watched)
        if received.si_signo == signal.SIGCHLD:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                code = os.waitstatus_to_exitcode(status)
                return code if code >= 0 else 128 - code
        # Without a terminal the command has its own group (see _enter).
        elif received.si_code != SENT_BY_KERNEL or not os.isatty(0):
            os.kill(child, received.si_signo)
