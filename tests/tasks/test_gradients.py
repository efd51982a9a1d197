"""The gradient's norms by part of the model, and where they are logged."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from dtrain.runs.jsonl import read_metrics
from dtrain.runs.tracking import Tracker
from dtrain.training.monitors.gradients import LogGradients, by_group
from dtrain.training.monitors.protocol import Decision, StepRecord

NORMS = {
    "bert.embeddings.word_embeddings.weight": 3.0,
    "bert.embeddings.LayerNorm.bias": 4.0,
    "bert.encoder.layer.0.attention.self.query.weight": 1.0,
    "bert.encoder.layer.1.output.dense.weight": 2.0,
    "classifier.weight": 5.0,
    "classifier.bias": 12.0,
}
STEP = StepRecord(
    step=4,
    epoch=1.0,
    loss=1.0,
    grad_norm=1.0,
    learning_rate=0.1,
    examples=8,
    targets=8,
    applied=True,
    finite=True,
    faults=(),
    ends_epoch=False,
    is_last=False,
)


def test_norms_of_a_layer_are_the_root_of_the_sum_of_squares() -> None:
    assert by_group(NORMS) == {
        "bert.embeddings": 5.0,
        "bert.encoder.layer.0": 1.0,
        "bert.encoder.layer.1": 2.0,
        "classifier": 13.0,
    }


def test_a_step_without_norms_writes_nothing() -> None:
    written: list[tuple[int, Mapping[str, float]]] = []
    monitor = LogGradients(lambda step, norms: written.append((step, norms)))

    decisions = [monitor.after_step(STEP), monitor.after_step(replace(STEP, gradient_norms={"head.weight": 2.0}))]

    assert decisions == [Decision.CONTINUE, Decision.CONTINUE]
    assert written == [(4, {"head": 2.0})]


@pytest.mark.parametrize("tensorboard", [False, True])
def test_norms_go_into_the_log_and_to_tensorboard_also_where_they_are_not_finite(
    tmp_path: Path, tensorboard: bool
) -> None:
    with Tracker(tmp_path, is_main=True, total_steps=4, first_step=0, tensorboard=tensorboard) as tracker:
        LogGradients(tracker.gradients).after_step(replace(STEP, gradient_norms={"a.b.weight": 2.0, "c.bias": 1.0}))
        tracker.gradients(4, {"a.b": float("nan"), "c": 3.0})

    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["event"], line["step"], line["norms"]) for line in lines] == [
        ("gradients", 4, {"a.b": 2.0, "c": 1.0}),
        ("gradients", 4, {"a.b": "nan", "c": 3.0}),
    ]
    assert len(read_metrics(tmp_path / "metrics.jsonl")) == 1, "a step taken again counts with its last value"
    if tensorboard:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
        assert [event.value for event in board.Scalars("gradients/c")] == [1.0, 3.0]
        assert [event.value for event in board.Scalars("gradients/a.b")] == [2.0]
