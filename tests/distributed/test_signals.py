"""Ctrl-C and SIGTERM inside one process: heard once, heard at import time, not heard at all, meant for a child."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dtrain.distributed import signals

pytestmark = [pytest.mark.ranks, pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX signals")]

LIMIT_S = 30

HEAD = """
import ctypes, os, signal, sys, time
from dtrain.distributed.signals import deferred, ignore_further, interruptible
def report_cause(cause):
    print("before exit:", cause, flush=True)
"""


REPORTS = """
import logging
from dtrain.console import log
logging.basicConfig(format="%(message)s", level=logging.INFO, stream=sys.stdout)
"""
"""Prints what the helper thread says."""


@contextmanager
def running(body: str) -> Iterator[subprocess.Popen[bytes]]:
    """A Python program, from the line `ready` on that it prints."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what is ignored here would be ignored there
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", HEAD + body],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,  # nothing that follows a line is read along with it
            env={**os.environ, "PYTHONPATH": str(Path.cwd())},
        )
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield process
    finally:
        process.kill()
        process.communicate(timeout=LIMIT_S)


SWALLOWS = """
try:
    with interruptible(grace_s=20, before_exit=report_cause):
        try:
            print("ready", flush=True)
            while True:
                time.sleep(0.01)
        except Exception:
            print("swallowed", flush=True)
except KeyboardInterrupt as stop:
    print(stop, flush=True)
"""


def test_a_signal_passes_through_code_that_swallows_errors() -> None:
    with running(SWALLOWS) as process:
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=LIMIT_S)

    assert printed == b"Stopped by SIGTERM: nothing was saved.\n"
    assert process.returncode == 0


TWICE = """
with interruptible(grace_s=20, before_exit=report_cause):
    try:
        print("ready", flush=True)
        while True:
            time.sleep(0.01)
    except KeyboardInterrupt:
        print("stopping", flush=True)
        sys.stdin.read()
        print("stopped", flush=True)
        ignore_further()
        os.kill(os.getpid(), signal.SIGINT)
"""


def test_a_signal_that_a_launcher_passes_on_once_more_does_not_cut_the_end_short() -> None:
    with running(TWICE) as process:
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.readline() == b"stopping\n"
        process.send_signal(signal.SIGTERM)
        process.send_signal(signal.SIGINT)
        printed, _ = process.communicate(timeout=LIMIT_S)

    assert (printed, process.returncode) == (b"stopped\n", 0)


IMPATIENT = """
import dtrain.distributed.signals
dtrain.distributed.signals.REPEAT_AFTER_S = 0.05
with interruptible(grace_s=20, before_exit=report_cause):
    try:
        print("ready", flush=True)
        time.sleep(20)
    except KeyboardInterrupt:
        time.sleep(0.5)
        print("stopping", flush=True)
        {work}
"""


@pytest.mark.parametrize("work", ["time.sleep(20)", 'ctypes.CDLL(None).system(b"exec cat >/dev/null 2>&1")'])
def test_a_second_signal_some_time_after_the_first_ends_the_process_after_before_exit(work: str) -> None:
    with running(IMPATIENT.format(work=work)) as process:
        process.send_signal(signal.SIGINT)
        assert process.stdout is not None
        assert process.stdout.readline() == b"stopping\n"
        process.send_signal(signal.SIGTERM)  # system() ignores SIGINT
        process.wait(LIMIT_S)  # communicate would end its cat
        printed, _ = process.communicate(timeout=LIMIT_S)

    assert printed == b"before exit: Stopped immediately by a second SIGTERM: nothing more was saved.\n"
    assert process.returncode == 1


DEFERS = """
import dtrain.distributed.signals
from dtrain.distributed.signals import deferred
dtrain.distributed.signals.REPEAT_AFTER_S = 0.2
with interruptible(grace_s=0.1, before_exit=report_cause), deferred() as request:
    print("ready", flush=True)
    while request.why is None:
        time.sleep(0.01)
    print(request.why, flush=True)
    time.sleep(1)  # longer than a signal that is not deferred may go unheard
    print("saved", flush=True)
    {then}
"""


