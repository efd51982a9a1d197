"""Padding that no layer computes is not counted as computed: in the plan, in the account, and where the model refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel

from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.models.unpadding import prepare_unpadding
from dtrain.training import loop, plan
from dtrain.training.computed_tokens import computed_tokens
from dtrain.training.look_ahead import LookAhead
from dtrain.training.step_time import BatchCounter, WorkCounts
from tests.support import padded_models, tiny, training
from tests.support.training import Setting

SETTING = Setting(rows=21, steps=6, dropout=0.0, table=True)


def trained(setting: Setting) -> tuple[WorkCounts, int, str]:
    """Trains; returns what was counted, the tokens that entered the last layer in the steps, and the plan's line."""
    module, seen = tiny.bert(layers=2, dropout=0.0), [0]
    run = training.build(ONE_PROCESS, setting, module)

    def look(_layer: Any, args: Any, kwargs: Any) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        seen[0] += states.shape[0] * states.shape[1]

    (line,) = plan._padding(run.task, run.prepared, run.settings.plan)
    counter = BatchCounter(run.task, run.prepared)
    batches = loop.batches_ahead(run.settings, run.task, run.engine, start=0)
    run.look_ahead = LookAhead(counter.watch(batches), run.task, run.context)
    if not run.prepared.frozen_cache.replaces_layers:
        module.bert.encoder.layer[1].attention.register_forward_pre_hook(look, with_kwargs=True)
    loop.train(run, [])
    run.look_ahead.close()
    return counter.take(), seen[0], line


@pytest.mark.parametrize("changes", [{}, {"sort_by_length": False}, {"micro_batch_tokens": 40}])
@pytest.mark.parametrize("unpad", ["on", "off"])
def test_what_is_counted_is_what_the_layers_compute(unpad: str, changes: dict[str, Any]) -> None:
    counts, seen, line = trained(replace(SETTING, unpad=unpad, **changes))

    assert counts.steps == 6
    assert counts.computed == seen
    assert counts.tokens < counts.padded
    assert counts.computed == (counts.tokens if unpad == "on" else counts.padded)
    order = "unsorted" if changes.get("sort_by_length") is False else "sorted by length within each step"
    assert line.startswith("padding    ")
    assert f"% of the tokens in the batches ({order}), " in line
    assert line.endswith("% of the computed tokens")
    assert line.endswith(", 0% of the computed tokens") == (unpad == "on")


def test_layers_that_read_frozen_states_compute_their_tokens_and_a_frozen_backbone_none(tmp_path: Path) -> None:
    frozen = ("embeddings", "encoder.layer[0]")
    half = replace(SETTING, freeze=frozen, cache="on", cache_dir=str(tmp_path))

    counts, seen, _ = trained(half)
    assert counts.computed == seen == counts.tokens
    counts, _, line = trained(replace(half, freeze=("bert",)))
    assert (counts.tokens > 0, counts.computed) == (True, 0)
    assert line.endswith("; no layer computes a token (freeze.cache)")


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_call_that_the_model_leaves_padded_is_counted_with_its_padding(kind: str, side: str) -> None:
    model = padded_models.make(kind, AutoModel)
    unpadding = prepare_unpadding(model, SETTING.config().model)
    prepared = replace(training.build(ONE_PROCESS, SETTING).prepared, unpadding=unpadding)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    mask = mask if side == "right" else mask.flip(1)
    batch = {"input_ids": torch.ones(2, 4, dtype=torch.int64), "attention_mask": mask}
    assert unpadding.hooks is not None
    before = unpadding.hooks.packed_calls

    model(**batch)

    is_packed = unpadding.hooks.packed_calls > before
    assert is_packed == (side == "right" or kind == "llama")
    assert computed_tokens(prepared, batch, tokens=6, padded=8) == (6 if is_packed else 8)
