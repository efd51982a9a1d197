"""Why the settings and the model rule out that the frozen part is computed once (freeze.cache), and what to change."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from dtrain.config.schema import Config
from dtrain.engine.unused_parameters import layer_drop_settings
from dtrain.models import freezing
from dtrain.models.architecture import asks_for_router_loss
from dtrain.models.first_forward import rotates_by_length
from dtrain.models.placement import needs_every_rank
from dtrain.tasks.protocol import Task
from dtrain.training.frozen_rows import why_not_fixed


class Refusal(NamedTuple):
    """A reason, and its cure.

    Attributes:
        reason: what prevents it.
        cure: what to change so that the part can be read; empty if no setting helps.
    """

    reason: str
    cure: str = ""


FREEZE = "Freeze the embeddings and the first layers, or all but the head (freeze.modules=[base_model])"

SHARDED = Refusal(
    "the engine shards the model, so that every rank takes part in each forward pass",
    "Use engine.name=ddp without engine.zero_stage",
)


def find_refusal(module: nn.Module, config: Config, task: Task, *, used_once: bool) -> Refusal | None:
    """Returns why nothing can be read, as far as settings, model and task tell without a trial.

    Args:
        used_once: whether each row is used only once while this part is frozen.
    """
    of_model = getattr(module, "config", None)
    if not freezing.frozen_parameters(module):
        return Refusal("nothing is frozen", FREEZE)
    if needs_every_rank(module):  # a trial would run parts of the model, whose weights are not gathered
        return SHARDED
    if used_once and config.freeze.cache == "auto":
        return Refusal("each row is used only once while this part is frozen")
    if config.engine.bitwise:
        reason = "engine.bitwise does not read what another run may have computed in other groups of rows"
        return Refusal(reason, "Set engine.bitwise=false")
    if config.model.compile:
        return Refusal("model.compile fixes what is computed", "Set model.compile=false")
    if config.model.gradient_checkpointing:
        reason = "model.gradient_checkpointing computes layers again in the backward pass"
        return Refusal(reason, "Set model.gradient_checkpointing=false")
    if of_model is not None and hasattr(of_model, "get_text_config") and asks_for_router_loss(of_model):
        return Refusal("the loss of the router needs all layers")
    if rotates_by_length(of_model):
        return Refusal("its rotary positions depend on the length of the batch")
    if names := layer_drop_settings(module):
        off = " ".join(f"model.config.{name}=0" for name in names)
        return Refusal(f"layers are skipped at random ({', '.join(names)} in the model's config)", f"Set {off}")
    if task.tokenizer is None:
        return Refusal("the model's inputs are not tokens")
    not_fixed = why_not_fixed(task)
    return None if not_fixed is None else Refusal(not_fixed)
