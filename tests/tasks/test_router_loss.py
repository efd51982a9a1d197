"""The loss of a mixture of experts' router: added where the config asks for it, one value on any number of ranks."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from dtrain.distributed.rank_context import ONE_PROCESS, RankContext
from dtrain.errors import ConfigError
from dtrain.tasks.causal_lm import CausalLmTask
from dtrain.tasks.router_loss import with_router_loss
from tests.support import tiny, training
from tests.support.multirank import run_ranks
from tests.support.training import Setting

SETTING = Setting(steps=4, global_batch_size=5, micro_batch_size=2, learning_rate=0.1, max_grad_norm=None)
COEFFICIENT = 0.7


def mixture(kind: str = "mixtral", head: Any = AutoModelForCausalLM, **options: Any) -> Any:
    """A tiny mixture of experts, of which each token uses 1 of 4."""
    sizes = {
        "vocab_size": 26,
        "hidden_size": 16,
        "intermediate_size": 16,
        "moe_intermediate_size": 16,
        "num_hidden_layers": 2,
    }
    shape = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_experts_per_tok": 1, "head_dim": 8}
    experts = {"num_local_experts" if kind == "mixtral" else "num_experts": 4, "pad_token_id": 0}
    options = {"output_router_logits": True, "router_aux_loss_coef": COEFFICIENT, **options}
    torch.manual_seed(0)
    return head.from_config(AutoConfig.for_model(kind, **sizes, **shape, **experts, **options))


def language_task() -> CausalLmTask:
    """Blocks of 6 targets, and one of 2, whose micro-batch weighs less."""
    ids = [int(number) for number in torch.randint(5, 26, (75,), generator=torch.Generator().manual_seed(1))]
    blocks = [ids[start : start + 7] for start in range(0, 74, 6)]
    return CausalLmTask({"train": tiny.Table({"input_ids": blocks})}, tiny.tokenizer(), max_length=6, is_char=False)


def trained(context: RankContext, setting: Setting, options: dict[str, Any]) -> dict[str, Any]:
    """Collective. Steps and weights of a run with the router's loss."""
    module = mixture(**options)
    run = training.build(context, setting, module, with_router_loss(language_task(), module))
    recorder = training.Recorder()
    engine = run.go(recorder)
    found = {"steps": recorder.steps, "weights": training.weights_of(engine)}
    engine.release()
    return found


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_the_loss_of_a_micro_batch_is_that_of_transformers_times_its_targets(kind: str) -> None:
    module, task = mixture(kind), language_task()
    batch = {
        "input_ids": torch.tensor([[5, 6, 7, 8], [9, 10, 0, 0]]),
        "attention_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]),
        "labels": torch.tensor([[6, 7, 8, 9], [10, 11, -100, -100]]),
    }
    module.train()
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    output = module(**inputs)
    plain = F.cross_entropy(output.logits.flatten(0, 1), batch["labels"].flatten(), ignore_index=-100, reduction="sum")

    loss = with_router_loss(task, module).loss(module, batch)

    assert float(output.aux_loss) >= 0.5
    torch.testing.assert_close(loss, plain + COEFFICIENT * 6 * output.aux_loss)


@pytest.mark.parametrize("options", [{"output_router_logits": False}, {"router_aux_loss_coef": 0.0}])
def test_nothing_is_added_where_the_config_does_not_ask_for_it(options: dict[str, Any]) -> None:
    task = language_task()

    assert with_router_loss(task, mixture(**options)) is task


def test_a_head_for_which_transformers_does_not_compute_it_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.config\.output_router_logits=false"):
        with_router_loss(language_task(), mixture(head=AutoModelForSequenceClassification))


def test_an_evaluation_is_without_it() -> None:
    module = mixture().eval()
    task = language_task()
    batch = {"input_ids": torch.tensor([[5, 6]]), "labels": torch.tensor([[6, 7]])}

    scored = with_router_loss(task, module).score(module, batch, lock_step=False)

    assert torch.equal(scored.loss, task.score(module, batch, lock_step=False).loss)


ENGINES = {
    "ddp": SETTING,
    "checkpointing": replace(SETTING, checkpointing=True),
    "zero2": replace(SETTING, engine="deepspeed", zero_stage=2),
    "fsdp": replace(SETTING, engine="fsdp"),
}


def on_engines(context: RankContext) -> dict[str, Any]:
    return {name: trained(context, setting, {}) for name, setting in ENGINES.items()}


@cache
def alone() -> dict[str, Any]:
    return trained(ONE_PROCESS, SETTING, {})


@pytest.mark.ranks
@pytest.mark.parametrize("world_size", [2, 3])
def test_it_is_one_value_on_any_number_of_ranks_and_every_engine(world_size: int) -> None:
    ranks = run_ranks(on_engines, world_size, timeout_s=120)

    for found in ranks[0].values():
        assert training.worst(alone(), found) <= 1e-6
        assert training.worst(alone(), found, "grad_norm") <= 1e-5
        assert training.apart(alone(), found) <= 2e-6


@pytest.mark.ranks
def test_it_changes_what_is_learned() -> None:
    without = trained(ONE_PROCESS, SETTING, {"router_aux_loss_coef": 0.0})

    assert training.worst(alone(), without) > 1e-2
