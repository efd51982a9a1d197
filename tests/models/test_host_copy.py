"""Copies of a batch on the device, and what the host still knows of them. The meta device stands for a GPU."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch

from dtrain.models.host_copy import copy_to, host_copy, on_host, pick, remember, to_device

CPU, META = torch.device("cpu"), torch.device("meta")


def test_on_the_cpu_a_batch_stays_as_it_is() -> None:
    batch = {"input_ids": torch.arange(6).view(2, 3), "labels": torch.tensor([0, 1])}

    moved = to_device(batch, CPU)

    assert list(moved) == list(batch)
    assert all(moved[name] is batch[name] for name in batch)
    assert not any(vars(tensor) for tensor in moved.values())


def test_the_host_knows_what_it_has_copied_to_a_device() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])

    moved = to_device({"attention_mask": mask}, META)["attention_mask"]

    assert moved.device == META
    assert host_copy(moved) is not None
    assert torch.equal(on_host(moved), mask)


@pytest.mark.parametrize("grad", [True, False])
def test_a_view_of_the_whole_has_the_copy_in_its_own_shape(grad: bool) -> None:
    mask = torch.arange(24).view(2, 3, 4)
    moved = copy_to(mask, META)

    with torch.set_grad_enabled(grad):
        assert torch.equal(on_host(moved.view(-1, 4)), mask.view(-1, 4))


def test_what_may_differ_from_the_copy_has_none() -> None:
    mask = torch.arange(24).view(2, 3, 4)
    moved = copy_to(mask, META)

    others = [moved[:, :2], moved.transpose(0, 1), moved + 1, moved.clone(), torch.empty(2, 3, device=META)]
    assert [host_copy(other) for other in others] == [None] * len(others)
    with pytest.raises(NotImplementedError):  # a fetch, which the meta device refuses
        on_host(moved + 1)
    view = moved.view(6, 4)
    moved.fill_(1)
    assert host_copy(moved) is None
    assert host_copy(view) is None


def test_what_is_made_on_the_device_can_be_remembered() -> None:
    made = torch.empty(2, 1, 3, 3, device=META)
    numbers = torch.tensor([[1, 1, 2], [1, 2, 2]])

    remember(made, numbers)

    found = host_copy(made)
    assert found is not None
    assert torch.equal(found, numbers)


def test_elements_that_the_host_knows_are_picked_without_a_fetch() -> None:
    is_picked, values = torch.tensor([[True, False], [True, True]]), torch.arange(12).view(2, 2, 3)

    assert torch.equal(pick(values, is_picked), values[is_picked])
    assert pick(values.to(META), copy_to(is_picked, META)).shape == (3, 3)
    with pytest.raises(NotImplementedError):
        pick(values.to(META), is_picked.to(META))


@pytest.mark.parametrize(("kind", "pins"), [("cuda", True), ("meta", False), ("cpu", False)])
def test_only_for_a_gpu_a_batch_is_pinned_and_no_copy_is_waited_for(
    kind: str, pins: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, object]] = []

    def pin(tensor: torch.Tensor) -> torch.Tensor:
        calls.append(("pinned", tensor.shape))
        return tensor

    def move(tensor: torch.Tensor, device: torch.device, *, non_blocking: bool = False) -> torch.Tensor:
        calls.append((device.type, non_blocking))
        return tensor.clone()

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    monkeypatch.setattr(torch.Tensor, "to", move)

    to_device({"input_ids": torch.ones(2, 3)}, torch.device(kind))

    assert calls == [("pinned", (2, 3))] * pins + [(kind, True)]


@pytest.mark.gpu
def test_a_copy_to_a_gpu_comes_from_pinned_memory_and_waits_for_nothing() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    batch = {"input_ids": torch.arange(1 << 16).view(256, 256), "attention_mask": torch.ones(256, 256)}
    to_device(batch, device)  # the first allocations synchronize
    torch.cuda.set_sync_debug_mode("error")
    try:
        moved = to_device(batch, device)
    finally:
        torch.cuda.set_sync_debug_mode("default")

    assert all(torch.equal(moved[name].cpu(), batch[name]) for name in batch)
    assert all(torch.equal(on_host(moved[name]), batch[name]) for name in batch)


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_of_a_changed_tensor_is_not_known(copied: Callable[[torch.Tensor], torch.Tensor]) -> None:
    made, numbers = torch.ones(3, device="meta"), torch.ones(3)
    remember(made, numbers)
    made.zero_()

    assert host_copy(made) is None
    assert host_copy(copied(made)) is None
