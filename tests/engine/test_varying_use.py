"""Models that use different parameters in different micro-batches: the same answer on one process and on many ranks.

LayerDrop with probability 0.5, a router that starves an expert, a part that one rank never uses, and micro-batches without any
trainable parameter. Weight decay is on, so that a parameter that should be skipped must not even decay.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from dtrain.distributed.rank_context import ONE_PROCESS, RankContext
from dtrain.engine import ddp
from dtrain.engine.sharded_tensor import is_sharded, local_rows
from tests.support import tiny, training
from tests.support.multirank import RanksFailed, run_ranks
from tests.support.training import Setting, apart, worst

pytestmark = pytest.mark.ranks

SETTING = Setting(optimizer="adamw", learning_rate=1e-2, steps=8, dropout=0.0, double=True, find_unused=True)
"""21 rows in steps of 8 and micro-batches of 3: on 2 ranks one has two micro-batches, so earlier sums count as well."""

KINDS = ("layerdrop", "experts", "one_row", "nothing")


class Experts(nn.Module):
    """Each row goes through the expert that its second token selects; of eight, two are never selected."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(2, 2) for _ in range(8))

    def forward(self, logits: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        chosen = (input_ids[:, 1] % 6).tolist()
        rows = [
            row + self.experts[expert](row.to(self.experts[0].weight.dtype))
            for row, expert in zip(logits, chosen, strict=True)
        ]
        return torch.stack(rows)


def varying(kind: str) -> nn.Module:
    """Returns a BERT with a part that only some micro-batches use; "fixed": without one."""
    module = tiny.bert(dropout=0.0, layers=3)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        match kind:
            case "layerdrop":
                for layer in module.bert.encoder.layer:
                    layer.register_forward_hook(_drop)
            case "experts":
                module.extra = Experts()
                module.register_forward_hook(_route, with_kwargs=True)
            case "one_row":
                module.extra = nn.Linear(2, 2)
                module.register_forward_hook(_sometimes, with_kwargs=True)
            case "nothing":
                module.extra = nn.Linear(2, 2)
                for parameter in module.bert.parameters():
                    parameter.requires_grad_(False)
                module.classifier.requires_grad_(False)
                module.register_forward_hook(_sometimes, with_kwargs=True)
    return module


def _drop(layer: nn.Module, args: Any, output: Any) -> Any:
    if layer.training and torch.rand(()) < 0.5:
        hidden = args[0]
        return (hidden, *output[1:]) if isinstance(output, tuple) else hidden
    return output


def _route(module: Any, _args: Any, inputs: dict[str, Any], output: Any) -> Any:
    output.logits = module.extra(output.logits, inputs["input_ids"])
    return output


def _sometimes(module: Any, _args: Any, inputs: dict[str, Any], output: Any) -> Any:
    if bool((inputs["input_ids"][:, 1] == 5).any()):
        output.logits = output.logits + module.extra(output.logits)
    return output


def trained(context: RankContext, kind: str, setting: Setting, broken: str | None = None) -> dict[str, Any]:
    """Collective. Trains; returns steps, weights and slots."""
    if broken == "keeps":  # zeros instead of no gradient: the optimizer would decay and count
        ddp.DdpEngine.settle_missing_gradients = lambda self, ranks: None  # type: ignore[method-assign]
    module = varying(kind)
    run = training.build(context, setting, module.double() if setting.double else module)
    recorder = training.Recorder()
    engine = run.go(recorder)
    names = {name for name, _ in engine.module.named_parameters()}
    slots = {state.name: sorted(state.slots) for state in engine.named_state(here=True) if state.name in names}
    own = {name: float(local(p).double().square().sum()) for name, p in engine.module.named_parameters()}
    return {"steps": recorder.steps, "weights": training.weights_of(engine), "slots": slots, "own": own}


def local(parameter: nn.Parameter) -> torch.Tensor:
    return local_rows(parameter) if is_sharded(parameter) else parameter.detach()


def assert_same(one: dict[str, Any], ranks: list[dict[str, Any]]) -> None:
    assert worst(one, ranks[0]) <= 1e-9
    assert worst(one, ranks[0], "grad_norm") <= 1e-8
    assert apart(one, ranks[0]) <= 1e-9
    for rank in ranks:
        assert rank["slots"] == one["slots"]
        assert (rank["steps"], rank["own"]) == (ranks[0]["steps"], ranks[0]["own"])


@pytest.fixture(scope="module")
def alone() -> dict[str, dict[str, Any]]:
    return {kind: trained(ONE_PROCESS, kind, SETTING) for kind in KINDS}


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_ddp_takes_the_steps_of_one_process(alone: dict[str, dict[str, Any]], kind: str, world_size: int) -> None:
    assert_same(alone[kind], run_ranks(trained, world_size, kind, SETTING))


@pytest.mark.parametrize("kind", ["layerdrop", "experts", "one_row"])
def test_fsdp_takes_the_steps_of_one_process(alone: dict[str, dict[str, Any]], kind: str) -> None:
    one, ranks = alone[kind], run_ranks(trained, 2, kind, replace(SETTING, engine="fsdp"))

    assert worst(one, ranks[0]) <= 1e-9
    assert worst(one, ranks[0], "grad_norm") <= 1e-8
    assert apart(one, ranks[0]) <= 1e-9
    assert all((rank["slots"], rank["steps"]) == (one["slots"], ranks[0]["steps"]) for rank in ranks)


def test_fsdp_refuses_micro_batches_without_any_trainable_parameter() -> None:
    with pytest.raises(RanksFailed, match=r"used no trainable parameter.*engine\.name=ddp"):
        run_ranks(trained, 2, "nothing", replace(SETTING, engine="fsdp"))


def test_the_subject_really_leaves_parameters_out(alone: dict[str, dict[str, Any]]) -> None:
    slots = alone["experts"]["slots"]

    assert slots["extra.experts.0.weight"] == ["exp_avg", "exp_avg_sq", "step"]
    assert slots["extra.experts.7.weight"] == []


def test_a_gradient_of_zeros_instead_of_none_is_noticed(alone: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(AssertionError):
        assert_same(alone["experts"], run_ranks(trained, 2, "experts", SETTING, "keeps"))


def metered(context: RankContext, kind: str, setting: Setting) -> list[int]:
    """Collective. Returns each step's number of collectives."""
    run, collectives = training.build(context, setting, varying(kind)), []

    class Meter:
        def after_step(self, record: Any) -> Any:
            collectives.append(record.traffic.collectives)
            return training.Decision.CONTINUE

    run.go(Meter())
    return collectives


def test_only_a_step_that_leaves_parameters_out_makes_one_more_collective() -> None:
    setting = replace(SETTING, double=False)

    (fixed, _), (varies, _) = (run_ranks(metered, 2, kind, setting) for kind in ("fixed", "experts"))

    assert set(fixed) == {2}  # gradients, and the step's sums
    assert set(varies) == {3}  # and which parameters were used


@pytest.mark.parametrize("changes", [{"gradient_wire": "bf16"}, {"local_steps": 2}])
def test_other_exchanges_end_with_equal_weights_on_all_ranks(changes: dict[str, Any]) -> None:
    ranks = run_ranks(trained, 2, "experts", replace(SETTING, double=False, **changes))

    assert ranks[0]["own"] == ranks[1]["own"]


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_refuses_such_a_model_and_names_the_cure(stage: int) -> None:
    setting = replace(SETTING, double=False, find_unused=False, engine="deepspeed", zero_stage=stage)

    with pytest.raises(RanksFailed, match=r"did not use .*Use engine\.name=ddp"):
        run_ranks(trained, 1, "layerdrop", setting, timeout_s=120)


def test_a_layer_that_the_first_micro_batch_drops_at_random_is_not_frozen() -> None:
    found = trained(ONE_PROCESS, "layerdrop", replace(SETTING, find_unused=False))

    assert [name for name, slots in found["slots"].items() if not slots] == []
