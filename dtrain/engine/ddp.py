"""Replicas on every rank, gradients averaged by torch's DistributedDataParallel."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from dtrain.config.schema import Config
from dtrain.distributed.rank_context import RankContext
from dtrain.engine.comm_hooks import Bf16Exchange, Exchange
from dtrain.engine.powersgd import PowerSgdExchange
from dtrain.engine.protocol import ReadSlots, StepResult
from dtrain.engine.single import SingleEngine
from dtrain.engine.state import optimizers_own
from dtrain.errors import ConfigError


class DdpEngine(SingleEngine):
    """The single engine, with gradients that cross ranks in the last micro-batch of a step."""

    name = "ddp"

    def __init__(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, config: Config, context: RankContext
    ) -> None:
        super().__init__(module, optimizer, config, context)
        device = next(module.parameters()).device
        if config.model.compile:
            # Splitting the graph at DDP's buckets fails with dynamic shapes in torch 2.13 ("'float' object has no
            # attribute 'meta'"); in one graph the exchange of gradients overlaps less with backward.
            torch._dynamo.config.optimize_ddp = False
        self._exchange = exchange_of(config, context, module)
        # Buffers stay as they are: running statistics are frozen or labelled inexact (README); a broadcast per
        # forward would cost a round trip and change nothing.
        self._replica = DistributedDataParallel(
            module,
            device_ids=[device] if device.type == "cuda" else None,
            **_without_buffer_broadcast(),
            gradient_as_bucket_view=True,
            find_unused_parameters=config.engine.find_unused,
            bucket_cap_mb=self._exchange.bucket_mb,
        )
        self._replica.register_comm_hook(self._exchange, lambda exchange, bucket: exchange.average(bucket))
        learning = sum(parameter.requires_grad for parameter in module.parameters())
        self._marks_unused = 4 * learning if config.engine.find_unused else 0
        self.model = self._replica

    def micro_batch(self, *, last: bool) -> AbstractContextManager[None]:
        return self._micro_batch(last=last)

    @contextmanager
    def _micro_batch(self, *, last: bool) -> Iterator[None]:
        try:
            if last:
                with self.autocast():
                    yield
                if self._marks_unused:  # which rank used what: a collective that DDP makes by itself
                    self.context.traffic.add(self._marks_unused)
            else:
                with self._replica.no_sync(), self.autocast():
                    yield
        except RuntimeError as error:
            if "Expected to have finished reduction" in str(error):
                raise ConfigError(
                    "Some trainable parameters got no gradient in this step though they got one in the first: the model uses "
                    "different parts for different batches. Set engine.find_unused=true, or freeze those parts (freeze.modules)."
                ) from error
            raise

    def warm_up(self, loss: Callable[[], torch.Tensor], *, step: int) -> None:
        # DDP orders its buckets anew after the first backward pass. From three ranks on the order in which a number's
        # parts are added depends on its place in a bucket, so that a run that went on would differ in the last digit.
        # What an exchange remembers of a bucket must not meet another one.
        if self.context.world_size < 3 and not self._exchange.warms_up:
            return
        with self.micro_batch(last=True):
            self.backward(loss() * 0.0)
        self._optimizer.zero_grad(set_to_none=True)
        self._exchange.begin(step)

    def step(self, *, discard: bool = False) -> StepResult:
        result = super().step(discard=discard)
        if not result.applied:
            self._exchange.forget()
        return result

    def _memory(self) -> dict[str, dict[str, torch.Tensor]]:
        return self._exchange.memory()

    def _read_slots(self, name: str, shape: torch.Size, read: ReadSlots) -> dict[str, torch.Tensor]:
        slots = read(name, shape)
        self._exchange.load_memory(name, slots)
        return optimizers_own(slots)

    def release(self) -> nn.Module:
        module = super().release()
        self.model = module
        del self._replica
        return module


def exchange_of(config: Config, context: RankContext, module: nn.Module) -> Exchange:
    """The one that the settings ask for. One process exchanges nothing, whatever they say."""
    if context.world_size > 1 and config.engine.powersgd is not None:
        return PowerSgdExchange(config, context, module)
    if context.world_size > 1 and config.engine.gradient_wire == "bf16":
        return Bf16Exchange(config, context)
    return Exchange(config, context)


def _without_buffer_broadcast() -> dict[str, Any]:
    """The setting under the name that this torch knows: renamed in torch 2.13, where the old name warns."""
    known = inspect.signature(DistributedDataParallel.__init__).parameters
    return {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
