"""torch.compile over several ranks and over frozen parts. Not among the unit tests: loading the compiler takes seconds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from dtrain.config.schema import Freeze
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.models.freezing import freeze
from tests.support import tiny, training
from tests.support.multirank import run_ranks
from tests.support.training import Setting, worst

pytestmark = pytest.mark.ranks


@pytest.mark.slow
def test_a_compiled_model_is_the_same_method_with_other_rounding() -> None:
    plain = Setting(dropout=0.0)  # compiled dropout draws otherwise

    compiled = run_ranks(training.run, 2, replace(plain, compile=True), timeout_s=280)[0]

    assert worst(training.run(ONE_PROCESS, plain), compiled) <= 0.02


def test_no_grad_survives_compiling() -> None:
    model = tiny.bert(layers=1)
    freeze(model, Freeze(modules=("embeddings",), method="no_grad"))
    model.compile(backend="eager", fullgraph=True)

    model(input_ids=torch.tensor([[2, 7, 8, 3], [2, 9, 10, 3]])).logits.sum().backward()

    learnt = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learnt == {name for name, _ in model.named_parameters() if not name.startswith("bert.embeddings.")}
