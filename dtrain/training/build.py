"""Builds the model that an engine wraps, from config and task: loads, checks and freezes it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from dtrain.checkpoint import format, select
from dtrain.checkpoint.restore import restore_weights
from dtrain.config.schema import Config, Model
from dtrain.console import log
from dtrain.data.lengths import RowLengths
from dtrain.data.order import StepPlan
from dtrain.distributed.collectives import node_first
from dtrain.distributed.cuda_devices import device_of
from dtrain.distributed.rank_context import RankContext
from dtrain.engine.build import engine_traits, place
from dtrain.engine.unused_parameters import parameters_without_gradient
from dtrain.errors import CheckpointError, ConfigError
from dtrain.models import freezing
from dtrain.models.chat_template import name_turn_end
from dtrain.models.compatibility import check_fit, check_images
from dtrain.models.fast_dropout import set_fast_dropout
from dtrain.models.fast_linear import set_fast_linear, uses_fast_linear
from dtrain.models.load import load_model
from dtrain.models.placement import needs_every_rank
from dtrain.models.unpadding import Unpadding, prepare_unpadding, remove_unpadding
from dtrain.tasks.protocol import Task
from dtrain.tasks.row_lengths import row_lengths, unknown_lengths
from dtrain.tasks.target_loss import try_last_layer
from dtrain.tasks.trial import reads_padding, try_model
from dtrain.training.frozen_cache import FrozenCache

T = TypeVar("T")


@dataclass(frozen=True)
class PreparedModel:
    """A model before an engine wraps it.

    Attributes:
        module: the bare model.
        freeze: freezes the bare module as an epoch needs it; returns the names of parameters that get no gradient in it,
            which are frozen as well.
        train_mode: see models.freezing.
        unpadding: whether the module computes its batches without padding, and why.
        frozen_cache: reads the frozen part's results instead of computing them, once it is opened.
    """

    module: nn.Module
    freeze: Callable[[nn.Module, int], list[str]]
    train_mode: Callable[[nn.Module], None]
    unpadding: Unpadding
    frozen_cache: FrozenCache


def step_plan(config: Config, task: Task) -> StepPlan:
    """Returns which examples each step takes. Call it after `load`, which decides the task's padding.

    Raises:
        ConfigError: train.micro_batch_tokens or evaluation.micro_batch_tokens cannot be kept.
    """
    train, tokens = config.train, config.evaluation.micro_batch_tokens
    if tokens is not None and any(row_lengths(task, split) is None for split in task.splits if split != "train"):
        raise unknown_lengths(tokens, "evaluation")
    lengths = row_lengths(task, "train") if train.sorts or train.micro_batch_tokens is not None else None
    if train.micro_batch_tokens is not None:
        check_token_budget(train.micro_batch_tokens, lengths)
    return StepPlan(
        len(task.splits["train"]),
        train.global_batch_size,
        train.micro_batch_size,
        seed=config.run.seed,
        shuffle=train.shuffle,
        lengths=lengths,
        sort_by_length=train.sorts,
        micro_batch_tokens=train.micro_batch_tokens,
    )


def check_token_budget(limit: int, lengths: RowLengths | None) -> None:
    """Raises ConfigError if rows have no known number of tokens, or one has more than a micro-batch may compute."""
    if lengths is None:
        raise unknown_lengths(limit, "train")
    costs = lengths.sequences * lengths.width
    longest = int(costs.argmax())
    if (cost := int(costs[longest])) > limit:
        raise ConfigError(
            f"train.micro_batch_tokens={limit} is less than one row takes: row {longest} of the split train (counted from 0) "
            f"has {cost} tokens after truncation, with all its sequences. Set train.micro_batch_tokens={cost} or more, or "
            "shorten rows with data.max_length."
        )


def total_steps(config: Config, plan: StepPlan) -> int:
    """Returns the number of steps of the run: the smaller of train.epochs and train.max_steps."""
    limits = [config.train.max_steps]
    if config.train.epochs is not None:
        limits.append(config.train.epochs * plan.steps_per_epoch)
    return min(limit for limit in limits if limit is not None)


def load(config: Config, task: Task, context: RankContext, *, is_trained: bool = False) -> nn.Module:
    """Collective. Returns the model on this rank's device, in fp32. One rank per node loads first, so a hub is asked once.

    Args:
        is_trained: as in load_model.

    Raises:
        ConfigError: nothing will train the model, and it lacks weights.
        CheckpointError: model.name_or_path is a damaged checkpoint.
    """

    def load_with(settings: Model) -> nn.Module:
        model = load_model(
            settings,
            head=task.head,
            head_config=task.head_config,
            tokenizer=task.tokenizer,
            seed=config.run.seed,
            is_trained=is_trained,
            is_copied=engine_traits(config, context).is_sharded,
        )
        if task.tokenizer is not None and config.model.factory is None:
            check_fit(model, task.tokenizer, max_length=task.max_length, needs_padding=task.needs_padding)
        name_turn_end(model, getattr(task, "stop_ids", frozenset()))
        processor = getattr(task, "processor", None)
        if processor is not None:
            check_images(model, processor.shape)
        module: nn.Module = model
        return module

    # Verifying a checkpoint reads every byte of it, so one rank per node does it.
    is_sharded: bool = node_first(lambda: verify_start(config.model.name_or_path), context)
    if is_sharded:
        module = _from_shards(config, load_with, context)
    else:
        module = in_turn(lambda: load_with(config.model), context)
    return place_and_try(module, config, task, context)


def place_and_try(module: nn.Module, config: Config, task: Task, context: RankContext) -> nn.Module:
    """Collective. Puts the model where its engine wants it, and runs it on an example, which decides the task's padding.

    Raises:
        ConfigError: the model cannot compute the example, or an earlier `dtrain.fit` has sharded it.
    """
    if needs_every_rank(module):
        raise ConfigError(
            "The model of dtrain.fit(model=...) holds only this rank's part of its weights: an earlier dtrain.fit with "
            "engine.name=fsdp has sharded it. Load that run's folder model/ instead, or make a new model."
        )
    # One rank per node runs the example, so the model is sharded only after it.
    if not engine_traits(config, context).is_sharded:
        module = place(module, config, context)
    is_served = device_of(context.topology).type == "cpu" and not config.model.compile
    set_fast_linear(module, config.model.fast_linear if is_served else "off")
    try_model(module, task, context)
    try_last_layer(module, context)
    return place(module, config, context)


def _from_shards(config: Config, make: Callable[[Model], nn.Module], context: RankContext) -> nn.Module:
    """Collective. Returns the model of a sharded checkpoint: makes it with new weights, then restores the shards."""
    module = in_turn(lambda: make(config.model.model_copy(update={"from_scratch": True})), context)
    restore_weights(
        module, select.at(Path(str(config.model.name_or_path)), context, setting="model.name_or_path"), context
    )
    return module


def in_turn(make: Callable[[], T], context: RankContext) -> T:
    """Collective. Calls `make` on each rank, first on one rank per node, so that a hub is asked once.

    Raises:
        DtrainError: what `make` raised on a first rank, on all ranks.
    """
    made: list[T] = []
    node_first(lambda: made.append(make()), context)
    return made[0] if made else make()


def refuse_custom_models(config: Config, command: str, kind: str = "language model") -> None:
    """Refuses models that are not plain transformers models, for commands that need one.

    Raises:
        ConfigError: the model is the user's own module, or has a head of dtrain's.
    """
    if config.model.factory is not None or config.model.head is not None:
        raise ConfigError(f"{command} needs a {kind} of transformers, not model.factory or model.head.")


def verify_start(name: str | None) -> bool:
    """Verifies a checkpoint of dtrain's that the model starts from; returns whether it is sharded. Skips other names.

    Raises:
        CheckpointError: it is damaged, or has adapters, so that from_pretrained cannot load it.
    """
    folder = Path(name) if name is not None else None
    if folder is None or not (folder / format.MANIFEST).is_file():
        return False
    try:
        saved = format.verify(folder)
    except format.OtherFormatError as error:
        raise CheckpointError(f"model.name_or_path={folder} cannot be read: {error}, or the run's model/.") from None
    except format.DamagedCheckpointError as error:
        raise CheckpointError(
            f"model.name_or_path={folder} is a damaged checkpoint: {error}. Use another one of the run, or its model/."
        ) from None
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"model.name_or_path={folder} is a checkpoint of adapters (model.lora), which only checkpoint.resume can "
            "load. Use the run's model/ folder instead."
        )
    return "of" in saved.manifest


def prepare_training(module: nn.Module, config: Config, task: Task, plan: StepPlan, *, epoch: int = 0) -> PreparedModel:
    """Freezes the parameters that must not learn in an epoch, and finds those that cannot. Settles model.unpad.

    Raises:
        ConfigError: a path that matches nothing, nothing is left to learn, or model.unpad=on for a model that cannot.
    """
    set_fast_dropout(module, on=config.model.fast_dropout and not config.model.compile)
    unpadding = prepare_unpadding(module, config.model, reads_padding=reads_padding(task))
    train_mode = partial(freezing.train_mode, batch_norm=config.model.batch_norm)

    def freeze(module: nn.Module, epoch: int) -> list[str]:
        freezing.freeze(module, config.freeze, epoch=epoch)
        # If the user says that batches differ, a later one may use parameters that micro-batch 0 does not use.
        unused = (
            [] if config.engine.find_unused else parameters_without_gradient(module, task, plan, train_mode=train_mode)
        )
        frozen = freezing.freeze(module, config.freeze, epoch=epoch, keep_frozen=unused)
        if not any(parameter.requires_grad for parameter in module.parameters()):
            raise ConfigError(
                f"Nothing is left to learn: what freeze.modules={list(config.freeze.modules)} leaves gets no gradient "
                f"({freezing.summary(frozen)}). Freeze less, or use freeze.method=requires_grad, which lets gradients through."
            )
        if unused:
            log.info("no gradient reaches %s: frozen", freezing.summary(unused))
        return unused

    freeze(module, epoch)
    # The loop does this after an evaluation only: a new model begins in train mode, with dropout in what is frozen.
    train_mode(module)
    frozen_cache = FrozenCache(config, task, plan, total_steps=total_steps(config, plan), train_mode=train_mode)
    frozen_cache.find(module, epoch)
    if config.model.compile:
        # In place, so that names in the state dict do not change.
        module.compile(dynamic=True)
    return PreparedModel(module, freeze, train_mode, unpadding, frozen_cache)


def restore_layers(module: nn.Module) -> None:
    """Gives a user's own module back as it came: with torch's layers, and padding."""
    set_fast_linear(module, "off")
    set_fast_dropout(module, on=False)
    remove_unpadding(module)


def count(parameters: list[nn.Parameter]) -> int:
    """Returns the number of values in parameters that no engine has wrapped yet."""
    return sum(parameter.numel() for parameter in parameters)


def gigabytes(number: float) -> str:
    """Formats a number of bytes."""
    return f"{number / 2**30:.2f} GiB" if number >= 2**30 else f"{number / 2**20:.1f} MiB"


def describe_device(module: nn.Module) -> str:
    """Returns a description of the devices that the ranks run on."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    how = ", linear layers by oneDNN" if uses_fast_linear(module) else ""
    return f"CPU, {torch.get_num_threads()} thread(s) per rank{how}"