def test_a_deferred_signal_is_noted_and_the_program_goes_on_as_long_as_it_needs() -> None:
    with running(DEFERS.format(then="")) as process:
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=LIMIT_S)

    assert (printed, process.returncode) == (b"stop requested by SIGTERM\nsaved\n", 0)


def test_a_second_signal_after_a_deferred_one_ends_the_process_wherever_it_is() -> None:
    with running(DEFERS.format(then='ctypes.CDLL(None).system(b"exec cat >/dev/null 2>&1")')) as process:
        assert process.stdout is not None
        process.send_signal(signal.SIGTERM)
        assert b"saved\n" in iter(process.stdout.readline, b"")
        process.send_signal(signal.SIGTERM)
        process.wait(LIMIT_S)  # communicate would end its cat
        printed, _ = process.communicate(timeout=LIMIT_S)

    assert printed == b"before exit: Stopped immediately by a second SIGTERM: nothing more was saved.\n"
    assert process.returncode == 1


@pytest.mark.parametrize("is_over", [False, True])
def test_a_second_signal_that_is_read_when_the_run_has_ended_well_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, is_over: bool
) -> None:
    left: list[str] = []
    done = threading.Event()
    monkeypatch.setattr(signals.os, "_exit", lambda _code: done.set())
    if is_over:
        done.set()
    read_end, write_end = socket.socketpair()
    with write_end, signals.deferred():
        write_end.send(bytes([signal.SIGTERM] * 2))
        arguments = (read_end, done, 0.0, lambda error: left.append(str(error)), -1.0)
        helper = threading.Thread(target=signals._watch, args=arguments)
        helper.start()
        helper.join(LIMIT_S)

    assert not helper.is_alive()
    assert left == ([] if is_over else ["Stopped immediately by a second SIGTERM: nothing more was saved."])


BLOCKED = """
with interruptible(grace_s=0.3, before_exit={before_exit}):
    # system() waits in C whatever signals come, as a collective does; cat ends with our standard input.
    ctypes.CDLL(None).system(b"echo ready; exec cat >/dev/null 2>&1")
"""


@pytest.mark.parametrize(
    ("before_exit", "printed"),
    [
        ("report_cause", "before exit: The process did not react within 0 s. Stopped by SIGTERM: nothing was saved.\n"),
        ("lambda cause: time.sleep(60)", ""),
    ],
)
def test_a_process_that_does_not_react_is_ended_even_if_before_exit_hangs(before_exit: str, printed: str) -> None:
    with running(BLOCKED.format(before_exit=before_exit)) as process:
        begin = time.monotonic()
        process.send_signal(signal.SIGTERM)
        process.wait(LIMIT_S)
        said, _ = process.communicate(timeout=LIMIT_S)

    assert (said.decode(), process.returncode) == (printed, 1)
    assert time.monotonic() - begin < 5


FORKS = """
with interruptible(grace_s=0.3, before_exit=report_cause):
    hears, says = os.pipe()
    child = os.fork()
    if child == 0:
        os.write(says, b"!")
        time.sleep(5)
        os._exit(0)
    os.read(hears, 1)
    print("ready", flush=True)
    os.kill(child, signal.SIGINT)  # a terminal's Ctrl-C reaches all: the parent is the one to say so
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGTERM)
    print(os.waitpid(child, 0)[1], flush=True)
    time.sleep(1)
    print("still here", flush=True)
"""


def test_a_helper_process_that_is_told_to_end_does_not_take_its_parent_along() -> None:
    with running(FORKS) as process:
        printed, _ = process.communicate(timeout=LIMIT_S)

    assert printed.decode().splitlines() == [str(int(signal.SIGTERM)), "still here"]
    assert process.returncode == 0


GOES_ON = """
hears, says = os.pipe()
try:
    with interruptible(grace_s=1, before_exit=report_cause):
        child = os.fork()  # it has what the helper thread listens to, and outlives all this
        if child == 0:
            os.close(says)
            os.read(hears, 1)
            os._exit(0)
        print("ready", flush=True)
        while True:
            time.sleep(0.01)
except KeyboardInterrupt:
    time.sleep(1.5)
    print("went on", flush=True)
os.close(says)
os.waitpid(child, 0)
"""


