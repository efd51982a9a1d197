"""Masked language models: what is hidden and how often, where the draw belongs, sums by hand, rows from files."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from sklearn.metrics import accuracy_score
from torch import nn

from dtrain.config.schema import Config
from dtrain.config.task import MaskedLm
from dtrain.data.batches import evaluation_batches
from dtrain.data.seeding import DataPosition
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.errors import ConfigError, DataError
from dtrain.models.tokenizer import build_char_tokenizer, train_bpe_tokenizer
from dtrain.tasks.masked_lm import MaskedLmTask, prepare_masked_lm
from dtrain.tasks.protocol import IGNORED, Targets
from tests.support import tiny

CLS, SEP, MASK = 2, 3, 4
ROWS = tiny.sentences(40, seed=3)


class Says(nn.Module):
    """The same logits at every place."""

    def __init__(self, logits: Sequence[float]) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def task(*, seed: int = 0, splits: Any = None, tokenizer: Any = None, **settings: Any) -> MaskedLmTask:
    options = MaskedLm(name="masked_lm", **settings)
    splits = splits or {"train": ROWS, "validation": ROWS}
    return MaskedLmTask(splits, tokenizer or tiny.tokenizer(), options, max_length=24, seed=seed)


def collate(judge: MaskedLmTask, indices: Sequence[int], epoch: int = 0) -> dict[str, torch.Tensor]:
    return judge.collate(ROWS[list(indices)], DataPosition(epoch, list(indices)))


def row_of(batch: dict[str, torch.Tensor], row: int) -> tuple[list[int], list[int]]:
    """Inputs and labels of an example without its padding."""
    seen = batch["attention_mask"][row].bool()
    return batch["input_ids"][row][seen].tolist(), batch["labels"][row][seen].tolist()


# What is hidden


def test_labels_are_the_masked_tokens_and_other_tokens_are_unchanged() -> None:
    batch = collate(task(), range(40))

    for row, ids in enumerate(ROWS[list(range(40))]["input_ids"]):
        shown, wanted = row_of(batch, row)
        assert len(shown) == len(ids)
        for token, seen, label in zip(ids, shown, wanted, strict=True):
            assert label in (IGNORED, token)
            assert label != IGNORED or seen == token
        assert (shown[0], shown[-1], wanted[0], wanted[-1]) == (CLS, SEP, IGNORED, IGNORED)
    assert (batch["labels"][batch["attention_mask"] == 0] == IGNORED).all()


def test_80_percent_of_targets_are_masked_10_replaced_and_10_unchanged() -> None:
    length, rows = 200, 300
    ids = [[CLS, *(5 + place % 20 for place in range(length)), SEP]] * rows
    batch = task().collate({"input_ids": ids}, DataPosition(0, range(rows)))

    wanted = batch["labels"] != IGNORED
    shown, truth = batch["input_ids"][wanted], batch["labels"][wanted]
    others = shown[(shown != MASK) & (shown != truth)]
    total = len(truth)
    assert total / (length * rows) == pytest.approx(0.15, abs=0.005)  # 3.4 standard deviations
    assert int((shown == MASK).sum()) / total == pytest.approx(0.8, abs=0.015)
    # Another token drawn is the same one in 1 of 20 cases.
    assert len(others) / total == pytest.approx(0.1 * 19 / 20, abs=0.012)
    assert int((shown == truth).sum()) / total == pytest.approx(0.1 + 0.1 / 20, abs=0.012)
    assert int(others.min()) >= 5
    assert len(set(others.tolist())) == 20


def test_every_example_has_a_target_unless_all_tokens_are_special() -> None:
    judge = task(mask_probability=1e-9)

    batch = judge.collate({"input_ids": [[CLS, 7, SEP], [CLS, SEP], [CLS, 8, 9, SEP]]}, DataPosition(0, [0, 1, 2]))

    assert (batch["labels"] != IGNORED).sum(dim=1).tolist() == [1, 0, 1]
    assert judge.targets(batch) == Targets(2.0, 2)


def test_probability_one_masks_every_token_that_is_not_special() -> None:
    batch = collate(task(mask_probability=1.0), [0])

    shown, wanted = row_of(batch, 0)
    assert [IGNORED, *ROWS[[0]]["input_ids"][0][1:-1], IGNORED] == wanted
    assert MASK in shown


def test_whole_word_masks_all_tokens_of_a_word() -> None:
    words = [[-1, *(place // 3 for place in range(60)), -1]] * 20
    ids = [[CLS, *(5 + place % 20 for place in range(60)), SEP]] * 20
    rows = {"input_ids": ids, "word_ids": words}

    labels = task(whole_word=True).collate(rows, DataPosition(0, range(20)))["labels"]

    hidden = (labels[:, 1:-1] != IGNORED).view(20, 20, 3)  # example, word, token
    assert torch.equal(hidden.any(dim=2), hidden.all(dim=2))
    assert 0 < int(hidden.any(dim=2).sum()) < 200
    by_token = task().collate({"input_ids": ids}, DataPosition(0, range(20)))["labels"]
    hidden = (by_token[:, 1:-1] != IGNORED).view(20, 20, 3)
    assert not torch.equal(hidden.any(dim=2), hidden.all(dim=2))


# Where the draw belongs


def test_a_mask_does_not_depend_on_the_batch() -> None:
    together = collate(task(), range(40), epoch=2)

    for number, index in enumerate(range(40)):
        alone = collate(task(), [index], epoch=2)
        assert row_of(alone, 0) == row_of(together, number)
    backwards = collate(task(), [*reversed(range(40))], epoch=2)
    assert row_of(backwards, 0) == row_of(together, 39)


def test_a_mask_depends_on_epoch_seed_and_example() -> None:
    base = row_of(collate(task(), [5]), 0)

    assert row_of(collate(task(), [5], epoch=1), 0) != base
    assert row_of(collate(task(seed=1), [5]), 0) != base
    rows = {"input_ids": [ROWS[[5]]["input_ids"][0]] * 2}
    twins = task().collate(rows, DataPosition(0, [5, 6]))
    assert row_of(twins, 0) == base
    assert row_of(twins, 1) != base


def test_every_evaluation_has_the_same_masks() -> None:
    batches = evaluation_batches(ROWS, task().collate, ONE_PROCESS, micro_batch_size=16, lock_step=False, workers=0)

    found = [row_of(batch.tensors, row) for batch in batches for row in range(len(batch.example_index))]

    assert found == [row_of(collate(task(), [index]), 0) for index in range(40)]


def test_left_padding_changes_no_target() -> None:
    tokenizer = tiny.tokenizer()
    tokenizer.padding_side = "left"

    left, right = collate(task(tokenizer=tokenizer), range(6)), collate(task(), range(6))

    assert [row_of(left, row) for row in range(6)] == [row_of(right, row) for row in range(6)]


# Sums and metrics


def test_the_loss_is_summed_over_masked_tokens() -> None:
    logits = np.linspace(-1.0, 2.0, 25).tolist()
    norm = math.log(sum(map(math.exp, logits)))
    batch = collate(task(), range(7))

    loss = task().loss(Says(logits), batch)
    scored = task().score(Says(logits), batch, lock_step=False)

    nll = [sum(norm - logits[label] for label in row_of(batch, row)[1] if label != IGNORED) for row in range(7)]
    counts = [sum(label != IGNORED for label in row_of(batch, row)[1]) for row in range(7)]
    assert float(loss) == pytest.approx(sum(nll), rel=1e-6)
    assert scored.loss.dtype == torch.float64
    assert scored.loss.tolist() == pytest.approx(nll, rel=1e-6)
    assert scored.targets.tolist() == counts
    assert task().targets(batch).count == sum(counts)


def test_accuracy_over_masked_tokens_is_that_of_scikit_learn() -> None:
    logits = [0.0] * 25
    logits[6] = 1.0  # guesses token 6 everywhere
    judge, batch = task(), collate(task(), range(40))

    scored = judge.score(Says(logits), batch, lock_step=False)
    assert scored.prediction is not None
    found = judge.metrics("validation", loss=math.log(8), predictions=scored.prediction.tolist())

    truth = batch["labels"][batch["labels"] != IGNORED].tolist()
    assert found == pytest.approx({"accuracy": accuracy_score(truth, [6] * len(truth)), "perplexity": 8.0}, rel=1e-12)
    assert found["accuracy"] > 0
    records = judge.records("validation", scored.prediction.tolist())
    assert sum(record["correct"] for record in records) == truth.count(6)
    assert len(records) == 40


def test_a_batch_without_targets_has_loss_zero_with_a_gradient() -> None:
    model = Says([0.0] * 25)
    model.logits = nn.Parameter(model.logits)  # type: ignore[assignment]

    batch = task().collate({"input_ids": [[CLS, SEP]]}, DataPosition(0, [0]))
    loss = task().loss(model, batch)

    assert (float(loss.detach()), loss.requires_grad) == (0.0, True)
    assert task().score(model, batch, lock_step=False).loss.tolist() == [0.0]


# From files


def prepare(folder: Path, *, max_length: int = 6, tokenizer: Any = None, **task: Any) -> MaskedLmTask:
    (tokenizer or tiny.tokenizer()).save_pretrained(folder / "tokens")
    config = Config.model_validate(
        {
            "task": {"name": "masked_lm", **task},
            "model": {"from_scratch": True, "tokenizer": str(folder / "tokens"), "config": {"model_type": "bert"}},
            "data": {"path": str(folder / "data"), "cache_dir": str(folder / "cache"), "max_length": max_length},
        }
    )
    assert isinstance(config.task, MaskedLm)
    return prepare_masked_lm(config, config.task, ONE_PROCESS)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Rows of 3, 9, 0 and 1 words."""
    texts = ["the cat runs", "a dog sees the bird near the old cat", "", "sleeps"]
    Dataset.from_dict({"text": texts}).save_to_disk(str(tmp_path / "data"))
    return tmp_path


