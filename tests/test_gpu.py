"""What only a CUDA device can show; skipped elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.launchers

ROOT = Path(__file__).resolve().parents[1]


def losses(folder: Path, name: str, start: list[str], *settings: str, visible: str | None = None) -> list[float]:
    """The losses of five steps of the default."""
    environment = {**os.environ, **({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})}
    command = [*start, str(ROOT / "dtrain/main.py"), f"run.output_dir={folder}", f"run.name={name}", *settings]
    command += ["train.max_steps=5", "train.log_every=1", "train.eval_every=never"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = (folder / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [event["loss"] for event in map(json.loads, lines) if event["event"] == "train"]


@pytest.mark.gpu
def test_one_gpu_takes_the_steps_of_the_cpu_in_fp32(tmp_path: Path) -> None:
    on_cpu = losses(tmp_path, "cpu", [sys.executable], visible="")

    assert losses(tmp_path, "gpu", [sys.executable]) == pytest.approx(on_cpu, rel=1e-4)
    assert losses(tmp_path, "bf16", [sys.executable], "engine.precision=bf16") == pytest.approx(on_cpu, rel=0.02)


@pytest.mark.gpu
def test_the_account_of_the_steps_is_measured_on_the_device(tmp_path: Path) -> None:
    losses(tmp_path, "gpu", [sys.executable], "train.time_every=2", "engine.precision=bf16", visible="0")

    lines = map(json.loads, (tmp_path / "gpu" / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    accounts = [line for line in lines if line["event"] == "step_time"]
    assert [line["step"] for line in accounts] == [2, 4, 5]
    # A line may lack its last step, which the next one has.
    assert sum(line["forward_s"][0] for line in accounts) > 0
    assert sum(line["backward_s"][0] for line in accounts) > 0
    for line in accounts:
        parts = [value[0] for name, value in line.items() if name.endswith("_s") and isinstance(value, list)]
        assert sum(parts) == pytest.approx(line["wall_s"], abs=1e-4)
    between = accounts[1]["monotonic_s"] - accounts[0]["monotonic_s"]
    assert accounts[1]["wall_s"] == pytest.approx(between, rel=0.5)
    assert accounts[1]["model_flops_per_second"] > 0


@pytest.mark.gpu
@pytest.mark.parametrize("settings", [(), ("engine.name=fsdp",), ("engine.zero_stage=2",), ("engine.zero_stage=3",)])
def test_all_gpus_over_nccl_take_the_steps_of_one(tmp_path: Path, settings: tuple[str, ...]) -> None:
    ranks = str(torch.cuda.device_count())
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]

    one = losses(tmp_path, "one", [sys.executable], visible="0")

    assert losses(tmp_path, "all", start, *settings) == pytest.approx(one, rel=1e-4)
