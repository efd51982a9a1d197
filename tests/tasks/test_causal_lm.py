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

from dtrain.config.schema import Config
from dtrain.config.task import CausalLm
from dtrain.data.packing import split_into_segments
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.engine.forward_only import ForwardOnly
from dtrain.errors import ConfigError, DataError
from dtrain.models.tokenizer import build_char_tokenizer
from dtrain.tasks.causal_lm import CausalLmTask, prepare_causal_lm
from dtrain.tasks.documents import document_inputs
from dtrain.tasks.protocol import Targets
from dtrain.training.evaluation import evaluate
from tests.support import tiny
from tests.support.tiny import Table

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


def test_a_batch_is_as_long_as_its_longest_block() -> None:
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
    found = task(is_char=True, validation=[[1, 2]]).metrics("validation", loss=math.log(8), predictions=[])

    assert found == pytest.approx({"perplexity": 8.0, "bits_per_character": 3.0}, rel=1e-12)


def test_a_perplexity_per_word_divides_the_same_sum_by_words() -> None:
    table = Table({"input_ids": [[1, 2, 3, 4, 5], [4, 5, 6]]})
    judged = CausalLmTask({"test": table}, TOKENIZER, max_length=4, is_char=False, words={"test": 3})

    found = judged.metrics("test", loss=0.5, predictions=[])

    assert found == pytest.approx({"perplexity": math.exp(0.5), "word_perplexity": math.exp(6 * 0.5 / 3)}, rel=1e-12)
    assert tuple(judged.metric_names) == ("perplexity", "word_perplexity")


def test_a_huge_loss_has_infinite_perplexity_and_no_targets_give_nan() -> None:
    judged = task(validation=[[1, 2]])

    assert judged.metrics("validation", loss=1000.0, predictions=[])["perplexity"] == math.inf
    assert judged.metrics("validation", loss=math.inf, predictions=[])["perplexity"] == math.inf
    assert math.isnan(judged.metrics("validation", loss=math.nan, predictions=[])["perplexity"])


def test_evaluation_weighs_by_tokens_and_not_by_blocks() -> None:
    blocks = [[1, 2, 3, 4, 5], [5, 6, 1, 2, 3], [3, 4]]
    judged = task(is_char=True, validation=blocks)
    model = tiny_gpt(vocabulary=len(TOKENIZER)).double().eval()

    result = evaluate(ForwardOnly(model, Config.model_validate(SETTINGS), ONE_PROCESS), judged, micro_batch_size=2)

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


def prepare(
    folder: Path, *, tokenizer: str = "char", max_length: int = 4, task: dict[str, Any] | None = None, **data: Any
) -> CausalLmTask:
    config = Config.model_validate(
        {
            "task": {**SETTINGS["task"], **(task or {})},
            "model": {"from_scratch": True, "tokenizer": tokenizer, "config": {"model_type": "gpt2"}},
            "data": {"path": str(folder), "cache_dir": str(folder / "cache"), "max_length": max_length, **data},
        }
    )
    assert isinstance(config.task, CausalLm)
    return prepare_causal_lm(config, config.task, ONE_PROCESS)


def text_of(made: CausalLmTask, split: str) -> str:
    """The stream again, from the blocks."""
    blocks = made.splits[split][list(range(len(made.splits[split])))]["input_ids"]
    ids = [*blocks[0][:1], *(token for block in blocks for token in block[1:])]
    return str(made.tokenizer.decode(ids))


