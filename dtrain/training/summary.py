"""Writes summary.json and predictions/, which every command that evaluates leaves in its run folder."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dtrain.config import bounded_json
from dtrain.distributed.rank_context import RankContext
from dtrain.runs.folder import write_json_atomic, write_lines_atomic
from dtrain.training.evaluation import EvaluationResult


@dataclass(frozen=True)
class Result:
    """The result of a run.

    Attributes:
        metrics: results of the best step's evaluation if evaluation.best is set, else of the last one.
        run_dir: the run folder.
    """

    metrics: dict[str, float]
    run_dir: Path


def summary(
    command: str, result: EvaluationResult | None, context: RankContext, *, engine: str, seconds: float
) -> dict[str, Any]:
    """Returns the part of summary.json that all commands share; metrics are flat under `eval`."""
    return {
        "command": command,
        "eval": dict(result.metrics) if result is not None else {},
        "world_size": context.world_size,
        "engine": engine,
        "launcher": context.topology.launcher,
        "seconds": seconds,
        "versions": versions(),
    }


def write(run_dir: Path, summary: dict[str, Any], result: EvaluationResult | None) -> None:
    """Writes predictions/ and then summary.json, whose presence means that everything is complete."""
    for split, split_result in result.splits.items() if result is not None else ():
        write_lines_atomic(run_dir / "predictions" / f"{split}.jsonl", split_result.records)
    write_json_atomic(run_dir / "summary.json", summary)


def read(run_dir: Path) -> dict[str, Any]:
    """Reads the summary of a finished run."""
    summary: dict[str, Any] = bounded_json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    return summary


def versions() -> dict[str, str]:
    """Returns the versions of the packages that determine results."""
    versions = {"python": platform.python_version()}
    for package in ("dtrain", "torch", "transformers", "datasets", "deepspeed", "tokenizers"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
