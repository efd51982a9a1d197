"""What crosses ranks in a step: counted as torch counts it, halved in bf16, squeezed by PowerSGD, seldom by local steps.

21 rows, global batch 8, micro-batches of 3, as in tests/training/test_exactness.py: at W = 3 a rank has nothing to do in the last
step of an epoch.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dtrain.data.batches import step_batches
from dtrain.distributed.rank_context import ONE_PROCESS, RankContext
from dtrain.engine import local_sgd, optim, schedules
from dtrain.engine.build import build_engine
from dtrain.engine.parameter_groups import parameter_groups
from dtrain.engine.protocol import StepWeight
from dtrain.engine.single import SingleEngine
from dtrain.job.watchdog.flight_recorder import collective_number
from dtrain.training import build
from dtrain.training.late_totals import to_floats
from dtrain.training.loop import run_micro_batches
from dtrain.training.monitors.protocol import Decision, StepRecord
from dtrain.training.monitors.replicas import hashes_of
from tests.support import training
from tests.support.contexts import placed
from tests.support.multirank import run_ranks
from tests.support.training import Setting, worst

pytestmark = pytest.mark.ranks

PLAIN = Setting()
SUMS_BYTES = 8 * 8
"""Of the one small all-reduce of a step."""


class Meter:
    """Keeps what each step sent, as dtrain counts it and as torch's process group does."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []
        self._before = collective_number()

    def after_step(self, record: StepRecord) -> Decision:
        now, traffic = collective_number(), record.traffic
        self.steps.append(
            {
                "loss": record.loss,
                "grad_norm": record.grad_norm,
                "applied": record.applied,
                "averaged": record.averaged,
                "collectives": None if traffic is None else traffic.collectives,
                "payload_bytes": None if traffic is None else traffic.payload_bytes,
                "torch": now - self._before,
            }
        )
        self._before = now
        return Decision.CONTINUE


def metered(context: RankContext, settings: list[Setting]) -> list[dict[str, Any]]:
    """Collective. Each setting's run: its steps, how many bytes learn, and a hash of the final weights."""
    found = []
    for setting in settings:
        run, meter = training.build(context, setting), Meter()
        module = run.go(meter).module
        learns = sum(p.nbytes for p in module.parameters() if p.requires_grad)
        found.append({"steps": meter.steps, "learns": learns, "hash": hash_of(module)})
        run.engine.release()
    return found


def hash_of(module: Any) -> list[int]:
    hashes: list[int] = hashes_of(module)[1].tolist()
    return hashes


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    return training.run(ONE_PROCESS, PLAIN)


ACCUMULATED = replace(PLAIN, rows=64, global_batch_size=16, micro_batch_size=1, steps=4)
"""Eight micro-batches on each of two ranks."""

