"""launch/: the set-up of .venv, with a stand-in for Python that records its calls; and how the commands end."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.launchers

ROOT = Path(__file__).parents[2]
LIMIT_S = 30

# Replaces python3 and .venv/bin/python. Writes "venv" and "pip ..." to $NOTES; most other commands really run.
STUB = f"""#!/bin/sh
case "$*" in
"-m venv "*) echo venv >>"$NOTES"; mkdir -p "$3/bin"; cp "$0" "$3/bin/python" ;;
"-m pip "*) for what; do :; done; echo "pip for $what" >>"$NOTES"; sleep "${{PIP_S:-0}}"; exit "${{PIP_CODE:-0}}" ;;
*import\\ torch*) exit 1 ;;
"-m ruff "*|"-m mypy"*) echo "$2" >>"$NOTES" ;;
"-m pytest"*) shift; echo "$*" >>"$NOTES" ;;
"-c import pip") exit 0 ;;
*"import venv, ensurepip"*) exit "${{ENSUREPIP_CODE:-0}}" ;;
*version_info*) exit "${{VERSION_CODE:-0}}" ;;
--version) echo "Python ${{VERSION:-3.11.7}}" ;;
*) exec "{sys.executable}" "$@" ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of launch/ in a folder with a space in its name, with a stub for Python."""
    root = tmp_path / "a checkout"
    shutil.copytree(ROOT / "launch", root / "launch")
    (root / "pyproject.toml").write_text("one\n")
    (root / "constraints.txt").write_text("one\n")
    stub = root / "stub-python"
    stub.write_text(STUB)
    stub.chmod(0o755)
    return root


def environment(checkout: Path, **more: str) -> dict[str, str]:
    return {
        **os.environ,
        "PYTHON": str(checkout / "stub-python"),
        "NOTES": str(checkout / "notes"),
        "EXTRA_NOTE": "",
        **more,
    }


def set_up(checkout: Path, extra: str = "", **more: str) -> subprocess.CompletedProcess[str]:
    script = f'set -euo pipefail; source "$1/launch/setup.sh"; set_up {extra}; pwd'
    return subprocess.run(
        ["bash", "-c", script, "bash", str(checkout)],
        env=environment(checkout, **more),
        cwd="/",
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )


def notes(checkout: Path) -> list[str]:
    """Returns the lines that the stub wrote since the last call."""
    path = checkout / "notes"
    lines = path.read_text().splitlines() if path.exists() else []
    path.unlink(missing_ok=True)
    return lines


def test_the_first_call_creates_the_environment_and_the_second_does_nothing(checkout: Path) -> None:
    first = set_up(checkout)

    assert first.returncode == 0, first.stderr
    assert first.stdout.endswith(f"{checkout}\n")
    assert "GB" in first.stdout
    assert notes(checkout) == ["venv", "pip for ."]
    second = set_up(checkout, PYTHON="/none")
    assert (second.returncode, second.stdout, notes(checkout)) == (0, f"{checkout}\n", [])


def test_the_test_tools_are_added_once_and_include_the_rest(checkout: Path) -> None:
    set_up(checkout)
    notes(checkout)

    set_up(checkout, "dev")
    assert notes(checkout) == ["pip for .[dev]"]
    set_up(checkout, "dev")
    set_up(checkout)
    assert notes(checkout) == []


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_changed_requirements_are_installed(checkout: Path, name: str) -> None:
    set_up(checkout)
    notes(checkout)
    (checkout / name).write_text("two\n")

    set_up(checkout)

    assert notes(checkout) == ["pip for ."]


def test_an_interrupted_set_up_starts_over(checkout: Path) -> None:
    failed = set_up(checkout, PIP_CODE="1")
    (checkout / ".venv" / "half-made").touch()
    notes(checkout)

    again = set_up(checkout)

    assert failed.returncode == 1
    assert "pip could not install dtrain" in failed.stderr
    assert "An earlier set-up" in again.stdout
    assert notes(checkout) == ["venv", "pip for ."]
    assert not (checkout / ".venv" / "half-made").exists()


def test_an_environment_without_a_working_python_is_recreated(checkout: Path) -> None:
    (checkout / ".venv" / "bin").mkdir(parents=True)

    assert "no working Python" in set_up(checkout).stdout
    assert notes(checkout) == ["venv", "pip for ."]


def test_an_environment_that_the_user_created_is_kept(checkout: Path) -> None:
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / "precious").touch()
    shutil.copy(checkout / "stub-python", checkout / ".venv" / "bin" / "python")

    set_up(checkout, PIP_CODE="1")
    set_up(checkout)

    assert notes(checkout) == ["pip for .", "pip for ."]
    assert (checkout / ".venv" / "precious").exists()


def test_a_checkout_that_was_copied_with_its_environment_creates_a_new_one(checkout: Path, tmp_path: Path) -> None:
    set_up(checkout)
    copy = tmp_path / "copy"
    shutil.copytree(checkout, copy)
    notes(copy)

    assert "was created for" in set_up(copy).stdout
    assert notes(copy) == ["venv", "pip for ."]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"VERSION_CODE": "1", "VERSION": "3.9.1"}, "is not a Python from 3.10 to 3.13: Python 3.9.1"),
        ({"PYTHON": "/none/python"}, "PYTHON=/none/python is not a Python from 3.10 to 3.13"),
        ({"ENSUREPIP_CODE": "1"}, "apt install python3-venv"),
    ],
)
def test_an_unsuitable_python_is_reported_with_the_fix(checkout: Path, variables: dict[str, str], message: str) -> None:
    ended = set_up(checkout, **variables)

    assert ended.returncode == 1
    assert message in ended.stderr
    assert not (checkout / ".venv").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="flock needs Linux")
def test_of_two_parallel_set_ups_one_installs_and_the_other_waits(checkout: Path) -> None:
    script = 'set -euo pipefail; source "$1/launch/setup.sh"; set_up'
    command = ["bash", "-c", script, "bash", str(checkout)]
    both = [
        subprocess.Popen(command, env=environment(checkout, PIP_S="1"), stdout=subprocess.DEVNULL) for _ in range(2)
    ]

    assert [process.wait(LIMIT_S) for process in both] == [0, 0]
    assert notes(checkout) == ["venv", "pip for ."]


TWO_FILES = "pytest -n 2 --dist loadfile --no-loadscope-reorder"


@pytest.mark.parametrize(
    ("arguments", "user", "installs", "tests"),
    [
        (
            [],
            0,
            False,
            [
                f"{TWO_FILES} -m not launchers and not cluster and not slow and not gpu",
                "pytest -m (launchers or cluster) and not slow and not gpu",
            ],
        ),
        (["--all"], 0, True, [f"{TWO_FILES} -m not launchers and not cluster", "pytest -m (launchers or cluster)"]),
        (
            ["--nightly"],
            0,
            True,
            [f"{TWO_FILES} -m not launchers and not cluster --nightly", "pytest -m (launchers or cluster) --nightly"],
        ),
        (["--all", "tests/job"], 1000, False, ["pytest tests/job"]),
        (["tests/job", "-k", "a b"], 0, False, ["pytest -m not slow and not gpu tests/job -k a b"]),
    ],
    ids=["plain", "all", "nightly", "part of all", "part"],
)
@pytest.mark.skipif(sys.platform != "linux", reason="the simulated cluster needs Linux")
def test_a_test_run_selects_its_stages_and_only_a_complete_one_by_root_installs_cluster_tools(
    checkout: Path, arguments: list[str], user: int, installs: bool, tests: list[str]
) -> None:
    (checkout / "bin").mkdir()
    for path, text in (
        (checkout / "bin" / "id", f"#!/bin/sh\necho {user}\n"),
        (
            checkout / "launch" / "simulate-cluster",
            "import os, sys\nprint(*sys.argv[1:], file=open('notes', 'a'))\nsys.exit(4)\n",
        ),
    ):
        path.write_text(text)
        path.chmod(0o755)

    ended = subprocess.run(
        [str(checkout / "launch" / "test"), *arguments],
        env=environment(checkout, PATH=f"{checkout / 'bin'}:{os.environ['PATH']}"),
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
    )

    assert ended.returncode == 0, ended.stderr  # also if they cannot be installed: those tests are then skipped
    checks = ["ruff", "ruff", "mypy", *tests]
    assert notes(checkout) == ["venv", "pip for .[dev]", *(["install"] if installs else []), *checks]


def job(checkout: Path, body: str) -> None:
    """Replaces dtrain with a Python program; `body` is what it does with --ranks."""
    set_up(checkout)
    notes(checkout)
    indented = body.strip().replace("\n", "\n    ")
    start = "import os, signal, sys, time\nif '--ranks' not in sys.argv:\n    print('main', *sys.argv[1:])\nelse:"
    (checkout / "dtrain").mkdir()
    (checkout / "dtrain" / "main.py").write_text(f"{start}\n    {indented}\n")


def quickstart(checkout: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(checkout / "launch" / "quickstart"), *arguments]
    return subprocess.run(command, env=environment(checkout), cwd="/", capture_output=True, text=True, timeout=LIMIT_S)


def test_quickstart_trains_on_two_ranks_and_shows_a_sample(checkout: Path) -> None:
    job(checkout, "print('job', *sys.argv[1:], os.environ['CUDA_VISIBLE_DEVICES'] == '')")

    ended = quickstart(checkout, "run.name=mine", "train.max_steps=2")

    assert ended.returncode == 0, ended.stderr
    trained, _, _, sample = ended.stdout.splitlines()
    assert trained == "job --ranks 2 run.overwrite=true run.name=mine train.max_steps=2 True"
    assert sample.startswith("main generate runs/mine ")


def test_quickstart_shows_no_sample_if_no_model_is_trained(checkout: Path) -> None:
    job(checkout, "print('the plan')")

    assert quickstart(checkout, "--dry-run").stdout == "the plan\n"


def test_quickstart_exits_with_the_jobs_own_code_and_message(checkout: Path) -> None:
    job(checkout, "print('saved, run again'); sys.exit(75)")

    ended = quickstart(checkout)

    assert (ended.returncode, ended.stdout, ended.stderr) == (75, "saved, run again\n", "")


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_job_and_quickstart_waits_for_its_end(checkout: Path, sent: signal.Signals) -> None:
    job(
        checkout,
        f"""
def end(number, frame):
    print(signal.Signals(number).name, flush=True)
    sys.exit(75)
signal.signal({sent.value}, end)
print('ready', flush=True)
time.sleep({LIMIT_S})
""",
    )
    command = [str(checkout / "launch" / "quickstart")]
    with subprocess.Popen(command, env=environment(checkout), stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(sent)
        output, _ = process.communicate(timeout=LIMIT_S)

    assert (process.returncode, output) == (75, f"{sent.name}\n")


def test_ctrl_c_ends_a_job_that_has_not_set_its_own_handler_yet(checkout: Path) -> None:
    job(checkout, f"print('ready', flush=True)\ntime.sleep({LIMIT_S})")
    command = [str(checkout / "launch" / "quickstart")]
    with subprocess.Popen(
        command, env=environment(checkout), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        process.send_signal(signal.SIGINT)

        assert process.wait(LIMIT_S / 3) == 128 + signal.SIGINT
