"""docs/new-task.md: its changes apply to dtrain as it is, and its code and commands run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "new-task.md").read_text(encoding="utf-8")

CHANGED = ["dtrain/config/task.py", "dtrain/tasks/build.py", "dtrain/tasks/word_count.py"]
"""The files of dtrain that a new task may change."""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, flags=re.DOTALL | re.MULTILINE)


def apply_page(root: Path) -> None:
    """Writes the page's files below `root` and applies its changes to others."""
    for code in blocks("python"):
        file = root / code.splitlines()[0].removeprefix("# ")
        assert not file.exists(), f"{file} exists already"
        file.write_text(code.partition("\n")[2], encoding="utf-8")
    for change in blocks("diff"):
        place, *lines = change.splitlines()
        file = root / place.removeprefix(" # ")
        old = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
        new = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
        text = file.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{file} has these lines {text.count(old)} times:\n{old}"
        file.write_text(text.replace(old, new), encoding="utf-8")


def copy_of_the_checkout(folder: Path) -> Path:
    for name in ("dtrain", "tests/support"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests" / "tasks").mkdir()
    for name in ("pyproject.toml", "tests/conftest.py"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def test_a_new_task_changes_three_files_of_dtrain(tmp_path: Path) -> None:
    copy = copy_of_the_checkout(tmp_path)

    apply_page(copy)

    files = {path.relative_to(copy).as_posix() for path in (copy / "dtrain").rglob("*.py")}
    before = {name: (ROOT / name).read_bytes() if (ROOT / name).is_file() else b"" for name in files}
    assert sorted(name for name in files if (copy / name).read_bytes() != before[name]) == CHANGED


def test_the_pages_code_is_what_ruff_would_make_of_it(tmp_path: Path) -> None:
    copy = copy_of_the_checkout(tmp_path)
    apply_page(copy)

    for command in (["check"], ["format", "--check"]):
        done = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *CHANGED, "tests/tasks"], cwd=copy, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.commands
@pytest.mark.timeout(600)
def test_every_command_of_the_page_runs(tmp_path: Path) -> None:
    copy = copy_of_the_checkout(tmp_path)
    apply_page(copy)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(copy),
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    commands = blocks("sh")
    assert len(commands) >= 7, "found no commands to run"

    said = []
    for command in commands:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command],
            cwd=copy,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        said.append(done.stdout)

    assert re.search(r"^-?\d+\.\d words$", said[-2], flags=re.MULTILINE), said[-2]
    assert re.search(r"^5 passed", said[-1], flags=re.MULTILINE), said[-1]
