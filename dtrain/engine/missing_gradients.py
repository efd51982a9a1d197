"""Parameters that a step left without a gradient: dropped layers, experts without a token, heads that only some rows use.

On one process their gradient is None, and the optimizer skips them: no decay of weights or moments. A rank that must send
something for them sends zeros, which is another thing to AdamW.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from dtrain.distributed.collectives import all_reduce_sum
from dtrain.distributed.rank_context import RankContext
from dtrain.engine.unused_parameters import layer_drop_settings
from dtrain.errors import ConfigError


class GradientRecord:
    """Records which trainable parameters have received a gradient on this rank since the last `clear`.

    Args:
        module: the model.
        receiver: returns the tensor that a parameter's gradients are added to, or None while there is none; by default the
            parameter itself.
    """

    def __init__(
        self, module: nn.Module, receiver: Callable[[nn.Parameter], nn.Parameter | None] = lambda parameter: parameter
    ) -> None:
        trainable = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
        self.names = [name for name, _ in trainable]
        self.parameters = [parameter for _, parameter in trainable]
        self._receiver, self._unwatched = receiver, dict(enumerate(self.parameters))
        self._received: set[int] = set()
        self._handles: list[Any] = []
        self.watch()

    def watch(self) -> None:
        """Watches the parameters whose receiver exists by now. Call it before a backward pass if receivers are made later."""
        for index, parameter in list(self._unwatched.items()):
            receiver: Any = self._receiver(parameter)
            if receiver is not None:
                add = receiver.register_post_accumulate_grad_hook
                self._handles.append(add(lambda _parameter, index=index: self._received.add(index)))
                del self._unwatched[index]

    @property
    def missing(self) -> list[int]:
        """Indices of parameters without a gradient."""
        return [index for index in range(len(self.parameters)) if index not in self._received]

    def clear(self) -> None:
        """Begins a new step."""
        self._received.clear()

    def remove(self) -> None:
        """Removes the hooks from the parameters."""
        for handle in self._handles:
            handle.remove()


def drop_unused_gradients(
    parameters: Sequence[nn.Parameter], missing: Sequence[int], context: RankContext, *, keep_nonzero: bool = False
) -> None:
    """Collective. Sets the gradients to None for which no rank had a gradient of its own.

    Args:
        missing: indices of the parameters for which this rank sent zeros.
        keep_nonzero: whether to keep those whose average is not zero all the same.
    """
    used = torch.ones(len(parameters), dtype=torch.int32)
    used[list(missing)] = 0
    for parameter, ranks in zip(parameters, all_reduce_sum(used, context).tolist(), strict=True):
        if not ranks and not (keep_nonzero and parameter.grad is not None and parameter.grad.any()):
            parameter.grad = None


def refuse_layer_drop(module: nn.Module, engine: str) -> None:
    """Refuses a model that skips layers, for an engine that needs every layer or gradient in every step.

    Args:
        engine: what is called so in the message.

    Raises:
        ConfigError: its config sets LayerDrop.
    """
    names = layer_drop_settings(module)
    if names:
        off = " ".join(f"model.config.{name}=0" for name in names)
        raise ConfigError(
            f"The model drops layers at random ({', '.join(names)} in its config), but {engine} needs "
            f"every layer in every step. Set {off}, or use engine.name=ddp without engine.zero_stage and engine.deepspeed."
        )


def refuse_before(engine: Any, record: GradientRecord, stage: int) -> None:
    """Makes a DeepSpeed engine refuse a backward pass that left parameters out, before it sums gradients over ranks.

    ZeRO sums in the order in which backward gives the gradients, so ranks would add up those of different parameters. A
    rank that lacks some raises ConfigError alone, and the job ends. Private API.
    """
    finish = engine._backward_epilogue

    def check_and_finish() -> None:
        missing = [record.names[index] for index in record.missing]
        record.clear()
        if missing:
            listed = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
            raise ConfigError(
                f"A micro-batch of this step did not use {listed}, but ZeRO {stage} needs a gradient for every parameter from every "
                "micro-batch: it would add up gradients of different parameters, and decay unused ones. Use engine.name=ddp "
                "without engine.zero_stage and engine.deepspeed, or freeze those parts (freeze.modules)."
            )
        finish()

    engine._backward_epilogue = check_and_finish
