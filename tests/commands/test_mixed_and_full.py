"""Checkpoints of two runs in one folder, and a disk that is full when training has ended."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.runs.folder import write_exit
from tests.support import jobs

pytestmark = pytest.mark.commands


def test_a_checkpoint_of_another_run_is_refused_whole_or_in_part(tmp_path: Path) -> None:
    def train(name: str, steps: int, seed: int = 0) -> jobs.Job:
        more = {
            "checkpoint__every": "1",
            "checkpoint__keep": "3",
            "train__max_steps": str(steps),
            "run__seed": str(seed),
        }
        return jobs.run([*jobs.python(), *jobs.settings(tmp_path / "runs", name, **more)])

    first, second = (tmp_path / "runs" / name / "checkpoints" for name in "ab")
    assert train("a", 3).process.returncode == 0
    assert train("b", 2).process.returncode == 0
    shutil.copytree(first / "step-000003", second / "step-000003")

    mixed = train("b", 4)

    assert mixed.process.returncode == 6, mixed.text
    assert f"{second / 'step-000003'} was written by another run" in mixed.text
    assert jobs.exit_of(second.parent)["code"] == 6

    shutil.rmtree(second / "step-000003")
    weights = next((first / "step-000002").glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # the same settings give the same weights: another file of the same size
    (second / "step-000002" / weights.name).write_bytes(content)

    repaired = train("b", 4)

    assert repaired.process.returncode == 0, repaired.text
    assert f"{second / 'step-000002'} is damaged" in repaired.text
    assert "resumes from the checkpoint of step 1" in repaired.text


FULL = """
import os, sys
sys.path.insert(0, ROOT)
from dtrain import main
from dtrain.training import run, summary
disk, full_at = sys.argv[-2:]
del sys.argv[-2:]

def fill():
    with open(disk + "/filler", "wb", buffering=0) as file:
        for size in (1 << 16, 4096, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass

def first_fill(module, name):
    real = getattr(module, name)
    def filled(*args, **more):
        fill()
        return real(*args, **more)
    setattr(module, name, filled)

first_fill(*{"export": (run, "export_model"), "summary": (summary, "write"), "exit": (main, "write_exit_json")}[full_at])
main.console_script()
"""


def may_mount() -> bool:
    mount = ["unshare", "-Urm", "mount", "-t", "tmpfs", "none", "/mnt"]
    return (
        shutil.which("unshare") is not None and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    )


@pytest.mark.skipif(not may_mount(), reason="needs a mount namespace of its own")
@pytest.mark.parametrize(("full_at", "code"), [("export", 6), ("summary", 1), ("exit", 0)])
def test_a_disk_that_is_full_after_training_is_named_and_costs_no_step(tmp_path: Path, full_at: str, code: int) -> None:
    script, disk = tmp_path / "faulty.py", tmp_path / "disk"
    disk.mkdir()
    script.write_text(f"ROOT = {str(jobs.ROOT)!r}\n{FULL}")
    settings = jobs.settings(
        tmp_path / "runs", "r", checkpoint__every="3", checkpoint__asynchronous="false", run__output_dir=disk / "runs"
    )
    again = " ".join(f"'{each}'" for each in [sys.executable, str(jobs.ROOT / "dtrain" / "main.py"), *settings])
    steps = f"""mount -t tmpfs -o size=8m none {disk} && cd {jobs.ROOT} || exit 99
"$0" "$@"; echo "code $?"
cat {disk}/runs/r/exit.json 2>/dev/null; echo; rm {disk}/filler
{again}; echo "code $?"; cat {disk}/runs/r/exit.json"""

    job = jobs.run(["unshare", "-Urm", "sh", "-c", steps, sys.executable, str(script), *settings, str(disk), full_at])

    first, _, second = job.text.partition("\ncode ")
    assert f"\ncode {code}\n" in job.text, job.text
    assert "Traceback" not in job.text
    assert ("No space left on device" in first) == (code != 0)
    assert "step 1/3" not in second, "it trains again"
    assert "code 0\n" in second
    record, _ = json.JSONDecoder().raw_decode(job.text[job.text.rindex("\n{\n") :].strip())
    assert record["code"] == 0
    if code:
        assert json.loads(second[second.index("{") : second.index("\n}") + 2])["code"] == code
    else:  # there is no room for exit.json, and no empty one
        assert not second.split("\n")[1].strip()


def test_no_part_of_exit_json_is_left_without_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part would keep the others from writing theirs."""

    def no_links(*_args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    def no_room(*_args: object, **_more: object) -> None:
        raise OSError(28, "No space left on device")

    end = {"code": 3, "cause": "DataError", "rank": 0, "host": "a", "message": "m"}
    monkeypatch.setattr("os.link", no_links)
    monkeypatch.setattr("json.dump", no_room)
    assert not write_exit(tmp_path / "exit.json", **end)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    assert write_exit(tmp_path / "exit.json", **end)  # type: ignore[arg-type]
