"""A benchmark that a signal ends takes all its jobs along."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.distributed.process_info import read_stat
from tests.support.jobs import until

HERE = Path(__file__).parent
STARTS_JOBS = re.compile(r"\bsubprocess\b|\bjobs\.|run_ranks\(|simulated_cluster|\bProcess\(")

SCRIPT = """
import os, subprocess, sys
sys.path.insert(0, os.getcwd())
from tests.support.script import run_script

# A launcher that ignores SIGTERM, with a rank in a session of its own, which outlives it.
RANK = "import os, signal; os.write(1, b'%d\\\\n' % os.getpid()); signal.pause()"
LAUNCHER = "import signal, subprocess, sys; signal.signal(15, signal.SIG_IGN); "
LAUNCHER += "subprocess.Popen([sys.executable, '-c', sys.argv[1]], start_new_session=True).wait()"

def main():
    try:
        subprocess.run([sys.executable, "-c", LAUNCHER, RANK], timeout=600)
    finally:
        print("finally", flush=True)

run_script(main)
"""


@pytest.mark.commands
@pytest.mark.timeout(30)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_script_its_launcher_and_the_ranks(number: signal.Signals) -> None:
    command = [sys.executable, "-c", SCRIPT]
    with subprocess.Popen(command, cwd=HERE.parents[1], stdout=subprocess.PIPE, text=True) as script:
        assert script.stdout is not None
        rank = int(script.stdout.readline())

        script.send_signal(number)

        assert script.stdout.readline() == "finally\n"
        assert script.stdout.readline() == ""  # nobody holds the other end any more: the rank has ended as well
        assert script.wait(20) == 128 + number
    assert until(lambda: (read_stat(rank) or "Z")[0] in "ZX", 5)


def test_every_benchmark_that_starts_jobs_ends_with_them() -> None:
    sources = {path.name: path.read_text(encoding="utf-8") for path in HERE.glob("*.py") if "test_" not in path.name}
    programs = {name: text for name, text in sources.items() if '__name__ == "__main__"' in text}
    start_jobs = {name for name, text in programs.items() if STARTS_JOBS.search(text)} | {"__main__.py"}

    assert len(start_jobs) > 10
    assert {name for name in start_jobs if "    run_script(main)\n" not in programs[name]} == set()