def test_blocks_of_a_text_file_decode_to_the_same_text(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("abc\ncab fa\n")
    (tmp_path / "validation.txt").write_text("fab\n")

    made = prepare(tmp_path)

    assert text_of(made, "train") == "abc\ncab fa\n"
    assert text_of(made, "validation") == "fab\n"
    assert [len(block) for block in made.splits["train"][[0, 1, 2]]["input_ids"]] == [5, 5, 3]
    assert made.max_length == 4
    assert made.head_config == {}
    assert set(made.metrics("validation", loss=1.0, predictions=[])) == {"perplexity", "bits_per_character"}


def test_chinese_text_has_one_token_per_character(tmp_path: Path) -> None:
    text = "\u5929\u5730\u7384\u9ec4\uff0c\u5b87\u5b99\u6d2a\u8352\u3002\n\U00020000\u5929"
    (tmp_path / "train.txt").write_text(text, encoding="utf-8")

    made = prepare(tmp_path)

    assert text_of(made, "train") == text
    assert sum(map(len, made.splits["train"][[0, 1, 2]]["input_ids"])) == len(text) + 2  # blocks overlap by one
    assert "bits_per_character" in made.metric_names


def test_an_unknown_character_is_one_target(tmp_path: Path) -> None:
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
    found = made.metrics("train", loss=1.0, predictions=[])
    assert found == pytest.approx({"perplexity": math.e, "word_perplexity": math.exp(7 / 8)})  # 8 words, 7 targets


def test_rows_are_joined_into_one_stream(tmp_path: Path) -> None:
    Dataset.from_dict({"text": ["ab", "c", "de"]}).save_to_disk(str(tmp_path / "saved"))

    made = prepare(tmp_path / "saved", cache_dir=str(tmp_path / "cache"))

    assert text_of(made, "train") == "ab\n\nc\n\nde"


def test_a_split_of_one_character_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("abcabc")
    (tmp_path / "validation.txt").write_text("a")

    with pytest.raises(DataError, match=r"validation.txt has 1 token\(s\), but a next token needs at least two"):
        prepare(tmp_path)


# Windows


def test_stride_makes_windows_for_evaluation_but_not_for_training(tmp_path: Path) -> None:
    (tmp_path / "train.txt").write_text("abcabcabc")
    (tmp_path / "validation.txt").write_text("abcabcabc")

    made = prepare(tmp_path, task={"stride": 2})

    train, judged = made.splits["train"][[0, 1]], made.splits["validation"][[0, 1, 2]]
    assert (len(made.splits["train"]), train["scored"]) == (2, [[4], [4]])
    assert [len(ids) for ids in judged["input_ids"]] == [5, 5, 5]
    assert judged["scored"] == [[4], [2], [2]]
    batch = made.collate(judged, tiny.HERE)
    assert set(batch) == {"input_ids", "labels"}  # all is seen, so there is no mask
    assert (batch["labels"] != -100).tolist() == [[True] * 4, [False, False, True, True], [False, False, True, True]]
    assert batch["labels"][1, 2:].tolist() == judged["input_ids"][1][3:]


def test_a_window_scores_each_token_with_its_context(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "train.txt").write_text("abc")
    text = "abccbaabcacbbca"
    (tmp_path / "validation.txt").write_text(text)
    made = prepare(tmp_path, task={"stride": 3}, max_length=5)
    ids = made.tokenizer(text)["input_ids"]
    model = tiny_gpt(vocabulary=len(made.tokenizer)).double().eval()

    with caplog.at_level("INFO", logger="dtrain"):
        result = evaluate(ForwardOnly(model, Config.model_validate(SETTINGS), ONE_PROCESS), made, micro_batch_size=2)

    losses = []
    for place in range(1, len(ids)):
        window = max(0, -(-(place - 5) // 3) * 3)  # the first that reaches it
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids[window:place]])).logits[0, -1]
        losses.append(float(-logits.log_softmax(-1)[ids[place]]))
    assert result.metrics["loss"] == pytest.approx(math.fsum(losses) / (len(text) - 1), rel=1e-12)
    assert sum(record["targets"] for record in result.splits["validation"].records) == len(text) - 1
    said = f"(nll {math.fsum(losses):.6f} nats over 14 tokens; rows joined by '\\n\\n', blocks of 5, stride 3, no BOS)"
    assert said in caplog.text


def test_a_stride_longer_than_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match=r"task\.stride=9 skips tokens, .* data\.max_length=8"):
        Config.model_validate({"task": {"name": "causal_lm", "stride": 9}, "data": {"max_length": 8}})


# Documents


DOCUMENTS = ["ab", "cabb", "", "a", "bca", "abcabcabc", "cc"]


def packed(folder: Path, documents: list[str], **settings: Any) -> CausalLmTask:
    rows = {"text": documents}
    Dataset.from_dict(rows).save_to_disk(str(folder / "saved" / "train"))
    Dataset.from_dict(rows).save_to_disk(str(folder / "saved" / "validation"))
    (folder / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "validation"]}')
    options = {"packing": "documents", **settings}
    return prepare(folder / "saved", max_length=6, task=options, cache_dir=str(folder / "cache"))


