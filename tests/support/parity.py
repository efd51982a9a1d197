"""What every task promises: the losses, metrics and predictions of one process on any number of ranks, and a model that
plain transformers loads.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dtrain.config.schema import Model as ModelSettings
from dtrain.distributed.rank_context import RankContext
from dtrain.models.unpadding import prepare_unpadding
from dtrain.training.evaluation import evaluate
from dtrain.training.export import export_model
from tests.support import training
from tests.support.evaluated import records_of
from tests.support.training import Recorder, Setting

SETTING = Setting(steps=5, global_batch_size=5, micro_batch_size=2, dropout=0.1)
"""Of at least 6 rows: steps of three micro-batches, the last of one example, and a shorter last step."""


def trained(context: RankContext, learns: Any, module: nn.Module, broken: str | None, folder: str | None) -> Any:
    """Collective. A short run and its evaluation in micro-batches of 3; the model goes to `folder`, if there is one."""
    setting = Setting(**{**vars(SETTING), "broken": broken})
    recorder = Recorder()
    engine = training.build(context, setting, module, learns).go(recorder)
    result = evaluate(engine, learns, micro_batch_size=3)
    if folder is not None:
        export_model(engine, learns.tokenizer, Path(folder) / "model")
    engine.release()
    return {
        "steps": recorder.steps,
        "metrics": result.metrics,
        "records": records_of(result.splits["validation"], context),
    }


def assert_same(expected: Any, found: Any) -> None:
    """Losses to 1e-6 (float32 weights from sums in another order), choices and the metrics made of them to the digit."""
    assert training.worst(expected, found) < 1e-6
    assert [step["targets"] for step in found["steps"]] == [step["targets"] for step in expected["steps"]]
    assert found["metrics"] == {**expected["metrics"], "loss": pytest.approx(expected["metrics"]["loss"], rel=1e-6)}
    for name in ("prediction", "reference", "targets"):
        assert [r[name] for r in found["records"]] == [r[name] for r in expected["records"]]


def logits_of(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """What the model answers in eval mode, for padding too, whose states are zeros where a model computes none."""
    prepare_unpadding(model, ModelSettings(unpad="off"))
    with torch.no_grad():
        return torch.cat([value.flatten() for value in model.eval()(**inputs).to_tuple()])


def assert_loads(folder: Path, auto_class: Any, inputs: dict[str, torch.Tensor], expected: torch.Tensor) -> None:
    """Plain from_pretrained gives a model with those logits, and no weight is new or left over."""
    loaded, info = auto_class.from_pretrained(folder / "model", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.allclose(logits_of(loaded, inputs), expected, rtol=1e-6, atol=1e-6)
