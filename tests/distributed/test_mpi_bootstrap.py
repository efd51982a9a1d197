"""MPI's start has a time limit, also where MPI blocks with the interpreter lock held."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.support import jobs

START = """
from dtrain.distributed.mpi_bootstrap import bootstrap
try:
    bootstrap({}, rank=1, world_size=2, launcher="openmpi", timeout_s=%s)
except Exception as error:
    print(error)
"""


def start(folder: Path, module: str, *, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Calls `bootstrap` with a stand-in for mpi4py.MPI."""
    (folder / "mpi4py").mkdir()
    (folder / "mpi4py" / "__init__.py").write_text("")
    (folder / "mpi4py" / "MPI.py").write_text(module)
    return subprocess.run(
        [sys.executable, "-c", START % timeout_s],
        env={**os.environ, "PYTHONPATH": f"{folder}:{jobs.ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_ranks_that_mpi_does_not_connect_end_with_a_cure(tmp_path: Path) -> None:
    ended = start(tmp_path, "import ctypes\nctypes.PyDLL(None).sleep(600)", timeout_s=0.5)

    assert ended.returncode == -signal.SIGKILL
    assert "MPI did not connect the ranks within run.startup_timeout_s=0.5 s" in ended.stdout
    assert "mpirun -x MASTER_ADDR=" in ended.stdout


def test_an_mpi_that_answers_in_time_is_not_interrupted(tmp_path: Path) -> None:
    ended = start(tmp_path, "raise ImportError('no MPI here')", timeout_s=300)

    assert ended.returncode == 0
    assert "the ranks meet through mpi4py (no MPI here)" in ended.stdout
