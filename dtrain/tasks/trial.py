"""Runs one example through the model before anything is trained or evaluated.

This finds a model that cannot compute the data, and says what its config lacks. It also finds the padding with which a
row has one answer, whichever rows share its batch. Models treat padding differently, and some read it silently, so a
trial is the only reliable check.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import nn
from transformers import PreTrainedModel

from dtrain.console import log
from dtrain.data.seeding import DataPosition
from dtrain.distributed.collectives import node_first
from dtrain.distributed.rank_context import RankContext
from dtrain.distributed.serialization import Json
from dtrain.errors import ConfigError
from dtrain.models.custom_head import HeadedModel
from dtrain.models.first_forward import FORWARD_ERRORS, explain_forward, reads_padding_by_config
from dtrain.models.modes import restored_modes
from dtrain.models.placement import PASSED_BY_ATTRIBUTE, compute_device
from dtrain.tasks.prepare import select_columns
from dtrain.tasks.protocol import Batch, Padding, PadsRows, Task

ROWS = 256
"""The trial takes the shortest of this many rows of each split."""

TOKENS = 16
"""A causal model sees at most this many tokens: what it does with a longer row is the same."""

OUTPUTS = ("logits", "start_logits", "end_logits")

Outputs = Mapping[str, torch.Tensor]


def try_model(module: nn.Module, task: Task, context: RankContext) -> None:
    """Collective. Runs the model on an example, and sets `task.padding` for a task that pads rows.

    Call it before an engine wraps the model. Leaves the model as it is, but marks the layers that it does not call.

    Raises:
        ConfigError: the model cannot compute the example, or a causal model sees the tokens that it has to predict.
    """
    if task.tokenizer is None:
        return
    found, passed_by = node_first(lambda: _try_layers(module, task), context)
    for name in passed_by:
        module.get_submodule(name).__dict__[PASSED_BY_ATTRIBUTE] = True
    if found is not None and _pads(task):
        task.padding = Padding(**found)
        # Is saved with the model, so that transformers pads as dtrain does. Only the arguments of a tokenizer are saved.
        task.tokenizer.padding_side = task.tokenizer.init_kwargs["padding_side"] = task.padding.side
        settings = {"data.max_length": task.padding.length, "task.max_target_length": task.padding.target_length}
        for setting, length in settings.items():
            if length is not None:
                log.info("model: its answer depends on padding, so every row is padded to %s=%d", setting, length)


def reads_padding(task: Task) -> bool:
    """Returns whether the model's answer for a row depends on the row's padding, as `try_model` found."""
    padding = getattr(task, "padding", None)
    return padding is not None and padding.length is not None


def _pads(task: Task) -> TypeGuard[PadsRows]:
    return task.needs_padding and isinstance(task, PadsRows)


def _try_layers(module: nn.Module, task: Task) -> Json:
    """Returns what `_try` found, and the names of the entries of lists of layers that the model did not call."""
    entries = {
        f"{name}.{key}" if name else key: entry
        for name, listed in module.named_modules()
        if isinstance(listed, nn.ModuleList | nn.ModuleDict)
        for key, entry in listed.named_children()
    }
    called: set[str] = set()
    handles = [
        part.register_forward_pre_hook(lambda *_, name=name: called.add(name))
        for name, part in {"": module, **entries}.items()
    ]
    try:
        found = _try(module, task)
    finally:
        for handle in handles:
            handle.remove()
    return [found, sorted(entries.keys() - called) if called else []]


def _try(module: nn.Module, task: Task) -> Json:
    """Returns the fields of the padding that fits; None if the task does not pad."""
    place = _shortest_row(task)
    # Such kernels run in half precision on a GPU only, under the engine's autocast.
    if place is None or "flash" in str(getattr(getattr(module, "config", None), "_attn_implementation", "")):
        return None
    with _evaluating(module):
        if _pads(task):
            padding = _find_padding(module, task, *place)
            if hasattr(task, "max_target_length"):
                padding = _find_target_length(module, task, *place, padding=padding)
            return vars(padding)
        batch = _collate(task, *place)
        if task.head.is_causal:
            batch = _shorten(batch, TOKENS)
        outputs = _run(module, task, batch)
        if task.head.is_causal:
            _check_causal(module, task, batch, outputs)
    return None


def _find_padding(module: nn.Module, task: Any, split: str, row: int) -> Padding:
    """Returns the first padding that does not change the answer for a row: right, left, or one length for all rows."""
    always, before = Padding(length=task.max_length), task.padding

    def fits(padding: Padding) -> bool:
        task.padding = padding
        alone = _run(module, task, _collate(task, split, row))
        for number in longer:
            task.padding = replace(padding, length=number)
            try:
                padded = _run(module, task, _collate(task, split, row, copies=2))
            except ConfigError:
                return False
            if not _are_equal(alone, padded, side=padding.side):
                return False
        return True

    try:
        if reads_padding_by_config(module, max_length=task.max_length):
            task.padding = always
            _run(module, task, _collate(task, split, row))
            return always
        task.padding = Padding()
        batch = _collate(task, split, row)
        length = batch["input_ids"].shape[-1]
        try:
            _run(module, task, batch)
            _run(module, task, _collate(task, split, row, copies=2))  # some models compute no batch without a pad token
        except ConfigError as error:
            task.padding = always  # some models cannot compute short rows
            try:
                _run(module, task, _collate(task, split, row))
            except ConfigError:
                raise error from None
            return always
        longer = sorted({min(length + more, task.max_length) for more in (1, 6)} - {length})
        return next((padding for padding in (Padding("right"), Padding("left")) if fits(padding)), always)
    finally:
        task.padding = before


def _find_target_length(module: nn.Module, task: Any, split: str, row: int, *, padding: Padding) -> Padding:
    """Returns the padding, with one length for all targets if the answer depends on their padding (ProphetNet)."""
    before = task.padding
    try:
        task.padding = padding
        batch = _collate(task, split, row)
        length = batch["labels"].shape[1]
        alone = _run(module, task, batch)
        for number in sorted({min(length + more, task.max_target_length) for more in (1, 6)} - {length}):
            task.padding = replace(padding, target_length=number)
            if not _are_equal(alone, _run(module, task, _collate(task, split, row)), side="right"):
                return replace(padding, target_length=task.max_target_length)
        return padding
    finally:
        task.padding = before


def _shortest_row(task: Task) -> tuple[str, int] | None:
    """Returns the split and the index of a short row; None without rows of tokens."""
    lengths = []
    for split, rows in task.splits.items():
        columns = select_columns(rows, "input_ids")[list(range(min(ROWS, len(rows))))]
        lengths += [(_length(ids), split, row) for row, ids in enumerate(columns["input_ids"])]
    return min(lengths)[1:] if lengths else None


def _length(ids: Any) -> int:
    """Returns the tokens of a row, or of the longest choice or window of a row."""
    nested = len(ids) > 0 and isinstance(ids[0], Sequence)
    return max(map(len, ids)) if nested else len(ids)


def _collate(task: Task, split: str, row: int, *, copies: int = 1) -> Batch:
    return task.collate(task.splits[split][[row] * copies], DataPosition(0, (row,) * copies))


def _shorten(batch: Batch, most: int) -> Batch:
    length = batch["input_ids"].shape[1]
    return {
        key: value[:, :most] if value.dim() == 2 and value.shape[1] == length else value for key, value in batch.items()
    }


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Turns dropout and gradients off. Restores the mode of every module and the state of torch's random draws."""
    with restored_modes(module), torch.no_grad(), torch.random.fork_rng(devices=[]):
        module.eval()
        yield


