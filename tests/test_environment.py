"""A Python without dtrain's dependencies is answered with the command that makes or selects an environment."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain import environment
from dtrain.distributed.topology import SINGLE
from dtrain.environment import MODULES, missing_module
from dtrain.job.failure import error_record, for_user

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "argv",
    [
        ["dtrain/main.py"],
        ["dtrain/main.py", "--help"],
        ["-m", "dtrain.main", "evaluate"],
        ["-m", "dtrain.cluster", "hostfiles/local"],
        ["dtrain/commands/launch.py", "torchrun", "hostfiles/local"],
        ["-m", "dtrain.commands.link_test"],
    ],
)
def test_every_program_of_dtrain_names_the_missing_module_and_the_cure(argv: list[str]) -> None:
    ended = subprocess.run([sys.executable, "-S", *argv], cwd=ROOT, capture_output=True, text=True, timeout=60)

    first, second = ended.stderr.splitlines()
    assert (ended.returncode, ended.stdout) == (1, "")
    assert re.fullmatch(r"error: \S+ has no module (pydantic|yaml), which dtrain needs\.", first)
    assert re.match("(Use the environment|Create an environment|Install it).*: .*(activate|pip install)", second)


def test_a_program_of_the_user_gets_the_error_itself() -> None:
    ended = subprocess.run(
        [sys.executable, "-S", "-c", "import dtrain"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )

    assert ended.stderr.splitlines()[0].startswith("Traceback")
    assert "ModuleNotFoundError: No module named" in ended.stderr.splitlines()[-1]


def test_the_cure_fits_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    monkeypatch.setattr(sys, "base_prefix", "/usr")
    root = tmp_path / "a checkout"

    def cure(prefix: Path | str) -> str:
        monkeypatch.setattr(sys, "prefix", str(prefix))
        return environment._cure("pyyaml", root)

    activate = f"source '{root}/.venv/bin/activate'"
    assert cure("/usr") == "Install it: /usr/bin/python3 -m pip install pyyaml"  # dtrain is not in a checkout
    (root / "launch").mkdir(parents=True)
    (root / "launch" / "quickstart").touch()
    assert cure("/usr").endswith(f": '{root}/launch/quickstart' && {activate}")
    assert cure("/home/own") == f"Install it: /usr/bin/python3 -m pip install -e '{root}'"
    (root / ".venv" / "bin").mkdir(parents=True)
    (root / ".venv" / "bin" / "python").touch()
    assert cure("/usr") == cure("/home/own") == f"Use the environment of this checkout: {activate}"
    assert cure(root / ".venv") == f"Install it: /usr/bin/python3 -m pip install -e '{root}'"  # it is incomplete


def test_a_module_that_is_missed_later_has_no_traceback_either() -> None:
    record = error_record(ModuleNotFoundError("No module named 'torch'", name="torch._C"), SINGLE)

    assert record.message.startswith(f"{sys.executable} has no module torch, which dtrain needs.\n")
    own = ModuleNotFoundError("No module named 'own_model'", name="own_model")
    assert for_user(own) is own
    assert missing_module(ImportError("libcudart.so.12: cannot open shared object file", name="torch")) is None
    assert missing_module(KeyError("torch")) is None


def test_every_dependency_is_known_by_the_name_of_its_module() -> None:
    required = importlib.metadata.requires("dtrain") or []
    packages = {re.match(r"[\w.-]+", line)[0].lower() for line in required if "extra ==" not in line}  # type: ignore[index]

    assert packages == {package.lower() for package in MODULES.values()}
    modules_of = importlib.metadata.packages_distributions()
    for module, package in MODULES.items():
        assert package in [name.lower().replace("_", "-") for name in modules_of[module]]
