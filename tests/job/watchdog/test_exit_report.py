"""What is said of a rank that died."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from dtrain.job.watchdog.exit_report import death_message

READS_A_FILE_THAT_IS_CUT = """
import datasets, faulthandler, os, sys, threading

stacks, table = sys.argv[1:]
faulthandler.enable(open(stacks, "w"))
print(threading.get_ident(), flush=True)
rows = datasets.Dataset.from_file(table)
os.truncate(table, 0)
rows[5_000]
"""


def test_prepared_data_that_is_cut_short_in_mid_run_is_named_as_a_cause(tmp_path: Path) -> None:
    import pyarrow as pa

    stacks, file = tmp_path / "stacks", tmp_path / "rows.arrow"
    table = pa.table({"text": ["a" * 100] * 10_000})
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)

    ended = subprocess.run(
        [sys.executable, "-c", READS_A_FILE_THAT_IS_CUT, str(stacks), str(file)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    descriptor = os.open(stacks, os.O_RDONLY)
    try:
        message = death_message(3, 77, descriptor, int(ended.stdout))
    finally:
        os.close(descriptor)

    assert ended.returncode == -signal.SIGBUS
    assert message.startswith("Rank 3 (process 77 on ")
    assert "died: Bus error at " in message
    assert "had mapped into memory was cut short (the prepared data in data.cache_dir" in message


ABORTS = """
import faulthandler, os, sys, threading

faulthandler.enable(open(sys.argv[1], "w"))
print(threading.get_ident(), flush=True)
os.abort()
"""


def test_a_process_that_a_library_ended_is_told_where_nccl_would_have_said_why(tmp_path: Path) -> None:
    stacks = tmp_path / "stacks"
    ended = subprocess.run(
        [sys.executable, "-S", "-c", ABORTS, str(stacks)], capture_output=True, text=True, timeout=60, check=False
    )
    with stacks.open() as file:
        message = death_message(3, 77, file.fileno(), int(ended.stdout))

    assert ended.returncode == -signal.SIGABRT
    assert "died: Aborted at " in message
    assert "If the lines above name ProcessGroupNCCL, that was NCCL" in message