BF16 = replace(PLAIN, gradient_wire="bf16")


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_step_makes_one_collective_for_each_bucket_of_gradients_and_one_more(world_size: int) -> None:
    small = replace(PLAIN, bucket_mb=0.02)
    ranks = run_ranks(metered, world_size, [PLAIN, ACCUMULATED, BF16, small])

    assert all(rank == ranks[0] for rank in ranks[1:])
    plain, accumulated, bf16, many = ranks[0]
    for found, dtype_size in ((plain, 4), (accumulated, 4), (bf16, 2)):
        sent = {(step["collectives"], step["payload_bytes"]) for step in found["steps"]}
        assert sent == {(2, found["learns"] * dtype_size // 4 + SUMS_BYTES)}, "one bucket holds this model"
    (buckets,) = {step["collectives"] - 1 for step in many["steps"][2:]}
    assert buckets >= many["learns"] / (0.04 * 2**20)
    assert {step["payload_bytes"] for step in many["steps"]} == {many["learns"] + SUMS_BYTES}
    for found in ranks[0]:
        # Once, DDP tells all ranks the order of its buckets.
        assert [step["torch"] for step in found["steps"][2:]] == [step["collectives"] for step in found["steps"][2:]]


def test_one_process_sends_nothing_whatever_the_settings_of_the_links(single: dict[str, Any]) -> None:
    for changes in ({"gradient_wire": "bf16"}, {"powersgd": {"rank": 1, "start_step": 2}}, {"local_steps": 3}):
        alone = training.run(ONE_PROCESS, replace(PLAIN, **changes))

        assert alone["steps"] == single["steps"]
        assert alone["weights"] == single["weights"]
    (found,) = metered(ONE_PROCESS, [PLAIN])
    assert {(step["collectives"], step["payload_bytes"]) for step in found["steps"]} == {(0, 0)}


def test_what_deepspeed_sends_is_not_told_rather_than_told_wrongly() -> None:
    found, ddp = run_ranks(metered, 2, [replace(PLAIN, engine="deepspeed", zero_stage=0, steps=2), PLAIN])[0]

    assert {step["collectives"] for step in found["steps"]} == {None}
    assert {step["collectives"] for step in ddp["steps"]} == {2}, (
        "an engine that counts what it sends, in the same group"
    )


@pytest.mark.parametrize("world_size", [2, 3])
def test_bf16_on_the_wire_is_the_same_method_with_other_rounding(world_size: int) -> None:
    setting = replace(PLAIN, steps=50, learning_rate=0.1, gradient_wire="bf16")
    plain = metered(ONE_PROCESS, [replace(setting, gradient_wire="fp32")])[0]

    ranks = run_ranks(metered, world_size, [setting])

    assert 0 < worst(plain, ranks[0][0]) <= 0.02
    assert 0 < worst(plain, ranks[0][0], "grad_norm") <= 0.02
    assert all(rank[0]["hash"] == ranks[0][0]["hash"] for rank in ranks)


def test_deepspeed_rounds_what_it_sends_at_every_stage() -> None:
    plain = training.run(ONE_PROCESS, PLAIN)
    stages = [replace(BF16, engine="deepspeed", zero_stage=stage) for stage in (0, 1, 2, 3)]

    ranks = run_ranks(metered, 2, stages, timeout_s=120)

    for found in ranks[0]:
        # Rounding of 2e-3 of the gradient's norm shows there; without the setting the norms agree to 1e-5.
        assert 2e-5 < worst(plain, found, "grad_norm") <= 0.02
        assert worst(plain, found) <= 0.02


def local_every_step(context: RankContext, setting: Setting, broken: str | None) -> dict[str, Any]:
    """Collective. Local steps that are averaged after each one."""
    if broken == "mean_of_means":
        local_sgd.LocalSgd.count = lambda self, weight: _add(self, 1.0, float(context.world_size))  # type: ignore[method-assign]
    run = training.build(context, replace(setting, engine="auto"))
    module, config = run.engine.release(), setting.config()
    optimizer = optim.build_optimizer(parameter_groups(module, config.optim), config.optim)
    run.engine = local_sgd.LocalSgdEngine(module, optimizer, config, context)
    recorder = training.Recorder()
    engine = run.go(recorder)
    return {"steps": recorder.steps, "weights": training.weights_of(engine)}


def _add(steps: Any, own: float, total: float) -> None:
    steps._local_weight += own
    steps._total_weight += total


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_local_steps_averaged_each_time_are_plain_sgd_steps(world_size: int) -> None:
    # Uneven shares, class weights, and ranks without any: the shares of the average have to make up for it.
    setting = replace(PLAIN, max_grad_norm=None, learning_rate=0.1, class_weights=True)
    one = training.run(ONE_PROCESS, setting)

    ranks = run_ranks(local_every_step, world_size, setting, None)

    assert worst(one, ranks[0]) <= 1e-6
    assert training.apart(one, ranks[0]) <= 2e-6
    assert all(rank["steps"] == ranks[0]["steps"] for rank in ranks)


def test_an_average_that_forgets_how_much_each_rank_has_seen_is_rejected() -> None:
    setting = replace(PLAIN, max_grad_norm=None, learning_rate=0.1, class_weights=True)
    one = training.run(ONE_PROCESS, setting)

    ranks = run_ranks(local_every_step, 3, setting, "mean_of_means")

    assert worst(one, ranks[0]) > 1e-4


LOCAL = replace(PLAIN, optimizer="adamw", learning_rate=1e-2, local_steps=2, steps=9, warmup=0)


def by_hand(setting: Setting, world_size: int) -> dict[str, Any]:
    """The same in one process: a model and an optimizer for each rank, averaged when they are due."""
    config, learns = setting.config(), training.task(setting)
    plan = build.step_plan(config, learns)
    rate = schedules.learning_rate(config.optim, config.schedule, total_steps=setting.steps)
    engines, batches = [], []
    for rank in range(world_size):
        module = training.tiny.bert(dropout=setting.dropout, layers=2)
        build.prepare_training(module, config, learns, plan).train_mode(module)
        optimizer = optim.build_optimizer(parameter_groups(module, config.optim), config.optim)
        engines.append(SingleEngine(module, optimizer, config, ONE_PROCESS))
        place = placed(ONE_PROCESS, rank=rank, world_size=world_size)
        rows = learns.splits["train"]
        batches.append(
            step_batches(plan, rows, learns.collate, place, lock_step=False, start=0, stop=setting.steps, workers=0)
        )
    seen, losses = [0.0] * world_size, []
    for step in range(setting.steps):
        weights, sums = [], []
        for rank, engine in enumerate(engines):
            mine = next(batches[rank])
            weight = math.fsum(learns.targets(b.tensors).weight for b in mine.micro_batches if b.counted)
            scale = 1 / weight if weight else 0.0
            sums += to_floats(run_micro_batches(engine, learns, mine, scale=scale, seed=config.run.seed))
            for group in engine.param_groups:
                group["lr"] = rate(step)
            engine.step(StepWeight(weight, weight), discard=weight == 0)
            weights.append(weight)
        losses.append(math.fsum(sums) / math.fsum(weights))
        seen = [before + weight for before, weight in zip(seen, weights, strict=True)]
        if (step + 1) % setting.local_steps == 0 or (step + 1) % plan.steps_per_epoch == 0 or step + 1 == setting.steps:
            _average_by_hand(engines, [part / math.fsum(seen) for part in seen])
            seen = [0.0] * world_size
    return {"steps": [{"loss": loss} for loss in losses], "weights": training.weights_of(engines[0])}


def _average_by_hand(engines: list[SingleEngine], shares: list[float]) -> None:
    for everyones in zip(*(engine.module.parameters() for engine in engines), strict=True):
        _set_mean([p.data for p in everyones], shares)
        slots = [engine._optimizer.state[p] for engine, p in zip(engines, everyones, strict=True)]
        took = [(slot, share) for slot, share in zip(slots, shares, strict=True) if share]
        if not any(slot for slot, _ in took):
            continue  # it does not learn
        for slot in slots:
            for key, value in took[0][0].items():
                slot.setdefault(key, torch.zeros_like(value))
        for key in ("exp_avg", "exp_avg_sq"):
            _set_mean([slot[key] for slot in slots], shares)
        count = round(sum(float(slot["step"]) * share for slot, share in took))
        for slot in slots:
            slot["step"].fill_(count)


def _set_mean(tensors: list[torch.Tensor], shares: list[float]) -> None:
    mean = sum((t.double() * share for t, share in zip(tensors, shares, strict=True)), torch.zeros(()))
    for tensor in tensors:
        tensor.copy_(mean)


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_local_steps_are_those_of_as_many_models_averaged_by_hand(world_size: int) -> None:
    ranks = run_ranks(metered, world_size, [LOCAL])
    weights = run_ranks(training.run, world_size, LOCAL)[0]

    expected = by_hand(LOCAL, world_size)
    assert worst(expected, ranks[0][0]) <= 1e-5
    assert training.apart(expected, weights) <= 1e-5
    assert [step["averaged"] for step in ranks[0][0]["steps"]] == [
        number in (2, 3, 4, 6, 8, 9) for number in range(1, 10)
    ]
    assert all(rank == ranks[0] for rank in ranks[1:])


def test_between_averages_only_the_small_sums_cross() -> None:
    (found,) = run_ranks(metered, 2, [replace(LOCAL, local_steps=3)])[0]

    # Before the first step, the weight of its examples is summed.
    assert [step["collectives"] for step in found["steps"][1:]] == [step["torch"] for step in found["steps"][1:]]
    apart = [step for step in found["steps"] if not step["averaged"]]
    assert {(step["collectives"], step["payload_bytes"]) for step in apart} == {(1, SUMS_BYTES)}
    together = {step["payload_bytes"] for step in found["steps"] if step["averaged"]}
    (most,) = together
    assert 3 * found["learns"] <= most <= 3.1 * found["learns"], "weights and two moments"


class StopOnceOnRankOne:
    """Wishes to stop once, in a step between two averages."""

    def __init__(self, rank: int) -> None:
        self._rank = rank

    def after_step(self, record: StepRecord) -> Decision:
        return Decision.STOP if record.step == 1 and self._rank == 1 else Decision.CONTINUE


class InfiniteOnRankOne:
    """An engine whose gradient is infinite on rank 1 in one step, though its loss is not."""

    def __init__(self, engine: Any, step: int) -> None:
        self._engine, self._step, self._count = engine, step, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def backward(self, loss: torch.Tensor) -> None:
        spoils = self._count == self._step and self._engine.context.rank == 1
        self._engine.backward(loss * math.inf if spoils else loss)

    def step(self, *arguments: Any, **more: Any) -> Any:
        self._count += 1
        return self._engine.step(*arguments, **more)


def hard_cases(context: RankContext) -> dict[str, Any]:
    """Collective. How local steps stop, drop a step, and thaw."""
    stopped = training.build(context, replace(LOCAL, local_steps=4, rows=100, steps=20))
    stopped.go(StopOnceOnRankOne(context.rank))
    dropped = training.build(context, LOCAL)
    dropped.engine = InfiniteOnRankOne(dropped.engine, 3)
    meter = Meter()
    dropped.go(meter)
    thawing = replace(LOCAL, freeze=("embeddings", "encoder.layer[:1]"), thaw=((1, "encoder.layer[0]"),))
    thawed = training.build(context, thawing)
    thawed.go()
    return {
        "stopped": [stopped.state.step, hash_of(stopped.engine.module)],
        "dropped": [[step["applied"] for step in meter.steps], hash_of(dropped.engine.module)],
        "thawed": [len(thawed.state.thawed), hash_of(thawed.engine.module)],
    }


def test_local_steps_stop_drop_and_thaw_on_all_ranks_alike() -> None:
    ranks = run_ranks(hard_cases, 3)

    assert all(rank == ranks[0] for rank in ranks[1:])
    assert ranks[0]["stopped"][0] == 4, "the wish of step 1 is kept until the weights are averaged"
    assert ranks[0]["dropped"][0] == [True] * 3 + [False] + [True] * 5
    assert ranks[0]["thawed"][0] == 1


POWER = replace(PLAIN, steps=12, learning_rate=0.1, powersgd={"rank": 2, "start_step": 3, "min_rate": 1.0})


def squeezed(context: RankContext, spoil: int | None = None) -> list[Any]:
    """Collective. PowerSGD: plain, with parameters that are all compressed, with a thaw, and with a step that is left out."""
    matrices = replace(POWER, freeze=("*.bias", "*.LayerNorm.weight"))
    thawing = replace(POWER, freeze=("embeddings", "encoder.layer[:1]"), thaw=((1, "encoder.layer[0]"),))
    found: list[Any] = metered(context, [POWER, matrices, thawing])
    run, meter = training.build(context, POWER), Meter()
    run.engine = InfiniteOnRankOne(run.engine, 6)
    run.go(meter)
    return [*found, {"steps": meter.steps, "hash": hash_of(run.engine.module)}]


class Degenerate(nn.Module):
    """Matrices whose gradient is zero, or has one row alone; and with the gate open, everywhere something."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.zero, self.one_row, self.plain = (nn.Parameter(torch.randn(16, 16)) for _ in range(3))

    def forward(self, place: int, gate: float) -> torch.Tensor:
        wanted = torch.full((16, 16), float(place + 1))
        rest = ((self.one_row - wanted) ** 2).sum() * gate + ((self.zero - wanted) ** 2).sum() * gate
        return rest + ((self.one_row[3] - wanted[3]) ** 2).sum() + ((self.plain - wanted) ** 2).sum()


def degenerate(context: RankContext, rank: int) -> dict[str, Any]:
    """Collective. Twenty steps with such gradients, then many with whole ones; how far it is from what is wanted."""
    setting = replace(POWER, powersgd={"rank": rank, "start_step": 2, "min_rate": 1.0}, max_grad_norm=None)
    config, module = setting.config(), Degenerate()
    engine = build_engine(module, config, context)
    for group in engine.param_groups:
        group["lr"], group["weight_decay"] = 0.01, 0.0
    engine.warm_up(lambda: engine.model(0, 1.0), step=0)
    distances, applied = [], 0
    for step in range(300):
        with engine.micro_batch(last=True):
            loss = engine.model(context.rank, 0.0 if step < 20 else 1.0)
            engine.backward(loss)
        applied += engine.step(StepWeight(1.0, 1.0)).applied
        if step in (19, 299):
            wanted = (context.world_size + 1) / 2
            distances.append([float((p - wanted).norm()) for p in (module.zero, module.one_row, module.plain)])
    memory = [float(slot.sum()) for entry in engine.named_state(here=True) for slot in entry.slots.values()]
    is_finite = all(map(math.isfinite, memory))
    return {"before": distances[0], "after": distances[1], "is_finite": is_finite, "applied": applied}


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_gradient_of_zeros_or_with_one_row_spoils_nothing_now_or_later(rank: int) -> None:
    (found, _) = run_ranks(degenerate, 2, rank)

    assert found["is_finite"]
    assert found["applied"] == 300, "no gradient was without a number"
    # A factor that has come to nothing once would let no gradient pass ever again.
    assert all(after < 0.2 * before for before, after in zip(found["before"], found["after"], strict=True)), found


def remembered_twice(context: RankContext) -> bool:
    """Collective. Whether what is remembered is the same when it is asked for twice, as at a checkpoint before a thaw."""
    run = training.build(context, replace(POWER, steps=5, rows=60, global_batch_size=15))
    engine = run.go()
    found = [
        {
            (entry.name, key): slot.clone()
            for entry in engine.named_state(here=True)
            for key, slot in entry.slots.items()
        }
        for _ in range(2)
    ]
    return bool(found[0]) and all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_what_is_remembered_does_not_depend_on_how_often_it_is_asked_for() -> None:
    assert run_ranks(remembered_twice, 5, timeout_s=120) == [True] * 5


def from_rank_0(context: RankContext) -> list[list[float]]:
    """Collective. Tensors of several types, of which each rank has others."""
    tensors = [torch.full((3,), 7 + context.rank, dtype=dtype) for dtype in (torch.uint8, torch.int64, torch.float32)]
    local_sgd.weighted_mean(tensors, float(context.is_main), context)
    return [tensor.tolist() for tensor in tensors]


def test_local_steps_begin_with_rank_0s_weights_of_any_type() -> None:
    assert run_ranks(from_rank_0, 2) == [[[7] * 3] * 3] * 2


def test_plain_sgd_makes_no_step_of_its_own_before_an_average(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, steps = nn.Parameter(torch.ones(2)), []
    plain, momentum = torch.optim.SGD([weight], lr=0.1), torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    for optimizer in (plain, momentum):
        monkeypatch.setattr(optimizer, "step", partial(steps.append, optimizer))

    local_sgd._make_missing_slots(plain)

    assert steps == []


def test_a_norm_whose_square_is_no_number_any_more_is_infinite_and_no_error() -> None:
    engine: Any = SimpleNamespace(local_sgd=SimpleNamespace(local_norm=lambda: 1e200))

    assert local_sgd.LocalSgdEngine.weighted_sq_norm(engine, StepWeight(2.0, 2.0)) == math.inf
    assert local_sgd.LocalSgdEngine.weighted_sq_norm(engine, StepWeight(2.0, 0.0)) == 0.0


@pytest.mark.parametrize("world_size", [2, 3])
def test_powersgd_sends_little_and_leaves_all_ranks_with_the_same_weights(world_size: int) -> None:
    ranks = run_ranks(squeezed, world_size)

    assert all(rank == ranks[0] for rank in ranks[1:])
    plain, matrices, thawed, dropped = ranks[0]
    whole, factors = plain["steps"][2]["payload_bytes"], plain["steps"][3]["payload_bytes"]
    assert whole == plain["learns"] + SUMS_BYTES
    assert factors < whole / 3
    for found in (plain, matrices, thawed, dropped):
        assert all(math.isfinite(step["loss"]) for step in found["steps"])
        assert [step["collectives"] for step in found["steps"][4:]] == [step["torch"] for step in found["steps"][4:]]
    assert plain["steps"][3]["collectives"] == 4
    assert [step["applied"] for step in dropped["steps"]] == [number != 6 for number in range(12)]


def test_powersgd_follows_plain_ddp(single: dict[str, Any]) -> None:
    setting = replace(POWER, steps=50)
    plain = training.run(ONE_PROCESS, replace(setting, powersgd=None))

    (found,) = run_ranks(metered, 2, [setting])[0]

    assert worst(plain, found) > 1e-6, "it is another algorithm"
    last = [run["steps"][-10:] for run in (plain, found)]
    ours, theirs = (math.fsum(step["loss"] for step in steps) / 10 for steps in last)
    assert ours == pytest.approx(theirs, rel=0.1)
