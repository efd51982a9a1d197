"""The real step of every engine on torch's meta device: all is on the device, and nothing is fetched between two log points.

tests/support/on_meta.py says how. What it replaces guards the building of DDP and FSDP2, or decides which device is a GPU.
DeepSpeed is left out, because it builds on its own kinds of device only, and offload, because its weights are on the host. A
step of DDP that leaves a parameter out is found by addresses, which are 0 here. Batches are computed without padding
(model.unpad), because transformers looks at the mask of a padded one: the last test shows that fetch. torch's PowerSGD takes
its sums from the futures of its collectives, which the fake process group leaves empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.engine.comm_hooks import CommHook
from dtrain.engine.ddp import DdpEngine
from dtrain.engine.fsdp import FsdpEngine
from dtrain.engine.single import SingleEngine
from dtrain.engine.state import STEP
from dtrain.models import adapters, frozen_border
from dtrain.training import look_ahead
from dtrain.training.monitors.protocol import Decision, StepEnd, StepRecord
from tests.support import tiny, training
from tests.support.faults import Journal
from tests.support.on_meta import META, WaitError, Watch, fake_ranks, usual_monitors, watch
from tests.support.training import Run, Setting

__all__ = ["watch"]

LOG_EVERY = 3
PLAIN = Setting(
    rows=80, steps=3, optimizer="adamw", learning_rate=1e-3, global_batch_size=8, micro_batch_size=4, table=True
)
"""Step 3 is logged, and the last one."""


class Logs:
    """A monitor that sees every step, and needs each third one at once."""

    def __init__(self) -> None:
        self.steps: list[StepRecord] = []

    def needs_at_once(self, end: StepEnd) -> bool:
        return end.step % LOG_EVERY == 0

    def after_step(self, record: StepRecord) -> Decision:
        self.steps.append(record)
        return Decision.CONTINUE


def with_adapters() -> nn.Module:
    from dtrain.config.model import Lora

    module = tiny.bert()
    adapters.add(module, Lora(r=2, alpha=4, targets=("query", "value")), base="tiny", new=["classifier"])
    return module


@contextmanager
def run_of(
    engine: str, monkeypatch: pytest.MonkeyPatch, *, rank: int = 0, module: nn.Module | None = None, **changes: Any
) -> Iterator[Run]:
    """A run on the meta device, ready to go: the first of two ranks, or one process."""
    setting = replace(PLAIN, engine=engine, **changes)
    ranks = nullcontext(ONE_PROCESS) if engine == "single" else fake_ranks(monkeypatch, 2, rank=rank)
    with ranks as context:
        module = module or tiny.bert(dropout=setting.dropout, layers=1)
        # FSDP2 cannot move a module to another kind of device; a real run makes it there (models/load.py).
        yield training.build(context, setting, module.to(META))


def state_of(run: Run) -> list[torch.Tensor]:
    """Weights, buffers and the optimizer's slots of this rank, but not the counts that only torch's fused kernels need there."""
    module, optimizer = run.engine.module, run.engine._optimizer  # type: ignore[attr-defined]
    is_fused = bool(optimizer.defaults.get("fused"))
    named = [item for state in optimizer.state.values() for item in state.items() if torch.is_tensor(item[1])]
    slots = [slot for name, slot in named if is_fused or name != STEP]
    assert slots
    return [*module.parameters(), *module.buffers(), *slots]


ALL_ENGINES: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulation": {"micro_batch_size": 2},
    "without clipping": {"max_grad_norm": None},
    "bf16": {"precision": "bf16"},
    "activation checkpointing": {"checkpointing": True},
    "a token budget": {"micro_batch_size": 3, "micro_batch_tokens": 48},
    "frozen layers": {"freeze": ("bert.embeddings",)},
    "adapters": {},
}

NORM_FETCHED = {"single": "clip", "ddp": "clip", "fsdp": "weighted_sq_norm"}
"""The function that fetches the gradient's norm in a step that is read at once."""

ORDER_OF_BUCKETS = ["DDP"] * 4
"""Once for each engine, before its second step, DDP copies the order and the sizes of its buckets to the device and back."""

