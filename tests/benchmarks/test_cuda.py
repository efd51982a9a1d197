"""The GPU script without a GPU: its arguments, a part that fails, and a dry run of what a CPU can do."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.benchmarks import cuda
from tests.benchmarks.cuda_parts import LLAMA, PARTS, _utilization


def test_all_parts_run_by_default_and_a_wrong_one_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert cuda.parse([]).parts == list(PARTS) == list(cuda.LIMITS_S)
    assert cuda.parse(["nccl", "--device", "cpu", "--tiny"]).parts == ["nccl"]
    with pytest.raises(SystemExit):
        cuda.parse(["bret"])
    assert "bret is not a part. The parts: bert, " in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cuda.parse(["--device", "cpu"])
    assert "--device cpu needs --tiny" in capsys.readouterr().err


def test_without_a_gpu_it_says_so_and_ends_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cuda, "missing_device", lambda: "torch finds no CUDA device.")

    assert cuda.main([]) == 2
    assert capsys.readouterr().err == (
        "torch finds no CUDA device. Add --device cpu --tiny to see whether the parts run.\n"
    )


def test_a_part_that_fails_or_has_no_time_left_is_named_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    monkeypatch.setattr(cuda, "LIMITS_S", {**cuda.LIMITS_S, "llama": 0.0})

    code = cuda.main(["--device", "cpu", "--tiny", "--output", str(tmp_path), "nccl", "llama", "syncs"])

    assert code == 1
    rows = json.loads((tmp_path / "cuda_dry_run.json").read_text(encoding="utf-8"))["rows"]
    assert [row["name"] for row in rows] == ["nccl", "llama", "syncs"]
    assert [row["lanes"][0]["status"].split("\n")[0] for row in rows] == [
        "failed: exit 1",
        "not run: less than 10 s of the time limit were left",
        "failed: exit 1",
    ]
    assert "| nccl | failed: exit 1 |" in (tmp_path / "cuda_dry_run.md").read_text(encoding="utf-8")


def test_utilization_counts_the_arithmetic_of_one_token() -> None:
    found = _utilization(dict(LLAMA), 1_000_000_000, 2048, 10_000.0)

    assert found["utilization_flops"] == 6e9 * 10_000
    assert found["utilization_with_attention_flops"] == (6e9 + 6 * 16 * 2048 * 2048) * 10_000


def test_the_pages_say_how_to_run_it_and_that_nothing_was_measured_yet() -> None:
    root = Path(cuda.__file__).parents[2]
    for page in (root / "docs" / "performance.md", root / "tests" / "benchmarks" / "README.md"):
        text = page.read_text(encoding="utf-8")
        assert "python -m tests.benchmarks.cuda --output tests/benchmarks/results" in text
        if not (cuda.RESULTS / "cuda.json").exists():
            assert "no figure of a GPU was measured yet" in " ".join(text.split())


@pytest.mark.commands
@pytest.mark.slow
def test_a_dry_run_of_the_parts_on_a_cpu(tmp_path: Path) -> None:
    code = cuda.main(["--device", "cpu", "--tiny", "--output", str(tmp_path), "launch_bound", "llama", "syncs", "nccl"])

    rows = json.loads((tmp_path / "cuda_dry_run.json").read_text(encoding="utf-8"))["rows"]
    assert code == 0, rows
    race, llama, syncs, nccl = rows
    assert [lane["name"] for lane in race["lanes"]] == ["dtrain", "dtrain, model.unpad=off", "HF Trainer"]
    assert all(len(lane["samples"]["wall_s"]) == 2 for lane in race["lanes"])
    assert llama["lanes"][0]["figures"]["tokens_per_second"] > 0
    assert syncs["lanes"][0]["figures"]["syncs"] == 0
    assert all(nccl["checks"].values())
