"""Chat: targets of all turns or of replies, sums by hand, metrics, files of every format, and a model that comes back."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from dtrain.config.schema import Config
from dtrain.config.task import Chat
from dtrain.console import log
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.engine.forward_only import ForwardOnly
from dtrain.errors import ConfigError, DataError
from dtrain.models.chat_format import TurnsFormat
from dtrain.tasks.chat import ChatTask, prepare_chat
from dtrain.tasks.protocol import IGNORED, Targets
from dtrain.training.evaluation import evaluate
from dtrain.training.export import save
from tests.support import tiny
from tests.support.tiny import Table
from tests.support.tiny_chat import ASKS, CLS, HAO, MA, NI, SEP, VOCABULARY, A, B, gpt, tokenizer


class Says(nn.Module):
    """Logits by position, the same for every row, whatever it is given; keeps what it was given."""

    def __init__(self, logits: Sequence[Sequence[float]]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)
        self.given: dict[str, Any] = {}

    def forward(self, **inputs: Any) -> Any:
        self.given = inputs
        rows, length = inputs["input_ids"].shape
        return SimpleNamespace(logits=self.logits[:length].expand(rows, -1, -1))


def task(**splits: list[tuple[list[int], list[bool]]]) -> ChatTask:
    tables = {
        split: Table({"input_ids": [ids for ids, _ in rows], "is_target": [marks for _, marks in rows]})
        for split, rows in splits.items()
    }
    return ChatTask(tables, tokenizer(), TurnsFormat(tokenizer()), max_length=8)


def nll(logits: Sequence[float], label: int) -> float:
    return math.log(sum(math.exp(logit) for logit in logits)) - logits[label]


# Batches and sums

ROWS = {
    "input_ids": [[CLS, NI, SEP, HAO, SEP], [CLS, A, SEP]],
    "is_target": [[False, False, False, True, True], [False, True, True]],
}


def test_padding_and_tokens_without_loss_are_not_targets() -> None:
    made = task().collate({**ROWS, "is_cut": [False, True]}, tiny.HERE)

    assert made["input_ids"].tolist() == [[CLS, NI, SEP, HAO], [CLS, A, 0, 0]]
    assert made["labels"].tolist() == [[IGNORED, IGNORED, HAO, SEP], [A, SEP, IGNORED, IGNORED]]
    assert made["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert set(made) == {"input_ids", "labels", "attention_mask"}
    assert task().targets(made) == Targets(4.0, 4)


def test_a_batch_of_one_and_a_dialogue_of_one_token_are_batches() -> None:
    one = task().collate({"input_ids": [[CLS, A]], "is_target": [[False, True]]}, tiny.HERE)
    least = task().collate({"input_ids": [[CLS]], "is_target": [[True]]}, tiny.HERE)

    assert {name: tensor.tolist() for name, tensor in one.items()} == {
        "input_ids": [[CLS]],
        "labels": [[A]],
        "attention_mask": [[1]],
    }
    assert task().targets(least) == Targets(0.0, 0)
    assert math.isfinite(task().loss(gpt().eval(), least).item())


def test_the_loss_is_summed_over_targets_and_correct_ones_are_counted() -> None:
    logits = [[0.0] * 10 for _ in range(4)]
    logits[0][A], logits[1][SEP], logits[2][A], logits[3][SEP] = 2.0, -1.0, 1.0, 3.0

    made = task().collate(ROWS, tiny.HERE)
    loss = task().loss(Says(logits), made)
    scored = task().score(Says(logits), made, lock_step=False)

    first, second = nll(logits[2], HAO) + nll(logits[3], SEP), nll(logits[0], A) + nll(logits[1], SEP)
    assert float(loss) == pytest.approx(first + second, rel=1e-6)
    assert scored.loss.dtype == torch.float64
    assert scored.loss.tolist() == pytest.approx([first, second], rel=1e-6)
    assert scored.targets.tolist() == [2, 2]
    assert scored.prediction is not None
    assert scored.prediction.tolist() == [[1, 2], [1, 2]]  # the SEP of the first, the A of the second


def test_the_model_gets_no_labels_and_keeps_no_cache() -> None:
    model = Says([[0.0] * 10] * 4)

    task().loss(model, task().collate(ROWS, tiny.HERE))

    assert set(model.given) == {"input_ids", "attention_mask", "use_cache"}


def test_metrics_are_functions_of_the_exact_loss_and_of_counts() -> None:
    found = task().metrics("validation", loss=math.log(8), predictions=[[1, 2], [0, 3], [0, 0]])

    assert found == pytest.approx({"perplexity": 8.0, "accuracy": 1 / 5}, rel=1e-12)
    assert task().metrics("validation", loss=1000.0, predictions=[[0, 1]])["perplexity"] == math.inf
    assert set(found) == set(task().metric_names)


def test_evaluation_weighs_by_tokens_and_not_by_dialogues() -> None:
    rows = [
        ([CLS, NI, HAO, SEP, A, SEP], [False, False, False, False, True, True]),
        ([CLS, A, SEP, NI, HAO, MA, ASKS, SEP], [False, False, False, True, True, True, True, True]),
        ([CLS, A, B], [False, False, False]),  # cut before its reply: counts in nothing
    ]
    model = gpt().double().eval()

    result = evaluate(
        ForwardOnly(model, Config.model_validate({"task": {"name": "chat"}}), ONE_PROCESS),
        task(validation=rows),
        micro_batch_size=2,
    )

    losses, right = [], 0
    for ids, marks in rows:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0]
        for place in range(1, len(ids)):
            if marks[place]:
                losses.append(-float(logits[place - 1].log_softmax(-1)[ids[place]]))
                right += int(logits[place - 1].argmax()) == ids[place]
    assert len(losses) == 7
    assert result.metrics["loss"] == pytest.approx(math.fsum(losses) / 7, rel=1e-12)
    assert result.metrics["accuracy"] == right / 7
    assert [record["targets"] for record in result.splits["validation"].records] == [2, 5, 0]


# From files


def write(
    folder: Path, text: str = "\u4f60 \u597d\ta\n\u4f60 \u597d \u5417 \uff1f\t\u597d\tb\n", name: str = "train.txt"
) -> None:
    (folder / name).write_text(text, encoding="utf-8")
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n", encoding="utf-8")


def prepare(
    folder: Path,
    *,
    max_length: int = 16,
    data: Mapping[str, Any] | None = None,
    tokenizer: str | None = None,
    **task: Any,
) -> ChatTask:
    config = Config.model_validate(
        {
            "task": {"name": "chat", **task},
            "model": {
                "from_scratch": True,
                "tokenizer": tokenizer or str(folder / "vocab.txt"),
                "config": {"model_type": "gpt2"},
            },
            "data": {"path": str(folder), "cache_dir": str(folder / "cache"), "max_length": max_length, **(data or {})},
        }
    )
    assert isinstance(config.task, Chat)
    return prepare_chat(config, config.task, ONE_PROCESS)


def rows_of(made: ChatTask, split: str = "train") -> list[tuple[list[int], list[bool]]]:
    rows = made.splits[split][list(range(len(made.splits[split])))]
    return list(zip(rows["input_ids"], rows["is_target"], strict=True))


def test_a_file_of_dialogues_and_a_vocabulary_become_turns(tmp_path: Path) -> None:
    write(tmp_path)

    made = prepare(tmp_path)

    assert [ids for ids, _ in rows_of(made)] == [
        [CLS, NI, HAO, SEP, A, SEP],
        [CLS, NI, HAO, MA, ASKS, SEP, HAO, SEP, B, SEP],
    ]
    assert made.head_config == {"bos_token_id": CLS, "eos_token_id": SEP, "pad_token_id": 0}
    assert made.head.name == "causal_lm"


def test_loss_on_replies_has_only_replies_as_targets(tmp_path: Path) -> None:
    write(tmp_path)

    every, replies = prepare(tmp_path), prepare(tmp_path, loss_on="replies")

    assert [sum(marks) for _, marks in rows_of(every)] == [5, 9]
    learnt = [[token for token, mark in zip(*row, strict=True) if mark] for row in rows_of(replies)]
    assert learnt == [[A, SEP], [HAO, SEP]]  # the third turn is the user's again


def test_messages_are_encoded_by_the_template_and_refused_ones_are_named_by_line(tmp_path: Path) -> None:
    made = tokenizer()
    made.chat_template = (
        "{% for m in messages %}[CLS]{% if m.content == 'b' %}{{ raise_exception('no b') }}{% endif %}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}[SEP]{% endgeneration %}"
        "{% else %}{{ m.content }}[SEP]{% endif %}{% endfor %}"
    )
    made.save_pretrained(tmp_path / "words")
    good = {"messages": [{"role": "user", "content": "\u4f60"}, {"role": "assistant", "content": "\u597d"}]}
    bad = {"messages": [{"role": "user", "content": "b"}, {"role": "assistant", "content": "a"}]}
    file = tmp_path / "rows.jsonl"
    options = {"tokenizer": str(tmp_path / "words"), "loss_on": "replies"}
    data = {"path": str(file), "cache_dir": str(tmp_path / "cache")}

    file.write_text(json.dumps(good))
    found = prepare(tmp_path, data=data, **options)  # type: ignore[arg-type]
    file.write_text(json.dumps(good) + "\n" + json.dumps(bad))

    assert rows_of(found) == [([CLS, NI, SEP, CLS, HAO, SEP], [False, False, False, False, True, True])]
    assert found.head_config == {}
    with pytest.raises(DataError, match=r"rows\.jsonl, line 2: the tokenizer's chat template rejects this .*: no b"):
        prepare(tmp_path, data=data, **options)  # type: ignore[arg-type]


def test_every_start_says_how_many_dialogues_were_cut_and_which_had_no_target_left(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "propagate", True)
    write(tmp_path, "\u4f60 \u597d\ta\n\u4f60 \u597d \u5417 \uff1f \uff1f\t\u597d\tb\na\tb\tb\tb\n")

    with pytest.raises(
        DataError,
        match=r"train\.txt, line 2: a dialogue without a target: the first data\.max_length=6 of its 11 tokens have no "
        r"target\. Set data\.max_length=11, or skip such rows with data\.max_bad_rows$",
    ):
        prepare(tmp_path, max_length=6, loss_on="replies")
    for _ in range(2):  # the second start reads what the first one kept
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="dtrain"):
            made = prepare(tmp_path, max_length=6, loss_on="replies", data={"max_bad_rows": 1})
        assert "train: skipped 1 bad row(s)" in caplog.text
        assert (
            "train: 1 of 2 texts (50.0 %) have more than data.max_length=6 tokens and are cut there; data.max_length=9 "
            "keeps all" in caplog.text
        )
    assert [ids for ids, _ in rows_of(made)] == [[CLS, NI, HAO, SEP, A, SEP], [CLS, A, SEP, B, SEP]]


def test_if_no_dialogue_has_a_target_the_run_is_refused_and_all_are_counted(tmp_path: Path) -> None:
    write(tmp_path, "a b a b\ta\n\u4f60 \u597d \u5417 \uff1f\ta\n")

    with pytest.raises(
        DataError, match=r"no rows that can be used.*The first of 2: .*line 1: a dialogue without a target"
    ):
        prepare(tmp_path, max_length=4, loss_on="replies", data={"max_bad_rows": 9})


def test_a_dialogue_of_one_turn_has_targets_but_no_reply(tmp_path: Path) -> None:
    write(tmp_path, "a\n\nb\na\n")

    assert [ids for ids, _ in rows_of(prepare(tmp_path))] == [[CLS, A, SEP], [CLS, B, SEP, A, SEP]]
    with pytest.raises(DataError, match=r"train\.txt, line 1: a dialogue without a reply"):
        prepare(tmp_path, loss_on="replies")


def test_a_tokenizer_that_cannot_write_dialogues_is_refused(tmp_path: Path) -> None:
    write(tmp_path)

    with pytest.raises(ConfigError, match=r"the tokenizer has no \[CLS\], \[SEP\], \[PAD\]"):
        prepare(tmp_path, tokenizer="char")
    with pytest.raises(ConfigError, match=r"task\.format=template: the tokenizer has no chat template"):
        prepare(tmp_path, format="template")


def test_an_exported_model_gives_the_same_logits_and_stops_where_a_turn_ends(tmp_path: Path) -> None:
    from transformers import BertTokenizerFast, GPT2LMHeadModel

    model = gpt().eval()
    save(model, {name: value.detach() for name, value in model.named_parameters()}, tokenizer(), tmp_path / "model")

    again = GPT2LMHeadModel.from_pretrained(tmp_path / "model").eval()
    words = BertTokenizerFast.from_pretrained(tmp_path / "model")

    ids = torch.tensor([[CLS, NI, HAO, SEP]])
    with torch.no_grad():
        assert float((again(ids).logits - model(ids).logits).abs().max()) <= 1e-6
    assert again.config.eos_token_id == again.generation_config.eos_token_id == SEP
    assert words("\u4f60 \u597d")["input_ids"] == [CLS, NI, HAO, SEP]


def test_a_dialogue_that_the_template_refuses_is_a_bad_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "propagate", True)
    caplog.set_level(logging.INFO, logger="dtrain")
    made = tokenizer()
    made.chat_template = (
        "{% for m in messages %}{% if m.content == 'b' %}{{ raise_exception('no b') }}{% endif %}{{ m.content }}[SEP]"
        "{% endfor %}"
    )
    made.save_pretrained(tmp_path / "words")
    turns = [["a", "a"], ["b", "a"], ["a"]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"turns": each}) + "\n" for each in turns))
    data = {"path": str(tmp_path / "rows.jsonl"), "cache_dir": str(tmp_path / "cache"), "max_bad_rows": 1}

    for _ in range(2):  # the second start reads what the first one kept
        found = prepare(tmp_path, data=data, tokenizer=str(tmp_path / "words"))  # type: ignore[arg-type]

    assert len(found.splits["train"]) == 2
    assert sum("rows.jsonl, line 2: the tokenizer's chat template rejects" in text for text in caplog.messages) == 1
    assert caplog.messages.count("data: train: skipped 1 bad row(s), as data.max_bad_rows allows") == 2