OTHER_RANK = torch.tensor([3.0, 0, 0, 0, 8, 8, 1, 0], dtype=torch.float64)
"""What a rank with all 8 examples of a step adds to its sums: loss, weight, targets and squared norm."""

CASES = [
    *((engine, case, changes) for engine in ("single", "ddp", "fsdp") for case, changes in ALL_ENGINES.items()),
    # Rank 1 has no micro-batch: it runs one that does not count.
    ("ddp", "a stand-in", {"micro_batch_size": 8, "rank": 1}),
    ("fsdp", "a stand-in", {"micro_batch_size": 8, "rank": 1}),
    ("single", "groups with their own rates", {"layer_decay": 0.9}),
    ("single", "class weights", {"class_weights": True}),
    ("ddp", "bf16 on the wire", {"gradient_wire": "bf16"}),
    ("fsdp", "weights that stay gathered", {"reshard_after_forward": False}),
]


@pytest.mark.parametrize(("engine", "case", "changes"), CASES, ids=[f"{one[0]}: {one[1]}" for one in CASES])
def test_nothing_is_fetched_between_two_log_points(
    engine: str, case: str, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch, watch: Watch
) -> None:
    module = with_adapters() if case == "adapters" else None
    logs = Logs()
    if case == "a stand-in":
        monkeypatch.setattr(look_ahead, "all_reduce_sum", lambda own, _context: own + OTHER_RANK)
    with run_of(engine, monkeypatch, module=module, **changes) as run, watch:
        assert run.engine.decides_on_device
        run.go(logs)
        tensors = state_of(run)
        trained = sum(p.numel() for p in run.engine.module.parameters() if p.requires_grad)

    assert {tensor.device for tensor in tensors} == {META}
    assert watch.late == [1, 2]
    assert [record.step for record in logs.steps] == [1, 2, 3]
    if engine != "single":  # the gradients of a step have crossed, in bf16 at least
        sent = [record.traffic.payload_bytes for record in logs.steps if record.traffic is not None]
        assert len(sent) == 3
        assert min(sent) > 2 * trained
    assert all(record.applied and record.grad_norm == 1.0 for record in logs.steps if record.step in watch.late)
    assert watch.places(0) + watch.places(1) == []
    assert watch.places(2) == (ORDER_OF_BUCKETS if engine == "ddp" else [])
    # A logged step fetches its losses and the norm, once each. A stand-in has no loss.
    losses = [] if case == "a stand-in" else ["to_floats"]
    assert watch.places(3) == [*losses, NORM_FETCHED[engine]]


@pytest.mark.parametrize("engine", ["single", "ddp", "fsdp"])
def test_a_thaw_leaves_everything_on_the_device(engine: str, monkeypatch: pytest.MonkeyPatch, watch: Watch) -> None:
    logs = Logs()
    thawed = {"rows": 24, "steps": 6, "freeze": ("bert.embeddings",), "thaw": ((1, "bert.embeddings"),)}
    with run_of(engine, monkeypatch, **thawed) as run, watch:
        before = run.engine
        run.go(logs)
        tensors = state_of(run)

    assert run.engine is not before
    assert all(parameter.requires_grad for parameter in run.engine.module.parameters())
    assert {tensor.device for tensor in tensors} == {META}
    assert watch.late == [1, 2, 4, 5]
    waits = {step: watch.places(step) for step in watch.late}
    order = ORDER_OF_BUCKETS if engine == "ddp" else []
    assert waits == {1: [], 2: order, 4: [], 5: order}


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_the_usual_monitors_fetch_nothing_on_ranks(engine: str, monkeypatch: pytest.MonkeyPatch, watch: Watch) -> None:
    with run_of(engine, monkeypatch) as run, watch:
        run.go(Logs(), *usual_monitors(Journal(), run.state, run.engine.module, run.context))

    assert watch.late == [1, 2]
    assert watch.places(1) == []
    assert watch.places(0) == ["hashes_of"]  # after the last step the ranks compare their weights