def test_a_row_is_an_example_and_a_long_row_several(folder: Path) -> None:
    made = prepare(folder)

    examples = made.splits["train"][list(range(len(made.splits["train"])))]["input_ids"]
    words = [made.tokenizer.decode(ids[1:-1]) for ids in examples]
    assert words == ["the cat runs", "a dog sees the", "bird near the old", "cat", "sleeps"]
    assert all((ids[0], ids[-1]) == (CLS, SEP) for ids in examples)


def test_a_complete_text_is_cut_into_examples_without_losing_tokens(tmp_path: Path) -> None:
    text = " ".join(tiny.WORDS * 3)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.txt").write_text(text)

    made = prepare(tmp_path, max_length=10)

    examples = made.splits["train"][list(range(len(made.splits["train"])))]["input_ids"]
    assert [len(ids) for ids in examples] == [10] * 7 + [6]
    assert " ".join(made.tokenizer.decode(ids[1:-1]) for ids in examples) == text


def test_word_ids_come_from_the_tokenizer(folder: Path) -> None:
    tokenizer = train_bpe_tokenizer(["the cat"], vocab_size=260, pad=True)  # hardly a merge: words of several tokens

    rows = prepare(folder, tokenizer=tokenizer, whole_word=True).splits["train"][[0, 1]]

    assert len(rows["input_ids"][0]) == len(rows["word_ids"][0]) == 6
    assert rows["word_ids"][0] == sorted(rows["word_ids"][0])
    assert 1 < len(set(rows["word_ids"][0])) < 6


