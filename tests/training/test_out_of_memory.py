"""Out of memory: the message says at what, and what to set. The memory itself is CUDA's; here the error is raised by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.engine.forward_only import ForwardOnly
from dtrain.errors import DtrainError
from dtrain.training.evaluation import evaluate
from dtrain.training.out_of_memory import size
from tests.support import tiny, training
from tests.support.training import Setting

SETTING = Setting(steps=2, shuffle=False)


def exhausted(*_: Any, **__: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore of torch's words")


def test_a_micro_batch_is_named_by_its_examples_and_length() -> None:
    assert size({"input_ids": torch.zeros(3, 7), "labels": torch.zeros(3)}) == "3 examples, 7 tokens long"
    assert size({"pixels": torch.zeros(2, 3, 8, 8)}) == "2 examples"


def test_in_training_the_micro_batch_is_named_and_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    run = training.build(ONE_PROCESS, SETTING)
    monkeypatch.setattr(run.engine, "backward", exhausted)

    with pytest.raises(DtrainError, match=r"at a micro-batch of 3 examples, \d+ tokens long.*train.micro_batch_size"):
        run.go()


def test_in_the_optimizers_step_zero_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    run = training.build(ONE_PROCESS, SETTING)
    monkeypatch.setattr(run.engine, "step", exhausted)

    with pytest.raises(DtrainError, match=r"at the optimizer's step.*engine.zero_stage=1") as raised:
        run.go()

    assert "Tried to allocate 2.00 GiB." in str(raised.value)
    assert "more of torch's words" not in str(raised.value)


def test_in_evaluation_its_own_micro_batch_size_is_named() -> None:
    task = training.task(SETTING)
    forward = ForwardOnly(tiny.bert(layers=1), SETTING.config(), ONE_PROCESS)
    forward.module.forward = exhausted

    with pytest.raises(DtrainError, match=r"evaluation micro-batch of 11 examples.*evaluation.micro_batch_size lower"):
        evaluate(forward, task, micro_batch_size=16)
