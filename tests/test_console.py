"""Output that nobody reads, or that was closed before the start, does not end a command or print a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

MANY_LINES = """
import sys, time
from dtrain import console
from dtrain.console import log
console.protect_streams()
console.configure_logging(rank=0, world_size=1)
for number in range(20000):
    log.info("line %d", number)
print("more", flush=True)
console.flush_streams()
sys.exit(7)
"""

FIRST_FILE = """
import os
from dtrain import console
console.protect_streams()
file = open(os.environ["FILE"], "w")
print("log")
os.write(1, b"from a library")
console.flush_streams()
file.write("content")
"""


def run(program: str, redirect: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", f'"$0" -c "$PROGRAM" {redirect}', sys.executable]
    environment = {**os.environ, "PROGRAM": program, **env}
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False, env=environment)


def test_a_reader_that_leaves_is_no_error() -> None:
    result = run(MANY_LINES, '| head -1; exit "${PIPESTATUS[0]}"')

    assert (result.stdout, result.stderr, result.returncode) == ("line 0\n", "", 7)


@pytest.mark.parametrize("closed", [">&-", "<&- >&-", "<&- >&- 2>&-", ">&- 2>&-"])
def test_closed_streams_do_not_end_a_command(closed: str) -> None:
    assert run(MANY_LINES, closed).returncode == 7


def test_a_file_never_gets_the_output_of_a_closed_stream(tmp_path: Path) -> None:
    file = tmp_path / "weights"

    assert run(FIRST_FILE, "<&- >&- 2>&-", FILE=str(file)).returncode == 0
    assert file.read_text() == "content"


def test_a_character_that_the_terminal_cannot_show_is_escaped() -> None:
    program = "from dtrain import console; console.protect_streams(); print('\\u4e2d')"

    assert run(program, PYTHONIOENCODING="ascii").stdout == "\\u4e2d\n"


def test_the_command_line_answers_without_standard_output() -> None:
    for arguments in ("--print-config", "--help"):
        command = f'"$0" dtrain/main.py {arguments} <&- >&- 2>&-'
        assert subprocess.run(["bash", "-c", command, sys.executable], cwd=ROOT, check=False).returncode == 0
