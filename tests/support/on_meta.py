"""Training on torch's meta device, as one of several ranks: what a GPU would be asked to do, shown without a GPU.

Tensors there have shapes and no values. They hold more than fake tensors of the device "cuda" would: a build of torch without
CUDA refuses to run a backward pass on those, while here the real step runs, FSDP2's streams and DDP's buckets included.
`Watch` stands between torch and the device. It knows what would make the host wait for a GPU: it raises an error there, or
answers with ones where a step may fetch. torch's fake process group stands for the other ranks, which do and send nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from dtrain.config.schema import Spike
from dtrain.distributed.rank_context import RankContext
from dtrain.distributed.topology import SINGLE
from dtrain.engine import fsdp_sharding, optim, protocol, single
from dtrain.models import unpadding
from dtrain.training import build, late_totals, loop
from dtrain.training.monitors.evaluations import EarlyStopping, Evaluate
from dtrain.training.monitors.gradients import LogGradients
from dtrain.training.monitors.non_finite import NonFinite
from dtrain.training.monitors.protocol import Monitor, RunState
from dtrain.training.monitors.replicas import Replicas
from dtrain.training.monitors.spikes import Spikes
from tests.support.faults import Journal

META = torch.device("meta")
DTRAIN = f"{Path(loop.__file__).resolve().parents[1]}/"
COPY_TO_DEVICE = "copy_to"
"""The function of host_copy.py that every copy to the device must go through: on CUDA it is pinned, and waits for nothing."""

MAKERS = (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor)

aten: Any = torch.ops.aten


class WaitError(AssertionError):
    """The host would have waited for the GPU."""


class Wait(NamedTuple):
    """The host would wait for a GPU here.

    Attributes:
        step: the step that ran, from 1; 0 between two steps.
        what: what torch was asked to do.
        where: the innermost function of dtrain; DDP for its order of buckets.
    """

    step: int
    what: str
    where: str


class Watch(TorchDispatchMode):
    """Looks at every operation of this thread.

    Attributes:
        step: the step that runs, from 1; 0 between two steps.
        may_wait: whether the host may wait: the step is read at once, or none runs.
        waits: the waits that were answered.
        late: the steps that were not read at once.
    """

    def __init__(self, *, may_wait: bool = True) -> None:
        super().__init__()
        self.step, self.may_wait = 0, may_wait
        self.waits: list[Wait] = []
        self.late: list[int] = []
        self._makers = Makers(self)

    def __enter__(self) -> Watch:
        self._makers.__enter__()
        return super().__enter__()  # type: ignore[no-any-return]

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)
        self._makers.__exit__(*raised)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operation = function.overloadpacket
        tensors = [tensor for argument in (*args, *kwargs.values()) for tensor in _tensors(argument)]
        kinds = {tensor.device.type for tensor in tensors}
        if operation is aten._local_scalar_dense and kinds == {"meta"}:
            self.waits_for("a number is fetched")
            return torch.ones((), dtype=args[0].dtype).item()
        if operation is aten._to_copy:
            target = torch.device(kwargs.get("device") or tensors[0].device).type
            if kinds == {"meta"} and target == "cpu":
                self.waits_for("a tensor is copied to the host")
                return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
            if kinds == {"cpu"} and target == "meta":
                self.comes_from_the_host(non_blocking=kwargs.get("non_blocking", False))
        elif operation is aten.copy_ and len(kinds) == 2:
            if args[0].device.type == "cpu":
                self.waits_for("a tensor is copied to the host")
                return args[0]
            self.comes_from_the_host(non_blocking=False)
        elif operation in (aten.index_put, aten.index_put_) and any(_is_mask(one) for one in args[1]):
            self.waits_for("elements are picked by a mask")  # on CUDA `nonzero`, which meta refuses in `index` alone
        elif len({tensor.device.type for tensor in tensors if tensor.device.type == "meta" or tensor.dim()}) > 1:
            raise WaitError(f"{function} takes tensors of two devices, {self.place()}")
        return function(*args, **kwargs)

    def comes_from_the_host(self, *, non_blocking: bool) -> None:
        if not (non_blocking and _functions()[-1:] == [COPY_TO_DEVICE]):
            self.waits_for("a tensor is copied to the device from memory that is not pinned")

    def waits_for(self, what: str) -> None:
        if not self.may_wait and not _is_order_of_buckets():
            raise WaitError(f"{what}, {self.place()}")
        self.waits.append(Wait(self.step, what, "DDP" if _is_order_of_buckets() else (_functions() or ["torch"])[-1]))

    def place(self) -> str:
        return f"in step {self.step}: {' '.join(_functions())}"

    def places(self, step: int) -> list[str]:
        """Where the host waited in a step."""
        return [wait.where for wait in self.waits if wait.step == step]


class Makers(TorchFunctionMode):
    """Looks at the functions that make a tensor of numbers: on the meta device they call no operation."""

    def __init__(self, watch: Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        if function in MAKERS and made.device == META:
            self._watch.waits_for("a tensor is made on the device of numbers of the host")
        return made


def _tensors(argument: Any) -> list[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        return [argument]
    return [tensor for part in argument for tensor in _tensors(part)] if isinstance(argument, list | tuple) else []


def _is_mask(index: Any) -> bool:
    return index is not None and index.device.type == "meta" and index.dtype in (torch.bool, torch.uint8)


def _functions() -> list[str]:
    """The functions of dtrain that run, outermost first."""
    return [name for name, path in _stack() if path.startswith(DTRAIN)]


def _stack() -> list[tuple[str, str]]:
    """Name and file of the functions that run, outermost first."""
    found, frame = [], sys._getframe(1)
    while frame is not None:
        found.append((frame.f_code.co_name, frame.f_code.co_filename))
        frame = frame.f_back  # type: ignore[assignment]
    return found[::-1]


def _is_order_of_buckets() -> bool:
    """Whether DDP compares the order of its buckets with rank 0's: once, before an engine's second step."""
    return any(name == "_pre_forward" and "parallel" in path for name, path in _stack())


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Watch:
    """A watch that knows the steps of the loop, on a meta device that stands for a GPU."""
    stand_for_a_gpu(monkeypatch)
    watch, take_step, run_micro_batches = Watch(), loop.take_step, loop.run_micro_batches

    def take(run: Any, step: Any, *, at_once: bool = True, **more: Any) -> Any:
        watch.step, watch.may_wait = step.batches.step + 1, at_once
        if not at_once:
            watch.late.append(watch.step)
        try:
            return take_step(run, step, at_once=at_once, **more)
        finally:
            watch.step, watch.may_wait = 0, True

    def run_all(engine: Any, *args: Any, **more: Any) -> Any:
        losses = run_micro_batches(engine, *args, **more)
        gradients = [p.grad for group in engine.param_groups for p in group["params"] if p.grad is not None]
        assert gradients
        assert {tensor.device for tensor in (*gradients, *losses)} == {META}
        return losses

    monkeypatch.setattr(loop, "take_step", take)
    monkeypatch.setattr(loop, "run_micro_batches", run_all)
    return watch


def stand_for_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes dtrain treat the meta device as it treats CUDA, and torch build there what it builds on CUDA."""
    monkeypatch.setattr(single, "DECIDING_DEVICES", ("meta",))
    monkeypatch.setattr(optim, "FUSED_DEVICES", ("meta",))
    for module in (protocol, fsdp_sharding, build):
        monkeypatch.setattr(module, "device_of", lambda _topology: META)
    monkeypatch.setattr(torch, "autocast", autocast)
    # The trial compares numbers, which are not there.
    monkeypatch.setattr(unpadding, "_try", lambda _base, _hooks: None)
    # On CUDA a copy to pinned memory, which is read when it has ended.
    monkeypatch.setattr(late_totals, "copy_to_host", read_later)
    # The kernel has a meta version; only this check refuses it.
    # Not by the globals of Adam._init_group, which torch._dynamo replaces once it is imported.
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_device_dtype_check_for_fused", lambda *_: None)


