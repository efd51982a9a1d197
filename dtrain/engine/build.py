"""Chooses and builds the engine. This is the only place that does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from dtrain.config.schema import Config
from dtrain.distributed.rank_context import RankContext
from dtrain.engine import optim
from dtrain.engine.parameter_groups import parameter_groups
from dtrain.engine.protocol import Engine, EngineTraits
from dtrain.errors import ConfigError


def engine_name(config: Config, context: RankContext) -> tuple[str, str]:
    """Returns the engine that `engine.name` means here, and the reason in a few words.

    Raises:
        ConfigError: a combination that only the world size shows to be wrong.
    """
    if config.engine.name == "single" and context.world_size > 1:
        raise ConfigError(
            f"engine.name=single runs one process, but {context.topology.launcher} started {context.world_size}: each would train alone. "
            "Use engine.name=ddp or auto, or start one process."
        )
    return _resolve_name(config, context)


def _resolve_name(config: Config, context: RankContext) -> tuple[str, str]:
    """Returns name and reason without a check, for commands that need no engine but the placement of the model."""
    chosen = config.engine.name
    if config.engine.is_deepspeed:
        return (
            "deepspeed",
            "as configured" if config.engine.name == "deepspeed" else "engine.zero_stage or engine.deepspeed is set",
        )
    if chosen != "auto":
        return chosen, "as configured"
    return ("single", "one process") if context.world_size == 1 else ("ddp", f"{context.world_size} processes")


def engine_class(config: Config, context: RankContext) -> type[Engine]:
    """Returns the class of the engine that runs. Each back end is imported only where it is chosen."""
    name, _ = _resolve_name(config, context)
    match name:
        case "single" | "ddp" if config.engine.bitwise:
            from dtrain.engine.bitwise import BitwiseEngine

            return BitwiseEngine
        case "single":
            from dtrain.engine.single import SingleEngine

            return SingleEngine
        case "ddp" if config.train.local_steps > 1 and context.world_size > 1:
            from dtrain.engine.local_sgd import LocalSgdEngine

            return LocalSgdEngine
        case "ddp":
            from dtrain.engine.ddp import DdpEngine

            return DdpEngine
        case "deepspeed":
            from dtrain.engine.deepspeed import DeepSpeedEngine

            return DeepSpeedEngine
        case "fsdp":
            from dtrain.engine.fsdp import FsdpEngine

            return FsdpEngine
    raise AssertionError(name)


def engine_traits(config: Config, context: RankContext, *, total_steps: int | None = None) -> EngineTraits:
    """Returns the properties of the engine of this config, before it is built.

    Args:
        total_steps: number of steps of the run; None if no step is taken.
    """
    return engine_class(config, context).traits(config, context, total_steps=total_steps)


def place(module: nn.Module, config: Config, context: RankContext) -> nn.Module:
    """Collective. Returns the module where its engine wants it: on this rank's device, or sharded."""
    return engine_class(config, context).place(module, config, context)


def build_engine(
    module: nn.Module, config: Config, context: RankContext, *, thawed: Sequence[Sequence[str]] = ()
) -> Engine:
    """Collective. Wraps `module` in its engine and creates the optimizer.

    Args:
        module: the model in its place, already frozen: DDP and ZeRO now fix their buckets.
        thawed: names of the parameters that each thaw so far has unfrozen.
    """
    engine_name(config, context)  # refuses what only the world size shows to be wrong
    make: Any = engine_class(config, context)
    groups = parameter_groups(module, config.optim, stages=thawed)
    for group in groups:
        group["params"] = [make.updated_part(parameter) for parameter in group["params"]]
    optimizer = optim.build_optimizer(groups, config.optim, only_torchs=make.needs_torchs_optimizer)
    engine: Engine = make(module, optimizer, config, context)
    return engine