class Sometimes(nn.Module):
    """A last layer with a part that every second call leaves out."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.extra = layer, nn.Linear(2, 2)
        self.calls = 0

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        logits: torch.Tensor = self.layer(states)
        return logits + self.extra(logits) if self.calls % 2 else logits


@pytest.mark.parametrize("engine", ["single", "fsdp"])  # DDP's engine looks at addresses, which are 0 here
def test_a_step_that_leaves_a_parameter_out_fetches_nothing(
    engine: str, monkeypatch: pytest.MonkeyPatch, watch: Watch
) -> None:
    module = tiny.bert(layers=1)
    module.classifier = Sometimes(module.classifier)
    # The other rank has what this one has.
    monkeypatch.setattr(look_ahead, "all_reduce_sum", lambda own, _context: own * 2)
    with run_of(engine, monkeypatch, module=module, micro_batch_size=8 if engine == "single" else 4) as run, watch:
        settled: list[list[str]] = []
        real = run.engine.step_on_device

        def step_on_device(skip: torch.Tensor) -> torch.Tensor:
            parts = [(name, run.engine.updated_part(p)) for name, p in run.engine.module.named_parameters()]
            settled.append([name for name, part in parts if part.grad is None])
            return real(skip)

        monkeypatch.setattr(run.engine, "step_on_device", step_on_device)
        run.go(Logs())

    extra = ["classifier.extra.weight", "classifier.extra.bias"]
    assert sorted(settled, key=len) == [[], extra]
    assert watch.late == [1, 2]
    assert watch.places(1) + watch.places(2) == []


def test_reading_the_frozen_part_fetches_nothing(monkeypatch: pytest.MonkeyPatch, watch: Watch, tmp_path: Path) -> None:
    monkeypatch.setattr(frozen_border, "_try", lambda *_: None)  # the trial compares numbers, which are not there
    frozen = {"freeze": ("bert.embeddings", "bert.encoder.layer.0"), "cache": "on", "cache_dir": str(tmp_path)}
    with watch, run_of("single", monkeypatch, module=tiny.bert(layers=2), **frozen) as run:
        run.go(Logs())

    assert run.prepared.frozen_cache.hits == 6
    assert watch.late == [1, 2]
    assert watch.places(1) + watch.places(2) == []


# What the host decides: each step fetches, but no more than it needs


ON_THE_HOST: list[tuple[str, dict[str, Any], list[str]]] = [
    ("single", {"bitwise": True, "micro_batch_size": 2}, ["to_floats", "clip"]),
    # Each parameter is a message of its own; their counts are fetched together.
    ("ddp", {"bitwise": True, "micro_batch_size": 2, "bucket_mb": 1e-4}, ["unpack_all", "to_floats", "clip"]),
    ("single", {"precision": "fp16"}, ["to_floats", "clip"]),
    ("single", {"optimizer": "sgd", "momentum": 0.9}, ["to_floats", "clip"]),
    ("fsdp", {"optimizer": "sgd", "momentum": 0.9}, ["to_floats", "weighted_sq_norm"]),
    ("ddp", {"local_steps": 2}, ["to_floats", "local_norm", "clip"]),
    # torch's Adafactor fetches two norms of every parameter.
    ("single", {"optimizer": "adafactor"}, ["to_floats", "clip", *["step"] * 2 * 25]),
]


@pytest.mark.parametrize(("engine", "changes", "places"), ON_THE_HOST, ids=[str(one[:2]) for one in ON_THE_HOST])
def test_a_step_that_the_host_decides_fetches_once_for_each_thing_that_it_needs(
    engine: str, changes: dict[str, Any], places: list[str], monkeypatch: pytest.MonkeyPatch, watch: Watch
) -> None:
    with run_of(engine, monkeypatch, **changes) as run, watch:
        assert not run.engine.decides_on_device
        run.go(Logs())
        tensors = state_of(run)

    assert {tensor.device for tensor in tensors} == {META}
    assert [watch.places(step) for step in (1, 2, 3)] == [places] * 3


# A fetch, or a tensor that is not on the device, is noticed


class Fetching(nn.Module):
    """Stands for a model's last layer, and does something with its output on the way."""

    def __init__(self, layer: nn.Module, action: Callable[[torch.Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.action = layer, action

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.layer(states)
        self.action(logits.detach())
        return logits


FETCHES: dict[str, Callable[[torch.Tensor], Any]] = {
    "item": lambda values: values.sum().item(),
    "float": lambda values: float(values.sum()),
    "bool": lambda values: bool(values.isfinite().all()),
    "tolist": lambda values: values.tolist(),
    "cpu": lambda values: values.cpu(),
    "numpy": lambda values: values.numpy(),
    "nonzero": lambda values: values.nonzero(),
    "a mask": lambda values: values[values > 0],
    "a mask to set": lambda values: values.index_put((values > 0,), values[0, 0]),
    "a copy to the host": lambda values: torch.empty(values.shape).copy_(values),
    "a number from the host": lambda values: values.new_tensor(1.0),
    "numbers from the host": lambda values: torch.tensor([1.0], device=values.device),
    "a copy from the host": lambda values: torch.ones(2).to(values.device),
    "a copy from memory that is not pinned": lambda values: torch.ones(2).to(values.device, non_blocking=True),
    "values on the host": lambda values: values + torch.ones(2),
}


@pytest.mark.parametrize("name", FETCHES)
def test_a_model_that_waits_for_the_device_is_noticed_in_the_first_step(
    name: str, monkeypatch: pytest.MonkeyPatch, watch: Watch
) -> None:
    is_on = False
    module = tiny.bert(layers=1)
    module.classifier = Fetching(module.classifier, lambda values: FETCHES[name](values) if is_on else None)
    with run_of("single", monkeypatch, module=module) as run, watch:
        is_on = True
        with pytest.raises((WaitError, RuntimeError, TypeError)) as raised:
            run.go(Logs())

    assert watch.late == [1]
    assert "run_micro_batches" in [entry.name for entry in raised.traceback]


def fetches_before(method: str, engine: type[SingleEngine], monkeypatch: pytest.MonkeyPatch) -> None:
    """Inserts a fetch of the first argument before a method of an engine."""
    real = getattr(engine, method)

    def fetch_first(self: Any, tensor: torch.Tensor) -> Any:
        float(tensor.detach())
        return real(self, tensor)

    monkeypatch.setattr(engine, method, fetch_first)


@pytest.mark.parametrize("method", ["backward", "step_on_device"])
@pytest.mark.parametrize(("name", "engine"), [("single", SingleEngine), ("ddp", DdpEngine), ("fsdp", FsdpEngine)])
def test_an_engine_that_fetches_is_noticed_in_the_first_step(
    name: str, engine: type[SingleEngine], method: str, monkeypatch: pytest.MonkeyPatch, watch: Watch
) -> None:
    fetches_before(method, engine, monkeypatch)

    with (
        run_of(name, monkeypatch) as run,
        watch,
        pytest.raises(WaitError, match="a number is fetched, in step 1: train take_step") as raised,
    ):
        run.go(Logs())

    assert "fetch_first" in [entry.name for entry in raised.traceback]


def test_a_gradient_exchange_that_fetches_is_noticed(monkeypatch: pytest.MonkeyPatch, watch: Watch) -> None:
    average = CommHook.average
    monkeypatch.setattr(
        CommHook, "average", lambda hook, bucket: bucket.buffer().sum().item() and average(hook, bucket)
    )

    with (
        run_of("ddp", monkeypatch) as run,
        watch,
        pytest.raises((WaitError, RuntimeError), match="a number is fetched"),
    ):
        run.go(Logs())


def test_fsdp_that_waits_for_a_stream_is_noticed(monkeypatch: pytest.MonkeyPatch, watch: Watch) -> None:
    from dtrain.engine import fsdp_sharding

    gather: Any = fsdp_sharding._AllGather.__call__

    def wait_first(*args: Any, **more: Any) -> Any:
        torch.meta.current_stream().synchronize()  # type: ignore[attr-defined]
        return gather(*args, **more)

    with run_of("fsdp", monkeypatch) as run, watch:
        monkeypatch.setattr(fsdp_sharding._AllGather, "__call__", wait_first)
        with pytest.raises(WaitError, match="an event or a stream"):
            run.go(Logs())


def test_with_padding_the_models_own_look_at_the_mask_is_noticed(monkeypatch: pytest.MonkeyPatch, watch: Watch) -> None:
    with (
        watch,
        run_of("single", monkeypatch, unpad="off") as run,
        pytest.raises(WaitError, match=r"a number is fetched, in step 1: .* compute_logits"),
    ):
        run.go(Logs())
