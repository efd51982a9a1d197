"""Out of memory: the message says at what, and what to set. The memory itself is CUDA's; here the error is raised by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.engine.forward_only import ForwardOnly
from dtrain.errors import DtrainError
from dtrain.training.evaluation import evaluate
from dtrain.training.out_of_memory import hints, size
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


# Texts of torch 2.2 to 2.9: from pytorch/pytorch#16417, a text with two processes, and vllm-project/vllm#35463.
ALONE = (
    "CUDA out of memory. Tried to allocate 22.00 MiB. GPU 0 has a total capacity of 23.65 GiB of which 11.06 MiB is free. "
    "Including non-PyTorch memory, this process has 23.60 GiB memory in use. Of the allocated memory 22.90 GiB is allocated by "
    "PyTorch, and {unused} is reserved by PyTorch but unallocated."
)
SHARED = (
    "CUDA out of memory. Tried to allocate 8.00 GiB. GPU 0 has a total capacty of 23.69 GiB of which 7.11 GiB is free. Process "
    "2006998 has 256.00 MiB memory in use. Including non-PyTorch memory, this process has 16.31 GiB memory in use."
)
IN_A_CONTAINER = (
    "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.19 GiB of which 78.67 GiB is free. Process "
    "23769 has 530.00 MiB memory in use. Of the allocated memory 4.00 MiB is allocated by PyTorch, and 16.00 MiB is reserved by "
    "PyTorch but unallocated."
)


def test_memory_that_another_process_holds_is_named() -> None:
    assert hints(SHARED).startswith("Other programs use this GPU (process 2006998 has 256.00 MiB): end them")
    assert hints(IN_A_CONTAINER) == ""  # it may be this process: its number differs in there
    assert hints("CUDA out of memory.") == ""


@pytest.mark.parametrize(("unused", "is_said"), [("194.87 MiB", True), ("4.11 GiB", True), ("21.00 MiB", False)])
def test_memory_in_pieces_is_named_where_it_would_have_been_enough(unused: str, is_said: bool) -> None:
    assert ("PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True" in hints(ALONE.format(unused=unused))) is is_said


def test_the_hint_stands_in_the_first_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError(SHARED)

    run = training.build(ONE_PROCESS, SETTING)
    monkeypatch.setattr(run.engine, "backward", full)

    with pytest.raises(DtrainError) as raised:
        run.go()

    assert "process 2006998" in str(raised.value).splitlines()[0]
