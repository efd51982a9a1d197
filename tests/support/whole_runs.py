"""Whole commands on the ranks of a test, from settings to run folder, as the command line runs them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtrain.commands.evaluate import run_evaluate
from dtrain.commands.train import run_train
from dtrain.config.load import load_config
from dtrain.distributed.rank_context import RankContext
from dtrain.runs.jsonl import read_metrics


def commands(
    context: RankContext, runs: Sequence[tuple[str, list[str]]], file: Path | None = None
) -> list[dict[str, Any]]:
    """Collective. Runs them in this order.

    Args:
        runs: command (train or evaluate) and its settings as `section.key=value`, run.output_dir and run.name included.
        file: the config file under all of them.

    Returns:
        For each: final metrics, the loss of every logged step, and what is written in predictions/validation.jsonl.
    """
    found = []
    for command, settings in runs:
        config = load_config(file, settings, command=command)
        result = (run_train if command == "train" else run_evaluate)(config, context)
        found.append(
            {
                "metrics": result.metrics,
                "losses": _losses(result.run_dir) if command == "train" and context.is_main else [],
                "predictions": _predictions(result.run_dir) if context.is_main else [],
            }
        )
    return found


def _losses(run_dir: Path) -> list[float]:
    return [event["loss"] for event in read_metrics(run_dir / "metrics.jsonl") if event["event"] == "train"]


def _predictions(run_dir: Path) -> list[Any]:
    file = run_dir / "predictions" / "validation.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
