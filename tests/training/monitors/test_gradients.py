"""train.log_gradients from outside: lines in metrics.jsonl, and nothing where it is not set."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from dtrain.config.load import load_config
from dtrain.errors import ConfigError
from tests.support import jobs
from tests.support.command_line import dtrain

pytestmark = pytest.mark.commands


def test_a_run_logs_the_norm_of_each_layer_at_every_second_step(tmp_path: Path) -> None:
    settings = jobs.settings(tmp_path, "mine", train__max_steps=5)

    measured, plain = dtrain(*settings, "train.log_gradients=2"), dtrain(*settings, "run.name=plain")

    assert (measured.code, plain.code) == (0, 0), measured.text + plain.text
    lines = {event["step"]: event["norms"] for event in jobs.read_events(tmp_path / "mine", "gradients")}
    norms = {event["step"]: event["grad_norm"] for event in jobs.read_events(tmp_path / "mine")}
    assert list(lines) == [2, 4]
    for step, parts in lines.items():
        assert {"bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1", "classifier"} <= set(parts)
        assert math.hypot(*parts.values()) == pytest.approx(norms[step], rel=1e-5)
    assert not jobs.read_events(tmp_path / "plain", "gradients")
    losses = [[event["loss"] for event in jobs.read_events(tmp_path / name)] for name in ("mine", "plain")]
    assert losses[0] == losses[1], "to look changes nothing"


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "always"])
def test_a_number_of_steps_that_is_none_is_refused(value: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.log_gradients"):
        load_config(None, [f"train.log_gradients={value}"])
