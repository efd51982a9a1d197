"""The load-balancing loss of a mixture of experts, which is added where the model's config asks for it.

The model computes it over the tokens of a micro-batch. Micro-batches are a fixed list (law 3), so as a sum over them, each
weighted by its targets, it is one value on any number of ranks (law 4). Evaluation reports the loss without it.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn

from dtrain.errors import ConfigError
from dtrain.models.architecture import asks_for_router_loss
from dtrain.tasks.protocol import Batch, Task

COEFFICIENTS = ("router_aux_loss_coef", "aux_loss_coef")
"""Names of the loss's weight on the models of transformers that add it."""


def with_router_loss(task: Task, module: nn.Module) -> Task:
    """Returns the task, with the router's loss added to its training loss if the model's config asks for that.

    Raises:
        ConfigError: the config asks for the loss, but transformers does not compute it for this model.
    """
    config = getattr(module, "config", None)
    if config is None or not asks_for_router_loss(config):
        return task
    for part in module.modules():
        for name in COEFFICIENTS:
            coefficient = getattr(part, name, None)
            if isinstance(coefficient, (int, float)) and not config.is_encoder_decoder:
                return cast(Task, _WithRouterLoss(task, part, float(coefficient))) if coefficient else task
    raise _refusal(type(module).__name__)


class _WithRouterLoss:
    """A task whose training loss has the router's loss added. Everything else is the task's."""

    def __init__(self, task: Task, model: nn.Module, coefficient: float) -> None:
        """
        Args:
            model: the part of the module whose output has the loss.
        """
        self._task, self._coefficient, self._model_name = task, coefficient, type(model).__name__
        self._router_loss: torch.Tensor | None = None
        model.register_forward_hook(self._keep)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:
            setattr(self._task, name, value)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        loss = self._task.loss(model, batch)
        router_loss, self._router_loss = self._router_loss, None
        if router_loss is None:
            raise _refusal(self._model_name)
        return loss + self._coefficient * self._task.targets(batch).weight * router_loss.to(loss)

    def _keep(self, model: nn.Module, _inputs: Any, output: Any) -> None:
        found = getattr(output, "aux_loss", None) if model.training else None
        self._router_loss = found if torch.is_tensor(found) else None


def _refusal(model: str) -> ConfigError:
    return ConfigError(
        f"The model's config asks for the loss of its router (output_router_logits: true), but transformers does not compute it for "
        f"{model}. To train without it: model.config.output_router_logits=false"
    )
