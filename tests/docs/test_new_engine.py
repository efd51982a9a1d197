"""docs/new-engine.md: its changes apply to dtrain as it is, and its code and commands run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import pages

PAGE = pages.ROOT / "docs" / "new-engine.md"
CHANGED = ["dtrain/config/engine.py", "dtrain/engine/allreduce.py", "dtrain/engine/build.py"]
"""The files of dtrain that a new engine may change."""


@pytest.fixture
def changed_checkout(tmp_path: Path) -> Path:
    copy = pages.copy_of_the_checkout(tmp_path)
    pages.apply(PAGE, copy)
    return copy


def test_a_new_engine_changes_three_files_of_dtrain(changed_checkout: Path) -> None:
    assert list(pages.changed(changed_checkout)) == CHANGED


def test_the_pages_code_is_what_ruff_would_make_of_it(changed_checkout: Path) -> None:
    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *CHANGED, "tests/engine"],
            cwd=changed_checkout,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.commands
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_every_command_of_the_page_runs(changed_checkout: Path) -> None:
    printed = [pages.run(block.text, changed_checkout) for block in pages.blocks(PAGE, "sh")]

    assert len(printed) == 5
    assert "engine     allreduce (as configured), fp32" in printed[1]
    assert len(printed[3].splitlines()) == 6  # a line per step, each of equal losses
    assert "6 passed" in printed[4]