def test_python_code_that_has_heard_the_signal_goes_on_as_long_as_it_likes() -> None:
    with running(GOES_ON) as process:
        process.send_signal(signal.SIGTERM)
        printed, _ = process.communicate(timeout=LIMIT_S)

    assert (printed, process.returncode) == (b"went on\n", 0)


ATTEMPTS = """
import threading
answered, last = threading.Event(), logging.Handler()
last.emit = lambda _record: answered.set()
logging.getLogger().addHandler(last)  # after the one that prints
with interruptible(grace_s=20, before_exit=report_cause), deferred() as request:
    def work():
        try:
            print("ready", flush=True)
            time.sleep(30)
        except Exception:
            print("swallowed", flush=True)
    ended = request.attempt(work)
    answered.wait(20)  # two threads that print at the same time may mix their lines
    print(ended, request.why, flush=True)
    print(request.attempt(lambda: print("never")), flush=True)
"""


def test_work_that_may_be_broken_off_is_and_none_begins_after_the_signal() -> None:
    with running(REPORTS + ATTEMPTS) as process:
        process.send_signal(signal.SIGHUP)
        printed, _ = process.communicate(timeout=LIMIT_S)

    assert printed.decode().splitlines() == [
        "SIGHUP: saving; send it again to quit without saving",
        "False stop requested by SIGHUP",
        "False",
    ]
    assert process.returncode == 0


ANSWERS = """
with interruptible(grace_s=0.1, before_exit=report_cause), deferred() as request:
    {saved}
    ctypes.CDLL(None).system(b"echo ready; exec cat >/dev/null 2>&1")
    print("went on", flush=True)
"""


def test_the_answer_does_not_wait_for_the_main_thread() -> None:
    with running(REPORTS + ANSWERS.format(saved="")) as process:
        process.send_signal(signal.SIGTERM)
        assert process.stdout is not None
        answer = process.stdout.readline()
        rest, _ = process.communicate(timeout=LIMIT_S)

    assert answer == b"SIGTERM: saving after this step; send it again to quit without saving\n"
    assert rest == b"went on\n"


def test_a_blocked_process_whose_state_is_on_disk_ends_with_75() -> None:
    with running(ANSWERS.format(saved="request.saved = lambda: 'all is saved'")) as process:
        process.send_signal(signal.SIGTERM)
        process.wait(LIMIT_S)
        printed, _ = process.communicate(timeout=LIMIT_S)

    assert (printed, process.returncode) == (b"before exit: all is saved\n", 75)


HANGUP = """
signal.signal(signal.SIGHUP, signal.{before})
with interruptible(grace_s=20, before_exit=report_cause), deferred() as request:
    print("ready", flush=True)
    sys.stdin.readline()
    print(request.why, flush=True)
"""


@pytest.mark.parametrize(("before", "why"), [("SIG_DFL", "stop requested by SIGHUP"), ("SIG_IGN", "None")])
def test_a_closed_terminal_stops_the_run_unless_it_began_under_nohup(before: str, why: str) -> None:
    with running(HANGUP.format(before=before)) as process:
        process.send_signal(signal.SIGHUP)
        printed, _ = process.communicate(b"\n", timeout=LIMIT_S)

    assert (printed.decode(), process.returncode) == (f"{why}\n", 0)


PEERS = """
from dtrain.distributed.signals import deferred, pass_on, telling_peers
def tell(*told):
    print(*told, flush=True)
    return True
with interruptible(grace_s=20, before_exit=report_cause), deferred() as request, telling_peers(tell):
    print("ready", flush=True)
    sys.stdin.readline()
    pass_on(signal.SIGTERM, "its launcher has died")
    pass_on(signal.SIGINT, None)
    time.sleep(0.1)
    print(request.why, flush=True)
"""


def test_a_signal_of_another_rank_counts_once_with_its_reason() -> None:
    with running(PEERS) as process:
        printed, _ = process.communicate(b"\n", timeout=LIMIT_S)

    assert sorted(printed.decode().splitlines()) == ["15 its launcher has died", "its launcher has died"]
