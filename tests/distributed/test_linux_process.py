"""What a process sets about itself with prctl(2), and that it does so in one place."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OWN_CALLS = {"dtrain/distributed/linux_process.py", "dtrain/cluster/remote_supervisor.py"}
"""The second uses the standard library only."""

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="prctl(2) is of Linux")

NAMES_AND_WAITS = """
import signal
from dtrain.distributed import linux_process

linux_process.send_on_parent_death()
linux_process.name_process(b"dtrain-example")
print(open("/proc/self/comm").read().strip(), flush=True)
signal.pause()
"""
ADOPTS = """
import os
from dtrain.distributed import linux_process

linux_process.adopt_orphans()
child = os.fork()
if not child:
    os._exit(0 if os.fork() else 7)
os.waitpid(child, 0)
print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
"""


def test_only_one_module_calls_prctl() -> None:
    callers = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "dtrain").rglob("*.py")
        if ".prctl(" in path.read_text() or "PR_SET_" in path.read_text()
    }

    assert callers == OWN_CALLS


@LINUX
@pytest.mark.commands
def test_a_process_has_its_name_and_ends_with_its_parent() -> None:
    relay = f"import os, subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {NAMES_AND_WAITS!r}]).wait()"
    with subprocess.Popen([sys.executable, "-c", relay], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        assert parent.stdout.readline() == "dtrain-example\n"
        os.kill(parent.pid, signal.SIGKILL)  # its child holds the other end of the pipe until it ends
        assert parent.communicate(timeout=10)[0] == ""


@LINUX
@pytest.mark.commands
def test_a_process_that_adopts_orphans_is_the_parent_of_its_grandchild() -> None:
    done = subprocess.run(
        [sys.executable, "-c", ADOPTS], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )

    assert (done.stdout, done.stderr) == ("7\n", "")