class Casts(TorchFunctionMode):
    """Casts as autocast does on CUDA. torch has none for the meta device."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self._dtype = dtype

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def cast(value: Any) -> Any:
            return value.to(self._dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        if function in (F.linear, F.scaled_dot_product_attention, torch.matmul, torch.bmm):
            args, kwargs = (
                [cast(value) for value in args],
                {name: cast(value) for name, value in (kwargs or {}).items()},
            )
        return function(*args, **(kwargs or {}))


_autocast = torch.autocast


def autocast(
    device_type: str, dtype: torch.dtype | None = None, enabled: bool = True, **options: Any
) -> AbstractContextManager[Any]:
    if device_type != "meta":
        return _autocast(device_type, dtype, enabled, **options)
    return Casts(dtype) if enabled and dtype is not None else nullcontext()


def usual_monitors(journal: Journal, state: RunState, module: nn.Module, context: RankContext) -> list[Monitor]:
    """The monitors of a run that look at every step, or ask whether they must."""
    return [
        LogGradients(lambda *_: None),
        NonFinite("stop", journal),
        Spikes(Spike(factor=3, window=10, action="warn"), state, journal),
        Replicas(100, lambda: module, context, journal),
        Evaluate("never", lambda _step: {}),
        EarlyStopping(3, state),
    ]


def read_later(values: torch.Tensor) -> Callable[[], list[float]]:
    """Stands for `copy_to_host`: loss sum 2, no fault, norm 1, and a loss of 0.5 for each micro-batch."""
    assert values.device == META
    return lambda: [2.0, 0.0, 1.0, *[0.5] * (len(values) - 3)]


@contextmanager
def fake_ranks(monkeypatch: pytest.MonkeyPatch, world_size: int, *, rank: int = 0) -> Iterator[RankContext]:
    """One rank of a job whose other ranks are torch's fake process group. Only checks before the first step are replaced."""
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
    from torch.nn.parallel import distributed as ddp
    from torch.testing._internal.distributed.fake_pg import FakeStore

    # DDP compares shapes, and copies weights from rank 0, when it is built.
    monkeypatch.setattr(ddp, "_verify_param_shape_across_processes", lambda *_, **__: None)
    monkeypatch.setattr(ddp, "_sync_module_states", lambda *_, **__: None)
    # FSDP2 refuses weights without values before its first step.
    monkeypatch.setattr(FSDPParamGroup, "_validate_no_meta_params", lambda _self: None)
    # FSDP2 takes streams and events from `torch.<type of device>`. An event that the host waits for is a wait.
    monkeypatch.setattr(torch, "meta", streams(), raising=False)
    # Host tensors have a group of their own in a real job, so that they do not go over the GPU.
    monkeypatch.setattr(dist, "get_backend_config", lambda *_: "cpu:gloo,cuda:nccl")
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield RankContext(
            replace(SINGLE, rank=rank, world_size=world_size, local_rank=rank, local_world_size=world_size)
        )
    finally:
        dist.destroy_process_group()


def streams() -> Any:
    """What FSDP2 uses of `torch.cuda`."""

    def wait(*_: Any) -> None:
        raise WaitError("the host waits for an event or a stream of the device")

    class Event(torch.cpu.Event):  # type: ignore[misc,unused-ignore]
        synchronize = query = wait

    class Stream(torch.cpu.Stream):  # type: ignore[misc,unused-ignore]
        synchronize = query = wait

    current = Stream()
    return SimpleNamespace(
        Event=Event,
        Stream=Stream,
        stream=torch.cpu.stream,
        current_stream=lambda *_: current,
        synchronize=wait,
        current_device=lambda: 0,
        device_count=lambda: 1,
        is_initialized=lambda: True,
        is_available=lambda: True,
    )
