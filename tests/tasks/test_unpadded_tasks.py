"""Each task whose batches are padded trains and evaluates a model without padding as it does with it."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from dtrain.config.task import CausalLm, MaskedLm, QuestionAnswering
from dtrain.data.packing import pack_segments, split_into_segments
from dtrain.data.seeding import DataPosition
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.models.chat_format import TurnsFormat
from dtrain.models.host_copy import to_device
from dtrain.tasks import target_loss
from dtrain.tasks.causal_lm import CausalLmTask
from dtrain.tasks.chat import ChatTask
from dtrain.tasks.masked_lm import MaskedLmTask
from dtrain.tasks.multiple_choice import MultipleChoiceTask
from dtrain.tasks.protocol import Padding
from dtrain.tasks.question_answering import QuestionAnsweringTask, encode_windows
from dtrain.tasks.regression import RegressionTask
from dtrain.tasks.token_classification import TokenClassificationTask, encode_words
from dtrain.training.evaluation import evaluate_split
from tests.support import padded_models, tiny, training
from tests.support.on_meta import Watch
from tests.support.tiny import Table
from tests.support.training import Recorder, Setting, worst

SETTING = Setting(steps=20, dropout=0.0, learning_rate=0.05, rows=24, global_batch_size=8, micro_batch_size=4)
ROWS = 24


def classification() -> Any:
    return training.task(SETTING)


def left_padded() -> Any:
    made = training.task(SETTING)
    made.padding = Padding("left")
    return made


def regression() -> Any:
    rows = Table({"input_ids": _ids(), "label": [float(number % 5) for number in range(ROWS)]})
    return RegressionTask({"train": rows, "validation": rows}, tiny.tokenizer(), max_length=32)


def token_classification() -> Any:
    rng = random.Random(0)
    sentences = [rng.choices(tiny.WORDS, k=rng.randint(1, 12)) for _ in range(ROWS)]
    tags = [[min(tiny.WORDS.index(word) % 4, 2) for word in words] for words in sentences]
    rows = Table({**encode_words(sentences, tiny.tokenizer(), max_length=16), "tags": tags})
    splits = {"train": rows, "validation": rows}
    return TokenClassificationTask(splits, tiny.tokenizer(), ("B-PER", "I-PER", "O"), max_length=16)


def multiple_choice() -> Any:
    rng = random.Random(0)
    ids = [[[2, *rng.choices(range(5, 25), k=rng.randint(2, 9)), 3] for _ in range(3)] for _ in range(ROWS)]
    rows = Table({"input_ids": ids, "label": [number % 3 for number in range(ROWS)]})
    return MultipleChoiceTask({"train": rows, "validation": rows}, tiny.tokenizer(), max_length=16)


def question_answering() -> Any:
    rng = random.Random(0)
    made: dict[str, list[Any]] = {key: [] for key in ("question", "context", "id", "answers", "answer_starts")}
    for index in range(ROWS):
        words = rng.choices(tiny.WORDS, k=rng.randint(3, 24))
        for key, value in zip(made, (words[0], " ".join(words), str(index), [words[0]], [0]), strict=True):
            made[key].append(value)
    rows = Table(encode_windows(made, tiny.tokenizer(), [""] * ROWS, max_length=12, doc_stride=3))
    settings = QuestionAnswering(name="question_answering", doc_stride=3)
    return QuestionAnsweringTask({"train": rows, "validation": rows}, tiny.tokenizer(), settings, max_length=12)


def masked_lm() -> Any:
    rows = Table({"input_ids": _ids()})
    splits = {"train": rows, "validation": rows}
    return MaskedLmTask(splits, tiny.tokenizer(), MaskedLm(name="masked_lm"), max_length=32, seed=7)


def chat() -> Any:
    ids = _ids()
    rows = Table({"input_ids": ids, "is_target": [[0, *[number % 3 > 0 for number in one[1:]]] for one in ids]})
    return ChatTask({"train": rows, "validation": rows}, tiny.tokenizer(), TurnsFormat(tiny.tokenizer()), max_length=24)


def blocks() -> Any:
    """A stream, of which the last block is short, evaluated with a stride."""
    return _language(_ids(), row_length=None, stride=5)


def documents() -> Any:
    return _language(_ids(), row_length=48, packing="documents")


def _language(texts: list[list[int]], *, row_length: int | None, **options: Any) -> Any:
    stream = texts if row_length is not None else [[token for text in texts for token in text]]
    segments = [segment for text in stream for segment in split_into_segments(text, max_length=16, stride=16)]
    rows = Table(pack_segments(segments, row_length=row_length))
    settings = CausalLm(name="causal_lm", **options)
    splits = {"train": rows, "validation": rows}
    return CausalLmTask(splits, tiny.tokenizer(), max_length=row_length or 16, is_char=False, settings=settings)


def _ids() -> list[list[int]]:
    ids: list[list[int]] = tiny.sentences(ROWS)[list(range(ROWS))]["input_ids"]
    return ids


Case = tuple[Callable[[], Any], str, Any, Mapping[str, Any]]

CASES: dict[str, Case] = {
    "classification": (classification, "bert", AutoModelForSequenceClassification, {"num_labels": 2}),
    "left padding": (left_padded, "distilbert", AutoModelForSequenceClassification, {"num_labels": 2}),
    "modernbert": (classification, "modernbert", AutoModelForSequenceClassification, {"num_labels": 2}),
    "roberta": (classification, "roberta", AutoModelForSequenceClassification, {"num_labels": 2}),
    "decoder": (
        classification,
        "qwen2",
        AutoModelForSequenceClassification,
        {"num_labels": 2, "pad_token_id": 0},
    ),
    "regression": (regression, "electra", AutoModelForSequenceClassification, {"num_labels": 1}),
    "token classification": (token_classification, "bert", AutoModelForTokenClassification, {"num_labels": 3}),
    "multiple choice": (multiple_choice, "bert", AutoModelForMultipleChoice, {}),
    "question answering": (question_answering, "distilbert", AutoModelForQuestionAnswering, {"num_labels": 2}),
    "masked language model": (masked_lm, "xlm-roberta", AutoModelForMaskedLM, {}),
    "chat": (chat, "llama", AutoModelForCausalLM, {}),
    "blocks": (blocks, "gpt2", AutoModelForCausalLM, {}),
    "documents, gpt2": (documents, "gpt2", AutoModelForCausalLM, {}),
    "documents, llama": (documents, "llama", AutoModelForCausalLM, {}),
    "documents, opt": (documents, "opt", AutoModelForCausalLM, {}),
}


def trained(name: str, unpad: str) -> dict[str, Any]:
    make_task, kind, auto_class, changes = CASES[name]
    learns = make_task()
    # Positions beyond the longest batch, and the usual weights: large ones make every step a leap.
    model = padded_models.make(kind, auto_class, std=0.08, **changes)
    run, recorder = training.build(ONE_PROCESS, replace(SETTING, unpad=unpad), model, learns), Recorder()
    hooks = run.prepared.unpadding.hooks
    engine = run.go(recorder)
    found = evaluate_split(engine, learns, "validation", micro_batch_size=5)
    engine.release()
    return {
        "steps": recorder.steps,
        "loss": found.metrics["loss"],
        "packed": hooks.packed_calls if hooks is not None else 0,
    }


@pytest.mark.parametrize("name", CASES)
def test_a_task_learns_the_same_without_padding(name: str) -> None:
    padded, unpadded = trained(name, "off"), trained(name, "on")

    assert padded["packed"] == 0
    # Of the blocks only the last one is short. With padding on the left, the head reads the state of padding.
    assert unpadded["packed"] > {"left padding": -1, "blocks": 0}.get(name, 20)
    assert worst(padded, unpadded) <= 1e-5
    assert unpadded["loss"] == pytest.approx(padded["loss"], rel=1e-5)


def test_another_document_in_the_row_changes_no_logit_without_padding() -> None:
    learns = documents()
    model = padded_models.make("llama", AutoModelForCausalLM)
    prepared = training.build(ONE_PROCESS, replace(SETTING, unpad="on"), model, learns).prepared
    batch = learns.collate(learns.splits["train"][[0, 1]], tiny.HERE)
    assert int(batch["document_ids"].max()) > 1, "the row has one document only"
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][batch["document_ids"] == 1] = 9

    with torch.no_grad():
        module = prepared.module.eval()
        before, after = (module(**learns._inputs(module, one)).logits for one in (batch, changed))

    others = batch["document_ids"] > 1
    assert torch.equal(before[others], after[others])
    assert not torch.equal(before[~others], after[~others])


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize(
    "name", [name for name in CASES if name != "left padding"]
)  # its mask is fetched: it is padded
def test_a_loss_without_padding_fetches_nothing_from_the_device(
    name: str, chunked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_task, kind, auto_class, changes = CASES[name]
    learns = make_task()
    model = padded_models.make(kind, auto_class, **changes)
    module = training.build(ONE_PROCESS, replace(SETTING, unpad="on"), model, learns).prepared.module
    target_loss.try_last_layer(module, ONE_PROCESS)
    batch = learns.collate(learns.splits["train"][list(range(6))], DataPosition(0, list(range(6))))
    learns.loss(module, batch)  # a check of the first batch
    if chunked:
        monkeypatch.setattr(target_loss, "MAX_LOGITS", 64)
    # The meta device has no autocast. Rotary positions of transformers turn it off.
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    meta = torch.device("meta")
    module.to(meta).train()

    with Watch(may_wait=False):  # a copy from memory that is not pinned would wait as well
        learns.loss(module, to_device(batch, meta)).backward()

    assert any(parameter.grad is not None for parameter in module.parameters())
    if name in ("chat", "masked language model"):
        with pytest.raises((NotImplementedError, RuntimeError)):
            learns.loss(module, {key: tensor.to(meta) for key, tensor in batch.items()})