def test_a_tokenizer_without_a_mask_token_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="needs a tokenizer with a mask token"):
        prepare(folder, tokenizer=build_char_tokenizer(["abc"], pad=True))


def test_a_length_without_room_for_text_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"data\.max_length=2 leaves no room for text besides 2 special tokens"):
        prepare(folder, max_length=2)


def test_whole_words_need_a_fast_tokenizer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.BertTokenizerFast.is_fast", False)

    with pytest.raises(ConfigError, match=r"task\.whole_word=true needs a fast tokenizer"):
        prepare(folder, whole_word=True)


def test_a_slow_tokenizer_cuts_long_rows_like_a_fast_one() -> None:
    from dtrain.tasks.masked_lm import _examples

    class Slow:
        is_fast = False

        def num_special_tokens_to_add(self) -> int:
            return 2

        def __call__(self, text: str, **_options: Any) -> dict[str, list[int]]:
            return {"input_ids": tiny.tokenizer()(text, add_special_tokens=False)["input_ids"]}

        def build_inputs_with_special_tokens(self, ids: list[int]) -> list[int]:
            return [CLS, *ids, SEP]

    texts = ["the cat runs", "a dog sees the bird near the old cat"]

    slow, fast = ([ids for ids, _, _ in _examples(texts, of, 6)] for of in (Slow(), tiny.tokenizer()))

    assert slow == fast


def test_a_split_of_empty_rows_is_refused(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["", " "]}).save_to_disk(str(tmp_path / "data"))

    with pytest.raises(DataError, match="only special tokens, and no token that can be masked"):
        prepare(tmp_path)
