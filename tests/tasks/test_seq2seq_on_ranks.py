"""Seq2seq on several ranks: the steps, the generated tokens and the metrics of one process, sharded or not.

23 rows in micro-batches of 4, which 2 and 3 ranks do not divide, and 3 rows in one, so that all ranks but one have none.
Texts of different lengths end at different steps, so that under ZeRO 3 a rank has to go on for the others.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sacrebleu
import torch

from dtrain.distributed.rank_context import ONE_PROCESS, RankContext
from dtrain.engine.build import build_engine, place
from dtrain.engine.forward_only import Forward, ForwardOnly
from dtrain.engine.sharded_tensor import is_sharded
from dtrain.training.evaluation import evaluate_split
from dtrain.training.export import export_model
from tests.support import tiny_seq2seq, training
from tests.support.multirank import run_ranks
from tests.support.training import Recorder, Setting

pytestmark = pytest.mark.ranks

SETTING = Setting(steps=4, learning_rate=0.2, warmup=0)


def measured(forward: Forward, rows: int, **evaluation: Any) -> dict[str, Any]:
    task = tiny_seq2seq.task(rows, evaluation=evaluation)
    found = evaluate_split(forward, task, "validation", micro_batch_size=4)
    return {"metrics": dict(found.metrics), "records": [dict(record) for record in found.records]}


def both_ways(forward: Forward) -> dict[str, Any]:
    """Greedy and beams; greedy where ranks have no micro-batch."""
    return {
        f"{rows}/{beams}": measured(forward, rows, num_beams=beams, max_new_tokens=6)
        for rows, beams in ((23, 1), (23, 3), (3, 1))
    }


def trained(context: RankContext, setting: Setting, folder: str | None = None) -> dict[str, Any]:
    """Collective. A few steps of training, then the model is measured and, where a folder is given, exported."""
    run = training.build(context, setting, tiny_seq2seq.t5(dropout=0.1, loud=1.0), tiny_seq2seq.task(3))
    recorder = Recorder()
    engine = run.go(recorder)
    if folder is not None:
        export_model(engine, run.task.tokenizer, Path(folder) / "model")
    return {"steps": recorder.steps, "measured": measured(engine, 23, max_new_tokens=6)}


def evaluated(context: RankContext, stage: int | str | None) -> dict[str, Any]:
    """Collective. The untrained model, plain or in shards: of a ZeRO stage or of FSDP2."""
    if stage is None:
        return {"measured": both_ways(ForwardOnly(tiny_seq2seq.t5(), SETTING.config(), context)), "shards": True}
    if stage == "fsdp":
        config = replace(SETTING, engine="fsdp").config()
        engine = build_engine(place(tiny_seq2seq.t5(), config, context), config, context)
        return {"measured": both_ways(engine), "shards": all(map(is_sharded, engine.module.parameters()))}
    assert isinstance(stage, int)
    setting = replace(SETTING, engine="deepspeed", zero_stage=stage)
    module = tiny_seq2seq.t5()
    engine = build_engine(module, setting.config(), context)
    shards = [parameter.ds_tensor.numel() < parameter.ds_numel for parameter in module.parameters()]
    return {"measured": both_ways(engine), "shards": all(shards)}


@cache
def alone() -> dict[str, Any]:
    return evaluated(ONE_PROCESS, None)


def texts(found: dict[str, Any]) -> list[str]:
    return [record["prediction"] for record in found["records"]]


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_generate_the_tokens_of_one_process(world_size: int) -> None:
    for found in run_ranks(evaluated, world_size, None):
        assert found == alone()


def test_the_texts_that_are_compared_differ_and_end_at_different_steps() -> None:
    greedy, beams = (alone()["measured"][f"23/{number}"] for number in (1, 3))

    assert len(set(texts(greedy))) > 10
    assert len({len(text.split()) for text in texts(greedy)}) > 3
    assert texts(greedy) != texts(beams)
    assert greedy["metrics"]["bleu"] > 0.0


@pytest.mark.parametrize("stage", [3, "fsdp"])
def test_a_sharded_model_generates_the_same_tokens_with_an_idle_rank(stage: int | str) -> None:
    for rank in run_ranks(evaluated, 2, stage, timeout_s=120):
        assert rank["shards"]
        for name, expected in alone()["measured"].items():
            found = rank["measured"][name]
            assert texts(found) == texts(expected)
            assert found["metrics"] == pytest.approx(expected["metrics"], rel=1e-6)


@pytest.fixture(scope="module")
def of_one(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A training run on one process, and the folder it exported to."""
    folder = tmp_path_factory.mktemp("one")
    return run_ranks(trained, 1, SETTING, str(folder))[0], folder


@pytest.mark.parametrize(
    ("world_size", "changed"),
    [(2, {}), (3, {}), (2, {"engine": "deepspeed", "zero_stage": 3}), (2, {"engine": "fsdp"})],
    ids=["ddp-2", "ddp-3", "zero3-2", "fsdp-2"],
)
def test_ranks_train_and_evaluate_like_one_process(
    world_size: int, changed: dict[str, Any], of_one: tuple[dict[str, Any], Path]
) -> None:
    expected, _ = of_one

    found = run_ranks(trained, world_size, replace(SETTING, **changed), timeout_s=120)[0]

    assert [step["targets"] for step in found["steps"]] == [step["targets"] for step in expected["steps"]]
    assert training.worst(expected, found) < 1e-6
    assert training.worst(expected, found, "grad_norm") < 1e-5
    assert texts(found["measured"]) == texts(expected["measured"])
    assert found["measured"]["metrics"] == pytest.approx(expected["measured"]["metrics"], rel=1e-6)


def test_a_gradient_that_is_off_by_a_ten_thousandth_is_rejected(of_one: tuple[dict[str, Any], Path]) -> None:
    found = run_ranks(trained, 2, replace(SETTING, broken="scaled_gradient", max_grad_norm=None))[0]

    assert training.worst(of_one[0], found) > 1e-6


def test_the_exported_model_generates_the_same_texts_in_plain_transformers(
    of_one: tuple[dict[str, Any], Path],
) -> None:
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

    expected, folder = of_one
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    task = tiny_seq2seq.task(23)
    rows = task.splits["validation"][[*range(23)]]

    written, losses = [], []
    with torch.no_grad():
        for ids, labels in zip(rows["input_ids"], rows["labels"], strict=True):  # one at a time: no padding
            source, target = torch.tensor([ids]), torch.tensor([labels])
            made = model.generate(input_ids=source, max_new_tokens=6, do_sample=False)[0]
            written.append(tokenizer.decode(made, skip_special_tokens=True).strip())
            losses.append(float(model(input_ids=source, labels=target).loss) * len(labels))

    found = expected["measured"]
    assert written == texts(found)
    assert losses == pytest.approx([record["loss"] for record in found["records"]], rel=1e-5)
    references = [record["reference"] for record in found["records"]]
    assert found["metrics"]["bleu"] == pytest.approx(sacrebleu.corpus_bleu(written, [references]).score, abs=1e-12)
