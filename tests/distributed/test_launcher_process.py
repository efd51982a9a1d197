"""The command that the user typed, as it is printed to go on with a run."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from dtrain.distributed import launcher_process
from dtrain.distributed.launcher_process import how_to_go_on
from dtrain.distributed.topology import SINGLE


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    launcher_process._typed_words.cache_clear()
    yield
    launcher_process._typed_words.cache_clear()


def test_the_command_is_the_one_that_was_typed_with_what_has_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["/src/dtrain/main.py", "run.name=my run"])
    monkeypatch.setattr(sys, "orig_argv", ["python", "dtrain/main.py", "run.name=my run"])

    assert how_to_go_on(SINGLE) == "This command goes on:\npython dtrain/main.py 'run.name=my run'"
    assert how_to_go_on(SINGLE, ["run.overwrite=false"]).endswith("'run.name=my run' run.overwrite=false")


def test_a_script_with_an_interpreter_line_is_shown_by_its_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "dtrain"
    script.write_text("#!/bin/sh")
    script.chmod(0o755)
    monkeypatch.setattr(sys, "argv", [str(script)])
    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python3.11", str(script), "train.epochs=2"])

    assert launcher_process._as_typed(sys.orig_argv) == (str(script), "train.epochs=2")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert how_to_go_on(SINGLE) == "This command goes on:\ndtrain train.epochs=2"


def test_mpirun_is_shown_as_it_was_typed() -> None:
    assert launcher_process._as_typed(["/opt/bin/prterun", "-np", "2"]) == ("mpirun", "-np", "2")


@pytest.mark.parametrize(
    "topology",
    [
        replace(SINGLE, num_nodes=2, launcher="torchrun"),
        replace(SINGLE, exit_file=Path("exit.json"), launcher="torchrun"),
        replace(SINGLE, launcher="slurm"),
        replace(SINGLE, launcher="torchrun"),
    ],
    ids=["several nodes", "launch script", "srun", "no launcher above this test"],
)
def test_where_the_command_is_not_known_the_same_one_goes_on(monkeypatch: pytest.MonkeyPatch, topology: object) -> None:
    monkeypatch.setattr(sys, "argv", ["dtrain/main.py"])

    assert how_to_go_on(topology) == "The same command goes on."  # type: ignore[arg-type]
    assert how_to_go_on(topology, ["a.b=1"]) == "The same command with a.b=1 goes on."  # type: ignore[arg-type]


def test_code_that_calls_fit_has_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["train_mine.py"])

    assert how_to_go_on(SINGLE) == "The same command goes on."
