"""Pages of docs/: their code blocks, applied to a copy of the checkout and run there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A fenced block.

    Attributes:
        language: after the first three backticks.
        text: the lines between the fences.
        line: number of its first line in the page.
    """

    language: str
    text: str
    line: int


def blocks(page: Path, language: str | None = None) -> list[Block]:
    """Returns the fenced blocks of a page, or those of one language."""
    text = page.read_text(encoding="utf-8")
    found = [Block(match[1], match[2], text.count("\n", 0, match.start(2)) + 1) for match in BLOCK.finditer(text)]
    return [block for block in found if language in (None, block.language)]


def copy_of_the_checkout(folder: Path) -> Path:
    """Copies what a change to dtrain needs: the package, and what its tests use."""
    for name in ("dtrain", "tests/support"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "tests/conftest.py"):
        shutil.copy(ROOT / name, folder / name)
    return folder


def apply(page: Path, root: Path) -> None:
    """Writes the page's Python files below `root`, and applies its changes to others.

    A file's name is in the block's first line: `# dtrain/engine/new.py`. A `diff` block has it as well, then lines that
    begin with a blank, `-` or `+`; its old lines must be in the file exactly once.
    """
    for block in blocks(page, "python"):
        file = root / block.text.splitlines()[0].removeprefix("# ")
        assert not file.exists(), f"{file} exists already"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(block.text.partition("\n")[2], encoding="utf-8")
    for block in blocks(page, "diff"):
        name, *lines = block.text.splitlines()
        file = root / name.removeprefix(" # ")
        old = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
        new = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
        text = file.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{name} has these lines {text.count(old)} times:\n{old}"
        file.write_text(text.replace(old, new), encoding="utf-8")


def changed(root: Path) -> Iterator[str]:
    """Yields the files below dtrain/ that the copy has otherwise than the checkout."""
    for file in sorted((root / "dtrain").rglob("*.py")):
        name = file.relative_to(root).as_posix()
        if not (ROOT / name).is_file() or (ROOT / name).read_bytes() != file.read_bytes():
            yield name


def run(command: str, folder: Path, *, path: str = "", timeout_s: float = 240.0) -> str:
    """Runs a shell block in a folder and returns what it prints.

    Args:
        path: goes before this process's PATH and Python's own folder.
        timeout_s: for all of it.
    """
    places = [path, str(Path(sys.executable).parent), os.environ["PATH"]]
    environment = {
        **os.environ,
        "PATH": os.pathsep.join(place for place in places if place),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"{command}\nexit {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout
