"""What a newcomer and an installer find in the checkout: files, modes, versions, and nothing of one machine."""

from __future__ import annotations

import ast
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import dtrain

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
FOLDERS = ("dtrain", "tests", "docs", "launch", "configs", "hostfiles", ".ci")
PYTHONS = ("3.10", "3.11", "3.12", "3.13")

# In pieces, so that this file does not hold what it looks for.
OF_ONE_MACHINE = re.compile(
    "|".join(rf"(?<![\w.])/{top}/" for top in ("work", "root", r"home/\w+", r"Users/\w+", "opt/wheels", "opt/pypi"))
)
REGISTRY_HOSTS = re.compile("|".join((r"pypi\." + "org", "files.python" + "hosted", "download.py" + "torch")))


def project() -> dict[str, Any]:
    project: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project


def texts() -> Iterator[tuple[str, str]]:
    """Name and text of every file that belongs to the repository, without what tools leave in it."""
    of_root = [path for path in ROOT.iterdir() if path.is_file() and path.suffix not in (".log", ".lock")]
    below = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    for path in [*of_root, *below]:
        if "__pycache__" not in path.parts and path.suffix not in (".pyc", ".so"):
            yield path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "CHANGELOG.md", "CONTRIBUTING.md", "constraints.txt"])
def test_the_usual_root_files_are_there(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8").strip()


@pytest.mark.parametrize("folder", ["dtrain", "docs", "tests", "launch", "configs", "hostfiles"])
def test_each_folder_explains_itself(folder: str) -> None:
    assert (ROOT / folder / "README.md").read_text(encoding="utf-8").strip()


@pytest.mark.parametrize("name", ["launch/quickstart", "launch/test", ".ci/run"])
def test_a_command_can_be_run_as_it_stands(name: str) -> None:
    path = ROOT / name

    assert os.access(path, os.X_OK)
    assert path.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\n")
    assert "\nset -euo pipefail\n" in path.read_text(encoding="utf-8")


def test_code_is_ascii() -> None:
    code = [(name, text) for name, text in texts() if not name.endswith((".md", ".txt"))]

    assert len(code) > 20, "found no code to check"
    assert [name for name, text in code if not text.isascii()] == []


@pytest.mark.parametrize("pattern", [OF_ONE_MACHINE, REGISTRY_HOSTS], ids=["paths of one machine", "registry hosts"])
def test_nothing_of_one_machine_is_written_down(pattern: re.Pattern[str]) -> None:
    assert {name: match.group() for name, text in texts() if (match := pattern.search(text))} == {}


@pytest.mark.parametrize(
    "text", ["cd /wo" + "rk/main", "'/ho" + "me/ann/x'", "PATH=/ro" + "ot/bin", "/Us" + "ers/ann/x"]
)
def test_a_path_of_one_machine_would_be_seen(text: str) -> None:
    assert OF_ONE_MACHINE.search(text)


@pytest.mark.parametrize(
    "text", ["framework/main.py", "../shared/data", "~/work", "the /root of a tree", "./home/ann/"]
)
def test_other_paths_are_left_alone(text: str) -> None:
    assert not OF_ONE_MACHINE.search(text)


def imports_of_tests(source: str) -> list[str]:
    """The test files that a file's imports name, at its top or within a function."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
    return [name for name in names if re.search(r"^tests\.(\w+\.)*test_", name)]


def test_no_test_imports_another() -> None:
    """What two of them need is in tests/support/: a test file can then be read, moved and deleted by itself."""
    paths = (ROOT / "tests").rglob("*.py")
    files = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}

    assert {name: found for name, text in files.items() if (found := imports_of_tests(text))} == {}


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from tests.tasks.test_chat import gpt", ["tests.tasks.test_chat.gpt"]),
        ("from tests.tasks import test_chat, other", ["tests.tasks.test_chat"]),
        ("def test_it():\n    import tests.test_fit", ["tests.test_fit"]),
        ("from tests.support.jobs import train\nimport test", []),
    ],
)
def test_an_import_of_a_test_is_found(source: str, found: list[str]) -> None:
    assert imports_of_tests(source) == found


def test_versions_agree() -> None:
    version = project()["version"]
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)

    assert newest is not None
    assert newest.group(1) == version
    assert getattr(dtrain, "__version__", version) == version


def constraints() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_torch_is_pinned_for_every_build_of_it() -> None:
    assert [str(pin) for pin in constraints() if pin.name == "torch"] == ["torch==2.13.0"]


def test_every_constraint_is_one_exact_version() -> None:
    assert [str(pin) for pin in constraints() if not re.fullmatch(r"==[0-9][0-9a-z.]*", str(pin.specifier))] == []


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_has_one_pin_that_its_range_allows(python: str) -> None:
    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux", "extra": ""}
    pins: dict[str, list[Requirement]] = {}
    for pin in constraints():
        if pin.marker is None or pin.marker.evaluate(environment):
            pins.setdefault(canonicalize_name(pin.name), []).append(pin)

    assert {name: found for name, found in pins.items() if len(found) > 1} == {}
    extras = project()["optional-dependencies"]
    for line in [*project()["dependencies"], *extras["dev"], *extras["bench"]]:
        wanted = Requirement(line)
        assert canonicalize_name(wanted.name) in pins, f"{line} is not in constraints.txt"
        version = str(pins[canonicalize_name(wanted.name)][0].specifier).removeprefix("==")
        assert wanted.specifier.contains(version), f"constraints.txt has {wanted.name} {version}, pyproject {line}"