def test_complete_documents_share_a_block_and_positions_restart(tmp_path: Path) -> None:
    made = packed(tmp_path, DOCUMENTS)

    rows = made.splits["train"][[0, 1, 2]]
    decoded = [made.tokenizer.decode(ids) for ids in rows["input_ids"]]
    # 1 + 3 + 2 inputs; then six of "abcabcabc", whose rest shares a row with "cc". "a" and "" hold no target.
    assert decoded == ["abcabbbca", "abcabca", "abccc"]
    assert rows["lengths"] == [[2, 4, 3], [7], [3, 2]]
    batch = made.collate(rows, tiny.HERE)
    assert batch["document_ids"].tolist() == [[1, 2, 2, 2, 3, 3], [1] * 6, [1, 1, 2, 0, 0, 0]]
    given = document_inputs(batch["document_ids"], torch.float32)
    assert given["position_ids"].tolist() == [[0, 0, 1, 2, 0, 1], [0, 1, 2, 3, 4, 5], [0, 1, 0, 0, 1, 2]]
    sees = (given["attention_mask"][0, 0] == 0).int().tolist()
    assert sees == [
        [1, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_editing_one_document_leaves_the_others_logits_unchanged(tmp_path: Path, attention: str) -> None:
    made = packed(tmp_path, DOCUMENTS)
    model = tiny_gpt(vocabulary=len(made.tokenizer)).eval()
    model.set_attn_implementation(attention)
    batch = made.collate(made.splits["train"][[0]], tiny.HERE)
    edited = {**batch, "input_ids": batch["input_ids"].clone()}
    edited["input_ids"][0, 1:4] = batch["input_ids"][0, 1:4].flip(0) % 3 + 1

    with torch.no_grad():
        before, after = (model(**made._inputs(model, of)).logits[0] for of in (batch, edited))

    is_edited = batch["document_ids"][0] == 2
    assert torch.equal(before[~is_edited], after[~is_edited])
    assert not torch.allclose(before[is_edited], after[is_edited])


@pytest.mark.parametrize("stride", [None, 2])
def test_packed_documents_have_the_loss_of_separate_documents(tmp_path: Path, stride: int | None) -> None:
    made = packed(tmp_path, DOCUMENTS, stride=stride)
    model = tiny_gpt(vocabulary=len(made.tokenizer)).double().eval()

    result = evaluate(ForwardOnly(model, Config.model_validate(SETTINGS), ONE_PROCESS), made, micro_batch_size=2)

    losses = []
    for text in DOCUMENTS:
        ids = made.tokenizer(text)["input_ids"]
        for segment in split_into_segments(ids, max_length=6, stride=stride or 6):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([segment.ids[:-1]])).logits[0].log_softmax(-1)
            places = range(len(segment.ids) - 1 - segment.scored, len(segment.ids) - 1)
            losses += [-float(logits[place, segment.ids[place + 1]]) for place in places]
    assert len(losses) == sum(max(len(text) - 1, 0) for text in DOCUMENTS)
    assert result.metrics["loss"] == pytest.approx(math.fsum(losses) / len(losses), rel=1e-9)


class LooksBack(nn.Module):
    """A model that takes such a mask and does as it likes: each place knows the sum of all before it."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 9)

    def forward(self, input_ids: torch.Tensor, **_others: Any) -> Any:
        return SimpleNamespace(logits=self.table(input_ids).cumsum(dim=1))


class TakesNoMask(nn.Module):
    """A model that knows no positions."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(9, 9)

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        return SimpleNamespace(logits=self.table(input_ids))


class HasAWindow(TakesNoMask):
    """A model whose own mask reaches back three tokens."""

    config = SimpleNamespace(model_type="short", sliding_window=3)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        (LooksBack(), "LooksBack still mixes documents"),
        (TakesNoMask(), "refuses them"),
        (HasAWindow(), "a short model has a sliding window of 3 tokens, less than data.max_length=6"),
    ],
)
def test_a_model_that_cannot_separate_documents_is_refused(tmp_path: Path, model: nn.Module, says: str) -> None:
    made = packed(tmp_path, DOCUMENTS)

    with pytest.raises(ConfigError, match=f"task.packing=documents needs a model.*{says}.*Use task.packing=stream"):
        made.loss(model, made.collate(made.splits["train"][[0]], tiny.HERE))


def test_checking_the_separation_of_documents_keeps_training_modes(tmp_path: Path) -> None:
    made, model = packed(tmp_path, DOCUMENTS), tiny_gpt(vocabulary=9)
    model.train()
    model.transformer.h[0].eval()  # as a frozen module is

    made.loss(model, made.collate(made.splits["train"][[0]], tiny.HERE))

    assert (model.training, model.transformer.h[0].training, model.transformer.h[0].mlp.training) == (
        True,
        False,
        False,
    )


def test_documents_without_a_next_token_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"saved.*has documents of at most one token"):
        packed(tmp_path, ["a", "b"])


# Tokenizers made of the training text


def test_a_tokenizer_is_trained_once_and_kept_with_the_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "train.txt").write_text("the cat sees the bird and the dog\n" * 3)
    first = prepare(tmp_path, tokenizer="train-bpe", max_length=8)

    monkeypatch.setattr("dtrain.models.tokenizer.train_bpe_tokenizer", None)  # a second training would fail
    second = prepare(tmp_path, tokenizer="train-bpe", max_length=8)

    assert first.tokenizer.get_vocab() == second.tokenizer.get_vocab()
    assert text_of(second, "train") == "the cat sees the bird and the dog\n" * 3
    assert len(second.splits["train"][[0]]["input_ids"][0]) == 9
    assert "word_perplexity" in second.metric_names
