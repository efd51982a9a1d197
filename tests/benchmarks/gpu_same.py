"""Parts of `python -m tests.benchmarks.gpu` that show equal answers: engines on GPUs against the CPU, and bits with engine.bitwise."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks import bitwise as bitwise_script
from tests.benchmarks import same_bits
from tests.benchmarks.suite import machine
from tests.benchmarks.suite.race import ContestantError, Lane
from tests.benchmarks.suite.result import RowResult

MASK = "CUDA_VISIBLE_DEVICES"
AGAINST_CPU, AGAINST_ONE_GPU = 1e-4, 1e-5
"""Largest relative difference of a step's loss in fp32, without dropout against the CPU: its draws differ there."""

MOST_RANKS = 4
"""Ranks of these parts, also where there are more GPUs: what holds for four holds for eight."""


@dataclass(frozen=True)
class Setup:
    """What a part is told.

    Attributes:
        device: cuda or cpu.
        tiny: sizes that a CPU computes in seconds: shows that the part runs, and nothing else.
        scratch: folder for models, data and runs.
    """

    device: str
    tiny: bool
    scratch: Path

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"


def same_answer(setup: Setup) -> RowResult:
    """The loss of each step on a GPU and on several, in every engine, against one process on the CPU."""
    steps, ranks = (3, 2) if setup.tiny else (30, _ranks(setup))
    values: dict[str, object] = {**_values(setup, steps), "model.config.hidden_dropout_prob": 0.0}
    values["model.config.attention_probs_dropout_prob"] = 0.0
    expected = _losses(_start(setup, "cpu", values, ranks=1, mask=""), steps)
    layouts = [("single", 1), *([("ddp", ranks), ("fsdp", ranks), ("deepspeed", ranks)] if ranks > 1 else [])]
    if setup.tiny:
        layouts = layouts[:2]
    lanes, checks, one = [], {}, expected
    for engine, count in layouts:
        name = f"{engine}, {count} rank(s)"
        chosen = {**values, "engine.name": engine} | ({"engine.zero_stage": 2} if engine == "deepspeed" else {})
        found = _losses(_start(setup, name.replace(", ", "-"), chosen, ranks=count), steps)
        against = {"off_cpu": _off(expected, found), "off_one": _off(one, found)}
        one = found if count == 1 else one
        lanes.append(Lane(name, figures={**against, "last": found[-1]}))
        checks[f"{name}: within {AGAINST_CPU:g} of the CPU"] = against["off_cpu"] <= AGAINST_CPU
        if count > 1:
            checks[f"{name}: within {AGAINST_ONE_GPU:g} of one device"] = against["off_one"] <= AGAINST_ONE_GPU
    return RowResult(
        "same_answer",
        "the same loss on every engine",
        f"a small BERT in fp32 without dropout, {steps} steps: largest relative difference of a step's loss.",
        lanes,
        {"off from CPU": ("off_cpu", 1.0, 8), "off from one": ("off_one", 1.0, 8), "last loss": ("last", 1.0, 6)},
        checks=checks,
    )


def bitwise(setup: Setup) -> RowResult:
    """One SHA-256 of all weights, moments and losses with engine.bitwise: twice on one GPU, and on several."""
    steps, ranks = (4, 1) if setup.tiny else (40, _ranks(setup))
    values = {**_values(setup, steps), "engine.bitwise": True}
    runs = [("first", 1), ("second", 1), *([(f"{ranks} ranks", ranks)] if ranks > 1 else [])]
    found = {
        name: bitwise_script.hashes(_start(setup, f"bitwise-{name[:6].strip()}", values, ranks=count), steps)
        for name, count in runs
    }
    first = found["first"]
    return RowResult(
        "bitwise",
        "equal bits with engine.bitwise",
        f"a small BERT with dropout, {steps} steps, torch's deterministic kernels.",
        [
            Lane(name, figures={**parts, "equal": sum(parts[key] == first[key] for key in first)})
            for name, parts in found.items()
        ],
        {"equal of 3 hashes": ("equal", 1.0, 0)},
        checks={
            f"{name}: the {part} have every bit of the first run": parts[part] == first[part]
            for name, parts in found.items()
            if name != "first"
            for part in first
        },
    )


def _ranks(setup: Setup) -> int:
    import torch

    return min(torch.cuda.device_count(), MOST_RANKS) if setup.on_gpu else 1


def _values(setup: Setup, steps: int) -> dict[str, object]:
    data = setup.scratch / "small"
    if not data.exists():
        same_bits.write_data(data)
    return bitwise_script.settings(data, steps=steps, is_bitwise=False)


def _start(setup: Setup, name: str, values: Mapping[str, object], *, ranks: int, mask: str | None = None) -> Path:
    """Runs dtrain and returns the run's folder.

    Args:
        mask: CUDA_VISIBLE_DEVICES; None for that of this process.
    """
    folder = setup.scratch / "runs" / name.replace("(s)", "").replace(" ", "-")
    folder.parent.mkdir(exist_ok=True)
    environment = {**same_bits.environment(machine.ROOT, setup.scratch), "OMP_NUM_THREADS": "1"}
    visible = os.environ.get(MASK) if mask is None else mask
    environment.pop(MASK, None)
    if visible is not None:
        environment[MASK] = visible
    command = same_bits.command_of(same_bits.Run(values, ranks), folder, seed=7)
    done = subprocess.run(command, cwd=machine.ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ContestantError(f"{name}: exit {done.returncode}\n{(done.stdout + done.stderr)[-2000:]}")
    return folder


def _losses(folder: Path, steps: int) -> list[float]:
    found = [float(event["loss"]) for event in same_bits.events(folder) if event["event"] == "train"]
    assert len(found) == steps, f"{len(found)} of {steps} steps"
    return found


def _off(expected: list[float], found: list[float]) -> float:
    return max(abs(a - b) / abs(a) for a, b in zip(expected, found, strict=True))
