"""Causal language models: every token but the first is a target once, sums by hand, blocks and files."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import nn

from dtrain.engine.forward import ForwardOnly
from dtrain.errors import DataError
from dtrain.evaluation import evaluate
from dtrain.models.tokenizer import build_char_tokenizer
from dtrain.schema import Config
from dtrain.task_settings import CausalLm
from dtrain.tasks.causal_lm import CausalLmTask, _blocks, block_starts, prepare_causal_lm
from dtrain.tasks.protocol import Targets
from dtrain.topology import SINGLE
from tests import tiny
from tests.tiny import Table

TOKENIZER = build_char_tokenizer(["abcdef"])


class Says(nn.Module):
    """Logits by position, the same for every row, whatever it is given; keeps what it was given."""

    def __init__(self, logits: list[list[float]]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)
        self.given: dict[str, Any] = {}

    def forward(self, **inputs: Any) -> Any:
        self.given = inputs
        rows, length = inputs["input_ids"].shape
        return SimpleNamespace(logits=self.logits[:length].expand(rows, -1, -1))


def task(*, is_char: bool = False, **splits: list[list[int]]) -> CausalLmTask:
    tables = {split: Table({"input_ids": blocks}) for split, blocks in splits.items()}
    return CausalLmTask(tables, TOKENIZER, max_length=4, is_char=is_char)


def nll(logits: list[float], label: int) -> float:
    return math.log(sum(math.exp(logit) for logit in logits)) - logits[label]


# Blocks


@pytest.mark.parametrize("max_length", [2, 4, 7])
@pytest.mark.parametrize("count", [2, 3, 4, 5, 7, 8, 9, 13, 14, 15, 16, 17])
def test_every_token_but_the_first_is_a_target_once_and_in_order(max_length: int, count: int) -> None:
    ids = list(range(count))

    blocks = _blocks(ids, max_length, origin="a text")["input_ids"]

    assert [token for block in blocks for token in block[1:]] == ids[1:]  # targets
    assert [token for block in blocks for token in block[:-1]] == ids[:-1]  # inputs
    assert all(len(block) == max_length + 1 for block in blocks[:-1])
    assert 2 <= len(blocks[-1]) <= max_length + 1
    assert len(blocks) == len(block_starts(len(ids), max_length)) == -(-(len(ids) - 1) // max_length)


@pytest.mark.parametrize("count", [0, 1])
def test_a_text_without_a_next_token_is_refused(count: int) -> None:
    with pytest.raises(DataError, match=rf"poem.txt holds {count} token\(s\): a next token needs at least two"):
        _blocks([7] * count, 4, origin="poem.txt")


# Batches and sums


def test_full_blocks_need_no_mask_and_a_short_one_is_padded() -> None:
    full = task().collate({"input_ids": [[1, 2, 3, 4, 5], [2, 3, 4, 5, 6]]}, tiny.HERE)
    mixed = task().collate({"input_ids": [[1, 2, 3, 4, 5], [2, 3, 4]]}, tiny.HERE)

    assert set(full) == {"input_ids", "labels"}
    assert full["input_ids"].tolist() == [[1, 2, 3, 4], [2, 3, 4, 5]]
    assert full["labels"].tolist() == [[2, 3, 4, 5], [3, 4, 5, 6]]
    assert mixed["input_ids"].tolist() == [[1, 2, 3, 4], [2, 3, 0, 0]]
    assert mixed["labels"].tolist() == [[2, 3, 4, 5], [3, 4, -100, -100]]
    assert mixed["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert {tensor.dtype for tensor in mixed.values()} == {torch.int64}


def test_a_batch_of_one_short_block_is_as_long_as_that() -> None:
    made = task().collate({"input_ids": [[5, 6]]}, tiny.HERE)

    assert made["input_ids"].tolist() == [[5]]
    assert made["labels"].tolist() == [[6]]


def test_sums_are_over_tokens_and_padding_counts_nothing() -> None:
    logits = [[0.0, 1.0, 2.0, -1.0], [1.0, 0.0, 0.5, 3.0], [0.0, 0.0, 4.0, 0.0]]
    made = task().collate({"input_ids": [[1, 2, 3, 0], [3, 1]]}, tiny.HERE)

    loss = task().loss(Says(logits), made)
    scored = task().score(Says(logits), made, lock_step=False)

    first = nll(logits[0], 2) + nll(logits[1], 3) + nll(logits[2], 0)
    second = nll(logits[0], 1)
    assert float(loss) == pytest.approx(first + second, rel=1e-6)
    assert task().targets(made) == Targets(4.0, 4)
    assert scored.loss.dtype == torch.float64
    assert scored.loss.tolist() == pytest.approx([first, second], rel=1e-6)
    assert scored.targets.tolist() == [3, 1]
    assert scored.prediction is None


def test_the_model_gets_no_labels_and_keeps_no_cache() -> None:
    model = Says([[0.0, 1.0, 2.0, -1.0]] * 3)

    task().loss(model, task().collate({"input_ids": [[1, 2, 3], [3, 1]]}, tiny.HERE))

    assert set(model.given) == {"input_ids", "attention_mask", "use_cache"}
    assert model.given["use_cache"] is False


# Metrics


def test_perplexity_and_bits_are_functions_of_the_exact_loss() -> None:
    found = task(is_char=True).metrics("validation", loss=math.log(8), predictions=[])

    assert found == pytest.approx({"perplexity": 8.0, "bits_per_character": 3.0}, rel=1e-12)
    assert task().metrics("validation", loss=math.log(8), predictions=[]) == pytest.approx({"perplexity": 8.0})


def test_a_hopeless_loss_is_an_infinite_perplexity_and_none_at_all_is_not_a_number() -> None:
    assert task().metrics("validation", loss=1000.0, predictions=[])["perplexity"] == math.inf
    assert task().metrics("validation", loss=math.inf, predictions=[])["perplexity"] == math.inf
    assert math.isnan(task().metrics("validation", loss=math.nan, predictions=[])["perplexity"])


def test_evaluation_weighs_by_tokens_and_not_by_blocks() -> None:
    blocks = [[1, 2, 3, 4, 5], [5, 6, 1, 2, 3], [3, 4]]
    judged = task(is_char=True, validation=blocks)
    model = tiny_gpt(vocabulary=len(TOKENIZER)).double().eval()

    result = evaluate(ForwardOnly(model, Config.model_validate(SETTINGS), SINGLE), judged, micro_batch_size=2)

    losses = []
    for block in blocks:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([block[:-1]])).logits[0]
        losses += (-logits.log_softmax(-1)[range(len(block) - 1), block[1:]]).tolist()
    assert len(losses) == 9
    expected = math.fsum(losses) / 9
    assert result.metrics["loss"] == pytest.approx(expected, rel=1e-12)
    assert result.metrics["perplexity"] == pytest.approx(math.exp(expected), rel=1e-12)
    assert result.metrics["bits_per_character"] == pytest.approx(expected / math.log(2), rel=1e-12)
    assert [record["targets"] for record in result.splits["validation"].records] == [4, 4, 1]


# From files


SETTINGS: dict[str, Any] = {"task": {"name": "causal_lm"}}


def tiny_gpt(*, vocabulary: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=vocabulary, n_layer=1, n_head=2, n_embd=8, n_positions=16)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT2LMHeadModel(config)


def prepare(folder: Path, *, tokenizer: str = "char", max_length: int = 4, **data: Any) -> CausalLmTask:
    config = Config.model_validate(
        {
            **SETTINGS,
            "model": {"from_scratch": True, "tokenizer": tokenizer, "config": {"model_type": "gpt2"}},
            "data": {"path": str(folder), "cache_dir": str(folder / "cache"), "max_length": max_length, **data},
        }
    )
    assert isinstance(config.task, CausalLm)
    return prepare_causal_lm(config, config.task, SINGLE)


def text_of(made: CausalLmTask, split: str) -> str:
    """The stream again, from the blocks."""
    blocks = made.splits[split][list(range(len(made.splits[split])))]["input_ids"]
    ids = [*blocks[0][:1], *(token for block in blocks for token in block[1:])]
    return str(made.tokenizer.decode(ids))


def test_a_text_file_becomes_blocks_from_which_it_can_be_read_again(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("abc\ncab fa\n")
    (tmp_path / "validation.txt").write_text("fab\n")

    made = prepare(tmp_path)

    assert text_of(made, "train") == "abc\ncab fa\n"
    assert text_of(made, "validation") == "fab\n"
    assert [len(block) for block in made.splits["train"][[0, 1, 2]]["input_ids"]] == [5, 5, 3]
    assert made.max_length == 4
    assert made.head_config == {}
    assert set(made.metrics("validation", loss=1.0, predictions=[])) == {"perplexity", "bits_per_character"}


def test_a_character_that_training_never_saw_still_counts_as_one(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("abcabc")
    (tmp_path / "validation.txt").write_text("abxc")

    made = prepare(tmp_path)

    assert len(made.splits["validation"][[0]]["input_ids"][0]) == 4
    assert "bits_per_character" in made.metrics("validation", loss=1.0, predictions=[])


def test_words_have_a_perplexity_but_no_bits_per_character(tmp_path: Path) -> None:
    tiny.tokenizer().save_pretrained(tmp_path / "words")
    (tmp_path / "train.txt").write_text("the cat sees a dog near the bird")

    made = prepare(tmp_path / "train.txt", tokenizer=str(tmp_path / "words"), cache_dir=str(tmp_path / "cache"))

    ids = made.splits["train"][[0, 1]]["input_ids"]
    assert [*ids[0], *ids[1][1:]] == tiny.tokenizer()("the cat sees a dog near the bird")["input_ids"][1:-1]
    assert set(made.metrics("train", loss=1.0, predictions=[])) == {"perplexity"}


def test_rows_are_joined_into_one_stream(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["ab", "c", "de"]}).save_to_disk(str(tmp_path / "saved"))

    made = prepare(tmp_path / "saved", cache_dir=str(tmp_path / "cache"))

    assert text_of(made, "train") == "ab\n\nc\n\nde"


def test_a_split_of_one_character_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("abcabc")
    (tmp_path / "validation.txt").write_text("a")

    with pytest.raises(DataError, match=r"validation.txt holds 1 token\(s\)"):
        prepare(tmp_path)
