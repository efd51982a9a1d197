"""The GPU script without a GPU: its arguments, a part that fails, and a dry run of what a CPU can do."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks import gpu
from tests.benchmarks.gpu_parts import LLAMA, PARTS, _utilization
from tests.benchmarks.suite.race import STOP_TIMEOUT_S


def test_all_parts_run_by_default_and_a_wrong_one_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.parse([]).parts == list(PARTS) == list(gpu.LIMITS_S)
    assert gpu.parse(["nccl", "--device", "cpu", "--tiny"]).parts == ["nccl"]
    with pytest.raises(SystemExit):
        gpu.parse(["bret"])
    assert "bret is not a part. The parts: nccl, " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu.parse(["--device", "cpu"])
    assert "--device cpu needs --tiny" in capsys.readouterr().err


def test_the_list_names_every_part_and_its_limit_and_the_whole_ends_within_nine_minutes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert gpu.main(["--list"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [*PARTS, "all"]
    assert lines[-1].split() == ["all", "500", "s", "at", "most"]
    assert gpu.main(["--list", "nccl", "syncs"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].split()[1] == "100"
    assert gpu.TOTAL_S + STOP_TIMEOUT_S < 540
    assert list(PARTS)[:4] == ["nccl", "gpu_tests", "same_answer", "bitwise"], "what must be right comes first"


def test_without_a_gpu_it_says_so_in_one_line_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "missing_device", lambda: "torch finds no CUDA device.")

    assert gpu.main(["--output", str(tmp_path / "results")]) == 2

    printed = capsys.readouterr()
    assert printed.err == (
        "torch finds no CUDA device. Nothing was run or written; --device cpu --tiny shows whether the parts run.\n"
    )
    assert printed.out == ""
    assert not (tmp_path / "results").exists()


STAND_IN = """
import json, os, pathlib, sys, time
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
name, scratch = words["--part"], pathlib.Path(words["--scratch"])
if name == "llama":
    sys.exit("no memory")
if name == "syncs":
    time.sleep(60)
row = {"name": name, "title": "a stand-in", "workload": os.environ["CUDA_VISIBLE_DEVICES"], "lanes": [{"name": "dtrain"}]}
(scratch / f"{name}.json").write_text(json.dumps(row))
"""


def run_stand_ins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *words: str, limits: dict[str, float] | None = None
) -> tuple[int, dict[str, Any]]:
    """The exit code and the results, where each part is a small script: llama fails, and syncs does not end."""
    monkeypatch.setattr(gpu, "PART_COMMAND", (sys.executable, "-S", "-c", STAND_IN))
    monkeypatch.setattr(gpu, "LIMITS_S", {**gpu.LIMITS_S, **(limits or {})})
    monkeypatch.setattr(gpu, "SHORTEST_S", 0.01)
    code = gpu.main(["--device", "cpu", "--tiny", "--output", str(tmp_path), *words])
    return code, json.loads((tmp_path / "gpu_dry_run.json").read_text(encoding="utf-8"))


def test_a_part_that_fails_or_does_not_end_or_has_no_time_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = {"syncs": 0.3, "bert": 0.0}

    code, found = run_stand_ins(tmp_path, monkeypatch, "nccl", "llama", "syncs", "bert", "bitwise", limits=limits)

    assert code == 1
    assert found["about"]["is_complete"] is True
    assert [(row["name"], row["lanes"][0]["status"].split("\n")[0]) for row in found["rows"]] == [
        ("nccl", "ran"),
        ("llama", "failed: exit 1"),
        ("syncs", "failed: did not end within 0 s"),
        ("bert", "not run: less than 0 s of the time limit were left"),
        ("bitwise", "ran"),
    ]
    assert "no memory" in found["rows"][1]["lanes"][0]["status"]
    page = (tmp_path / "gpu_dry_run.md").read_text(encoding="utf-8")
    assert "| llama | failed: exit 1: no memory |" in page
    assert sorted(file.name for file in tmp_path.iterdir()) == ["gpu_dry_run.json", "gpu_dry_run.md"]


def test_a_script_that_is_killed_leaves_what_was_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = gpu.run_part

    def killed_in_the_third(name: str, *others: Any) -> Any:
        if name == "bitwise":
            raise SystemExit(143)  # what SIGTERM raises
        return real(name, *others)

    monkeypatch.setattr(gpu, "run_part", killed_in_the_third)
    with pytest.raises(SystemExit):
        run_stand_ins(tmp_path, monkeypatch, "nccl", "same_answer", "bitwise", "bert")

    found = json.loads((tmp_path / "gpu_dry_run.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in found["rows"]] == ["nccl", "same_answer"]
    assert found["about"]["is_complete"] is False
    assert found["about"]["parts_left"] == ["bitwise", "bert"]
    assert "Not run: bitwise, bert." in (tmp_path / "gpu_dry_run.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("part", "visible"), [("bert", "2"), ("gpu_tests", "2,3")])
def test_a_part_for_one_gpu_sees_the_first_of_those_that_the_script_sees(
    part: str, visible: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "PART_COMMAND", (sys.executable, "-S", "-c", STAND_IN))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")

    row = gpu.run_part(part, gpu.Setup("cuda", False, tmp_path), 30.0)

    assert row.workload == visible


def test_utilization_counts_the_arithmetic_of_one_token() -> None:
    found = _utilization(dict(LLAMA), 1_000_000_000, 2048, 10_000.0)

    assert found["utilization_flops"] == 6e9 * 10_000
    assert found["utilization_with_attention_flops"] == (6e9 + 6 * 16 * 2048 * 2048) * 10_000


def test_the_pages_say_how_to_run_it_and_that_nothing_was_measured_yet() -> None:
    root = Path(gpu.__file__).parents[2]
    for page in (root / "docs" / "performance.md", root / "tests" / "benchmarks" / "README.md"):
        text = page.read_text(encoding="utf-8")
        assert "python -m tests.benchmarks.gpu --output tests/benchmarks/results" in text
        if not (gpu.RESULTS / "gpu.json").exists():
            assert "no figure of a GPU was measured yet" in " ".join(text.split())


DRY = ("launch_bound", "llama", "syncs", "nccl", "same_answer", "bitwise")


@pytest.mark.commands
@pytest.mark.slow
def test_a_dry_run_of_the_parts_on_a_cpu(tmp_path: Path) -> None:
    code = gpu.main(["--device", "cpu", "--tiny", "--output", str(tmp_path), *DRY])

    rows = json.loads((tmp_path / "gpu_dry_run.json").read_text(encoding="utf-8"))["rows"]
    assert code == 0, rows
    race, llama, syncs, nccl, same, bits = rows
    assert [lane["name"] for lane in race["lanes"]] == ["dtrain", "dtrain, model.unpad=off", "HF Trainer"]
    assert all(len(lane["samples"]["wall_s"]) == 2 for lane in race["lanes"])
    assert llama["lanes"][0]["figures"]["tokens_per_second"] > 0
    assert syncs["lanes"][0]["figures"]["syncs"] == 0
    assert all(all(row["checks"].values()) for row in (nccl, same, bits))
    assert [lane["name"] for lane in same["lanes"]] == ["single, 1 rank(s)", "ddp, 2 rank(s)"]