def _run(module: nn.Module, task: Task, batch: Batch) -> Outputs:
    """Returns the outputs of the model for a batch.

    Raises:
        ConfigError: the model, which is one of transformers, cannot compute them.
    """
    found: list[Any] = []
    device = compute_device(module)
    handle = module.register_forward_hook(lambda _module, _inputs, output: found.append(output))
    try:
        with torch.autocast(device.type, enabled=False):
            task.loss(module, {name: tensor.to(device) for name, tensor in batch.items()})
    except FORWARD_ERRORS as error:
        if not isinstance(module, PreTrainedModel | HeadedModel):
            raise  # the user's own code, whose traceback says more
        raise explain_forward(error, module, task.tokenizer, batch["input_ids"]) from error
    finally:
        handle.remove()
    outputs = {name: getattr(found[0], name, None) for name in OUTPUTS} if found else {}
    return {name: value.float() for name, value in outputs.items() if isinstance(value, torch.Tensor)}


def _are_equal(alone: Outputs, padded: Outputs, *, side: str) -> bool:
    """Returns whether outputs are equal but for rounding. Those of padding and of a row's copy are not compared."""
    for name, expected in alone.items():
        found = padded[name]
        for dimension, (short, long) in enumerate(zip(expected.shape, found.shape, strict=True)):
            if short != long:
                found = found.narrow(dimension, 0 if side == "right" else long - short, short)
        difference = (expected - found).nan_to_num().abs().max()
        if not difference <= 1e-6 + 2e-5 * expected.nan_to_num().abs().max():
            return False
    return True


def _check_causal(module: nn.Module, task: Task, batch: Batch, outputs: Outputs) -> None:
    """Raises ConfigError if another last token, or none, changes the logits of the tokens before it."""
    logits, ids = outputs.get("logits"), batch["input_ids"]
    if logits is None or logits.dim() != 3 or ids.shape[1] < 2:
        return
    other = ids.clone()
    other[:, -1] = torch.where(ids[:, -1] == ids[:, 0], (ids[:, 0] + 1) % logits.shape[-1], ids[:, 0])
    changed = _run(module, task, {**batch, "input_ids": other})["logits"]
    kept = slice(0, ids.shape[1] - 1)
    kind = getattr(getattr(module, "config", None), "model_type", type(module).__name__)
    if not _are_equal({"logits": logits[:, kept]}, {"logits": changed[:, kept]}, side="right"):
        raise ConfigError(
            f"The task predicts the next token, but this {kind} model sees the tokens that it has to predict. Set "
            "model.config.is_decoder=true if the model has this setting, or use a decoder such as gpt2."
        )
    shorter = _run(module, task, _shorten(batch, ids.shape[1] - 1))["logits"]
    if not _are_equal({"logits": shorter}, {"logits": logits}, side="right"):
        raise ConfigError(
            f"What this {kind} model predicts for a token depends on the number of tokens after it, so that losses would depend on "
            "data.max_length: use another model, such as gpt2."
        )
