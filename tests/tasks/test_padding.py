"""Batches padded from Arrow's buffers equal those that the tokenizer pads, for tokenizers, sides, lengths and tasks."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import datasets
import pytest
import torch
from datasets import Features, List, Value

from dtrain.config.task import CausalLm, Classification, MaskedLm, QuestionAnswering
from dtrain.data.columns import ColumnRows, ListColumn
from dtrain.data.seeding import DataPosition
from dtrain.tasks import tensors
from dtrain.tasks.causal_lm import CausalLmTask
from dtrain.tasks.chat import ChatTask
from dtrain.tasks.classification import ClassificationTask
from dtrain.tasks.masked_lm import MaskedLmTask
from dtrain.tasks.multiple_choice import MultipleChoiceTask
from dtrain.tasks.protocol import Padding
from dtrain.tasks.question_answering import QuestionAnsweringTask
from dtrain.tasks.tensors import pad_rows
from dtrain.tasks.token_classification import NO_TOKEN, TokenClassificationTask
from tests.support import tiny, tiny_chat, tiny_seq2seq
from tests.support.tiny import Table

INTS = List(Value("int32"))
NESTED = List(INTS)


def tokenizers() -> dict[str, Any]:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import BertTokenizer, PreTrainedTokenizerFast

    vocabulary = {f"t{number}": number for number in range(30)}

    def words(**options: Any) -> Any:
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="t0")), **options)

    left = words(pad_token="t7", padding_side="left")
    types = words(pad_token="t29", model_input_names=["input_ids", "token_type_ids"])
    types._pad_token_type_id = 3  # as XLNet's
    other_name = words(pad_token="t2", model_input_names=["input_values", "attention_mask"])
    return {"bert": BertTokenizer(vocab=vocabulary), "left": left, "types": types, "other name": other_name}


def columns(*names: str, rows: int, seed: int) -> dict[str, list[list[int]]]:
    draws = random.Random(seed)
    lengths = [draws.choice([1, 2, 5, 11]) for _ in range(rows)]
    lengths[0] = 0  # a row without tokens is padding alone
    lengths[-1] = 12
    return {name: [[draws.randrange(2, 25) for _ in range(length)] for length in lengths] for name in names}


def arrow(values: Mapping[str, Any], kinds: Mapping[str, Any]) -> ColumnRows:
    return ColumnRows(datasets.Dataset.from_dict(dict(values), features=Features(dict(kinds))))


def assert_same_batch(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name].nan_to_num(-7.0), tensor.nan_to_num(-7.0)), name
        assert found[name].is_contiguous()


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("length", [None, 12, 17])
@pytest.mark.parametrize("name", ["bert", "left", "types", "other name"])
def test_padding_from_buffers_is_the_tokenizers(
    name: str, length: int | None, side: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, padding = tokenizers()[name], Padding(side, length)
    ids = tokenizer.model_input_names[0]
    monkeypatch.setattr(tensors, "_pad_by_tokenizer", refuse)
    for seed, others in enumerate(
        [(), ("token_type_ids",), ("special_tokens_mask", "token_type_ids"), ("attention_mask",)]
    ):
        values = columns(ids, *others, rows=6, seed=seed)
        expected = dict(
            tokenizer.pad(
                {name: list(rows) for name, rows in values.items()},
                padding=True if length is None else "max_length",
                max_length=length,
                padding_side=side,
                return_attention_mask=True,
                return_tensors="pt",
            )
        )

        found = pad_rows(tokenizer, arrow(values, dict.fromkeys(values, INTS))[list(range(6))], padding)

        assert_same_batch(found, expected)


def refuse(*_arguments: Any) -> Any:
    raise AssertionError("the tokenizer padded the batch")


def test_what_the_tokenizer_has_to_do_or_to_refuse_is_left_to_it() -> None:
    bert, padding = tiny.tokenizer(), Padding()
    values = {"input_ids": [[2, 5, 3], [2, 3]], "other": [[1, 1, 1], [2, 2, 2]]}
    rows = arrow(values, dict.fromkeys(values, INTS))[[0, 1]]

    assert pad_rows(bert, rows, padding)["other"].tolist() == [[1, 1, 1], [2, 2, 2]]
    with pytest.raises(ValueError, match="truncation"):
        pad_rows(bert, {"input_ids": rows["input_ids"]}, Padding("right", 2))  # a row is longer
    with pytest.raises(ValueError, match="input_ids"):
        pad_rows(bert, {"token_type_ids": rows["input_ids"]}, padding)
    bert.pad_token = None
    with pytest.raises(ValueError, match="padding token"):
        pad_rows(bert, {"input_ids": rows["input_ids"]}, padding)


def test_a_tokenizer_with_padding_of_its_own_keeps_it() -> None:
    from transformers import BertTokenizer

    class Own(BertTokenizer):  # type: ignore[misc]
        def _pad(self, *arguments: Any, **options: Any) -> Any:
            padded = super()._pad(*arguments, **options)
            return {**padded, "rows": [len(padded["input_ids"])]}

    tokenizer = Own(vocab={"[PAD]": 0, "a": 1})

    batch = pad_rows(tokenizer, arrow({"input_ids": [[1], [1, 1]]}, {"input_ids": INTS})[[0, 1]], Padding())

    assert batch["rows"].tolist() == [[2], [2]]


def test_lists_that_a_users_task_gives_are_padded_as_before() -> None:
    batch = pad_rows(tiny.tokenizer(), {"input_ids": [[2, 5, 3], [2, 3]]}, Padding())

    assert batch["input_ids"].tolist() == [[2, 5, 3], [2, 3, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


# Tasks: the batch from buffers is the batch from lists.

IDS = [[2, 5, 6, 7, 3], [2, 3], [2, 9, 3], [2, 8, 8, 3]]
LABEL = Value("int64")


def classification() -> tuple[Any, dict[str, Any], dict[str, Any]]:
    rows = {
        "input_ids": IDS,
        "token_type_ids": [[0] * len(ids) for ids in IDS],
        "label": [0, 1, None, 1],
        "line": list("abcd"),
    }
    options = Classification(name="classification")
    task = ClassificationTask({"train": Table(rows)}, tiny.tokenizer(), ("no", "yes"), options, max_length=8)
    return (
        task,
        rows,
        {"input_ids": INTS, "token_type_ids": List(Value("int8")), "label": LABEL, "line": Value("string")},
    )


def multiple_choice() -> tuple[Any, dict[str, Any], dict[str, Any]]:
    rows = {"input_ids": [[ids, [2, 3]] for ids in IDS], "label": [0, None, 1, 1]}
    return (
        MultipleChoiceTask({"train": Table(rows)}, tiny.tokenizer(), max_length=8),
        rows,
        {"input_ids": NESTED, "label": LABEL},
    )


def token_classification() -> tuple[Any, dict[str, Any], dict[str, Any]]:
    rows = {
        "input_ids": IDS,
        "places": [[1, 2, 3], [NO_TOKEN], [1], [1, NO_TOKEN, 2]],
        "tags": [[0, 1, 1], [0], None, [1, 1, 0]],
    }
    task = TokenClassificationTask({"train": Table(rows)}, tiny.tokenizer(), ("O", "B-X"), max_length=8)
    return task, rows, dict.fromkeys(rows, INTS)


def question_answering() -> tuple[Any, dict[str, Any], dict[str, Any]]:
    rows: dict[str, Any] = {
        "input_ids": [[ids, [2, 3]] for ids in IDS],
        "offset_starts": [[[-1, *range(len(ids) - 1)], [-1, -1]] for ids in IDS],
        "offset_ends": [[[-1, *range(1, len(ids))], [-1, -1]] for ids in IDS],
        "start_positions": [[1, 0], [None, None], [2, 0], [0, 0]],
        "end_positions": [[2, 0], [None, None], [2, 0], [0, 0]],
        "context": list("abcd"),
    }
    options = QuestionAnswering(name="question_answering")
    task = QuestionAnsweringTask({"train": Table(rows)}, tiny.tokenizer(), options, max_length=8)
    kinds = {name: NESTED if name in ("input_ids", "offset_starts", "offset_ends") else INTS for name in rows}
    return task, rows, {**kinds, "context": Value("string")}


def masked_lm(whole_word: bool) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    rows = {"input_ids": IDS, "word_ids": [[-1, *range(len(ids) - 2), -1] for ids in IDS]}
    options = MaskedLm(name="masked_lm", whole_word=whole_word)
    return (
        MaskedLmTask({"train": Table(rows)}, tiny.tokenizer(), options, max_length=8, seed=1),
        rows,
        dict.fromkeys(rows, INTS),
    )


def causal_lm(packing: bool) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    rows: dict[str, Any] = {"input_ids": IDS}
    if packing:
        rows = {"input_ids": IDS, "lengths": [[3, 2], [2], [3], [2, 2]], "scored": [[2, 1], [1], [1], [1, 1]]}
    options = CausalLm(name="causal_lm", packing="documents") if packing else None
    task = CausalLmTask({"train": Table(rows)}, tiny.tokenizer(), settings=options, max_length=8, is_char=False)
    return task, rows, dict.fromkeys(rows, INTS)


def chat() -> tuple[Any, dict[str, Any], dict[str, Any]]:
    from dtrain.models.chat_format import TurnsFormat

    rows = {"input_ids": IDS, "is_target": [[index % 2 == 1 for index, _ in enumerate(ids)] for ids in IDS]}
    tokenizer = tiny_chat.tokenizer()
    task = ChatTask({"train": Table(rows)}, tokenizer, TurnsFormat(tokenizer), max_length=8)
    return task, rows, {"input_ids": INTS, "is_target": List(Value("bool"))}


def seq2seq() -> tuple[Any, dict[str, Any], dict[str, Any]]:
    rows = {"input_ids": IDS, "labels": [[5, 3], None, [], [6, 7, 8, 3]], "reference": list("abcd")}
    return tiny_seq2seq.task(4), rows, {"input_ids": INTS, "labels": INTS, "reference": Value("string")}


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(make, id=name)
        for name, make in {
            "classification": classification,
            "multiple choice": multiple_choice,
            "tokens": token_classification,
            "questions": question_answering,
            "masked": lambda: masked_lm(False),
            "masked words": lambda: masked_lm(True),
            "causal": lambda: causal_lm(False),
            "causal documents": lambda: causal_lm(True),
            "chat": chat,
            "seq2seq": seq2seq,
        }.items()
    ],
)
def test_a_tasks_batch_from_buffers_is_its_batch_from_lists(make: Any) -> None:
    task, rows, kinds = make()
    fast = arrow(rows, kinds)
    for indices in ([0, 1, 2, 3], [3, 1], [0]):
        position = DataPosition(2, indices)

        found = task.collate(fast[indices], position)

        assert isinstance(fast[indices]["input_ids"], ListColumn)
        assert_same_batch(found, task.collate(Table(rows)[indices], position))
