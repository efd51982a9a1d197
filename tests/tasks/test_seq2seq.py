"""Seq2seq: batches, sums held against a hand's arithmetic, generated tokens, data from files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sacrebleu
import torch
from torch import nn

from dtrain.config.schema import Config
from dtrain.config.task import Seq2Seq
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.engine.forward_only import ForwardOnly
from dtrain.errors import ConfigError, DataError
from dtrain.tasks.protocol import Targets
from dtrain.tasks.seq2seq import Seq2SeqTask, prepare_seq2seq
from dtrain.training.evaluation import evaluate, evaluate_split, metric_names
from tests.support import tiny
from tests.support.tiny_seq2seq import BEGIN, END, PAD, config, task, text_of, translated, write_tsv

VOCABULARY = 25


class Says(nn.Module):
    """Answers token t of the decoder's inputs with logits that favour t + 1 by t / 10, and writes given rows."""

    def __init__(self, written: Sequence[Sequence[int]] = (), dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.written, self.dtype = written, dtype
        self.config = SimpleNamespace(decoder_start_token_id=PAD, pad_token_id=PAD)
        self.calls: list[dict[str, Any]] = []

    def forward(self, *, input_ids: Any, attention_mask: Any, decoder_input_ids: torch.Tensor, use_cache: bool) -> Any:
        assert not use_cache
        one_hot = nn.functional.one_hot((decoder_input_ids + 1) % VOCABULARY, VOCABULARY)
        return SimpleNamespace(logits=(one_hot * decoder_input_ids[..., None] / 10).to(self.dtype))

    def generate(self, **how: Any) -> torch.Tensor:
        self.calls.append(how)
        rows = len(how["input_ids"])
        written = [torch.tensor([PAD, *row]) for row in self.written[:rows]]
        return nn.utils.rnn.pad_sequence(written, batch_first=True)


def nll(labels: Sequence[int]) -> float:
    """Of the tokens by hand: each is asked for after the one before it, the first after the pad token."""
    found = []
    for before, label in zip([PAD, *labels], labels, strict=False):
        favoured = before / 10
        total = math.log(math.exp(favoured) + VOCABULARY - 1)
        found.append(total - (favoured if label == before + 1 else 0.0))
    return math.fsum(found)


TARGETS = [[7, 8, END], [9, END], [10, 11, 12, 20, END]]


def rows(targets: Sequence[list[int] | None] = TARGETS) -> dict[str, list[Any]]:
    sources = [[BEGIN, 5, END], [BEGIN, 6, 7, 8, END], [BEGIN, END]]
    return {
        "input_ids": sources[: len(targets)],
        "labels": list(targets),
        "reference": [None if ids is None else "text" for ids in targets],
    }


def made(**settings: Any) -> Seq2SeqTask:
    return task(3, **settings)


# Batches


def test_sources_are_padded_with_the_pad_token_and_targets_with_the_ignored_label() -> None:
    batch = made().collate(rows(), tiny.HERE)

    assert batch["input_ids"].tolist() == [
        [BEGIN, 5, END, PAD, PAD],
        [BEGIN, 6, 7, 8, END],
        [BEGIN, END, PAD, PAD, PAD],
    ]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[7, 8, END, -100, -100], [9, END, -100, -100, -100], [10, 11, 12, 20, END]]
    assert set(batch) == {"input_ids", "attention_mask", "labels"}
    assert made().targets(batch) == Targets(10.0, 10)


def test_examples_without_a_target_have_no_targets() -> None:
    batch = made().collate(rows([None, None]), tiny.HERE)
    scored = made().score(Says([[7, END], [8, END]]), batch, lock_step=False)

    assert batch["labels"].tolist() == [[-100], [-100]]
    assert made().targets(batch) == Targets(0.0, 0)
    assert (scored.loss.tolist(), scored.targets.tolist()) == ([0.0, 0.0], [0, 0])
    assert scored.prediction is not None


class WithoutRuleForNothing(Says):
    """As mBART, whose decoder begins with a row's last token, which a row without targets does not have."""

    def prepare_decoder_input_ids_from_labels(self, labels: torch.Tensor) -> torch.Tensor:
        raise IndexError


def test_a_split_without_targets_needs_no_decoder_inputs() -> None:
    scored = made().score(WithoutRuleForNothing([[7, END]]), made().collate(rows([None]), tiny.HERE), lock_step=False)

    assert scored.loss.tolist() == [0.0]


# Sums


def test_the_loss_is_the_sum_over_the_tokens_of_the_targets() -> None:
    loss = made().loss(Says(), made().collate(rows(), tiny.HERE))

    assert float(loss) == pytest.approx(sum(map(nll, TARGETS)), rel=1e-6)


def test_a_score_is_a_plain_sum_per_example_without_padding() -> None:
    together = made().score(Says(TARGETS), made().collate(rows(), tiny.HERE), lock_step=False)

    assert together.loss.dtype == torch.float64
    assert together.loss.tolist() == pytest.approx(list(map(nll, TARGETS)), rel=1e-6)
    assert together.targets.tolist() == [3, 2, 5]
    for index, target in enumerate(TARGETS):
        one = {name: [values[index]] for name, values in rows().items()}
        alone = made().score(Says([target]), made().collate(one, tiny.HERE), lock_step=False)
        assert float(alone.loss) == pytest.approx(float(together.loss[index]), rel=1e-6)


def test_label_smoothing_is_for_training_only() -> None:
    batch = made().collate(rows(), tiny.HERE)
    smooth = made(label_smoothing=0.2)

    logits = Says()(
        input_ids=None, attention_mask=None, decoder_input_ids=torch.tensor([[PAD, 7, 8]]), use_cache=False
    ).logits[0]
    spread = float(-logits.log_softmax(dim=-1).mean(dim=-1).sum())
    loss = smooth.loss(Says(), smooth.collate(rows(TARGETS[:1]), tiny.HERE))

    assert float(loss) == pytest.approx(0.8 * nll(TARGETS[0]) + 0.2 * spread, rel=1e-6)
    plain = smooth.score(Says(TARGETS), batch, lock_step=False)
    assert plain.loss.tolist() == pytest.approx(list(map(nll, TARGETS)), rel=1e-6)


@pytest.mark.parametrize(
    ("given", "summed"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_sums_are_taken_in_float32_and_float64_stays(given: torch.dtype, summed: torch.dtype) -> None:
    assert made().loss(Says(dtype=given), made().collate(rows(), tiny.HERE)).dtype == summed


# Generated texts


def test_generated_texts_end_with_the_end_token_and_have_a_fixed_length() -> None:
    judge = made(evaluation={"max_new_tokens": 6})
    written = [[BEGIN, 7, END, 9, 9], [7, 8, 9, 10, 11], [END, 5, END, 5, 5]]  # what stands behind an end is noise

    scored = judge.score(Says(written), judge.collate(rows(), tiny.HERE), lock_step=False)

    assert scored.prediction is not None
    assert scored.prediction.tolist() == [[BEGIN, 7, END, 0, 0, 0], [7, 8, 9, 10, 11, 0], [END, 0, 0, 0, 0, 0]]


@pytest.mark.parametrize("lock_step", [False, True])
def test_generation_options_override_every_default(lock_step: bool) -> None:
    model = Says(TARGETS)

    made(evaluation={"num_beams": 4}).score(model, made().collate(rows(), tiny.HERE), lock_step=lock_step)

    how = model.calls[0]
    assert (how["max_new_tokens"], how["max_length"], how["num_beams"], how["do_sample"]) == (12, None, 4, False)
    assert how["synced_gpus"] == lock_step
    assert "forced_bos_token_id" not in how


def test_without_generation_there_is_only_a_loss() -> None:
    silent, model = made(evaluation={"generate": False}), Says()

    result = evaluate_split(ForwardOnly(model, config(), ONE_PROCESS), silent, "validation", micro_batch_size=2)

    assert set(result.metrics) == {"loss"}
    assert model.calls == []
    assert metric_names(silent) == ["loss"]
    assert [record["prediction"] for record in result.records] == [None] * 3
    assert all(record["reference"] for record in result.records)


class Translates(Says):
    """Writes the right translation of most sources, and stops early on the others."""

    def generate(self, **how: Any) -> torch.Tensor:
        rows = []
        for ids in how["input_ids"].tolist():
            words = [token - len(tiny.SPECIAL) for token in ids if token >= len(tiny.SPECIAL)]
            right = [len(tiny.SPECIAL) + word for word in translated(words)]
            rows.append(torch.tensor([PAD, BEGIN, *(right if sum(words) % 3 else right[:-2]), END]))
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)


@pytest.mark.parametrize(("number", "size"), [(23, 4), (5, 4), (1, 4)])
def test_metrics_are_those_of_the_written_records_in_data_order(number: int, size: int) -> None:
    judge = task(number)

    result = evaluate_split(
        ForwardOnly(Translates(), config(), ONE_PROCESS), judge, "validation", micro_batch_size=size
    )

    texts = [record["prediction"] for record in result.records]
    references = judge.splits["validation"][[*range(number)]]["reference"]
    assert [record["reference"] for record in result.records] == references
    assert result.metrics["bleu"] == pytest.approx(sacrebleu.corpus_bleu(texts, [references]).score, abs=1e-12)
    assert result.metrics["chrf"] == pytest.approx(sacrebleu.corpus_chrf(texts, [references]).score, abs=1e-12)
    right = [text == reference for text, reference in zip(texts, references, strict=True)]
    assert result.metrics["exact_match"] == pytest.approx(sum(right) / number, abs=1e-12)
    lengths = [len(text.split()) + 2 for text in texts]  # with what begins and what ends it
    assert result.metrics["generated_length"] == pytest.approx(sum(lengths) / number, abs=1e-12)
    assert set(result.metrics) == {"loss", *judge.metric_names}


def test_a_text_without_an_end_token_has_its_full_length() -> None:
    judge = task(1, evaluation={"max_new_tokens": 4})
    endless = ForwardOnly(Says([[7, 8, 9, 10]]), config(), ONE_PROCESS)

    result = evaluate_split(endless, judge, "validation", micro_batch_size=2)

    assert result.metrics["generated_length"] == 4.0


def test_a_text_that_ends_with_the_models_own_end_token_is_as_long_as_it_is() -> None:
    """The config of a model may name other end tokens than the tokenizer; `generate` pads after any of them."""
    judge = made(evaluation={"max_new_tokens": 6})

    assert [judge._length(ids) for ids in ([7, 8, 9, 0, 0, 0], [7, END, 0, 0, 0, 0], [7] * 6, [0] * 6)] == [3, 2, 6, 0]


def test_summaries_have_rouge_metrics() -> None:
    judge = task(3, metric="summarization")

    result = evaluate_split(ForwardOnly(Translates(), config(), ONE_PROCESS), judge, "validation", micro_batch_size=2)

    assert {"rouge_1", "rouge_2", "rouge_l", "rouge_lsum"} < set(result.metrics)
    assert "bleu" not in result.metrics


# Settings


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"source": "en"}, "task.source and task.target belong together: set task.target as well"),
        (
            {"target_lang": "ro_RO"},
            "task.source_lang and task.target_lang belong together: set task.source_lang as well",
        ),
        ({"source": "en", "target": "en"}, "task.source and task.target are both en"),
    ],
)
def test_contradicting_settings_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        config(**settings)


def test_generation_for_another_task_is_refused() -> None:
    with pytest.raises(ValueError, match=r"evaluation.generate: task.name=causal_lm generates no texts: remove it"):
        Config.model_validate({"task": {"name": "causal_lm"}, "evaluation": {"generate": True}})


# From files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Pairs, and a vocabulary file."""
    words = [*tiny.SPECIAL, *tiny.WORDS, "say", ":"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n", encoding="utf-8")
    write_tsv(tmp_path / "train.tsv", 5, seed=1)
    write_tsv(tmp_path / "validation.tsv", 3, seed=2)
    return tmp_path


def prepare(folder: Path, data: dict[str, Any] | None = None, **sections: Any) -> Seq2SeqTask:
    settings = Config.model_validate(
        {
            "task": {"name": "seq2seq", **sections.pop("task", {})},
            "data": {"path": str(folder), "cache_dir": str(folder / "cache"), **(data or {})},
            "model": {"tokenizer": str(folder / "vocab.txt"), **sections.pop("model", {})},
            **sections,
        }
    )
    assert isinstance(settings.task, Seq2Seq)
    return prepare_seq2seq(settings, settings.task, ONE_PROCESS)


def test_pairs_of_a_file_become_ids_with_the_prefix_and_references(folder: Path) -> None:
    (folder / "train.tsv").write_text("source\ttarget\nthe cat\tA Dog  runs\n")

    row = prepare(folder, task={"prefix": "say: "}).splits["train"][[0]]

    ids = {word: number for number, word in enumerate([*tiny.SPECIAL, *tiny.WORDS, "say", ":"])}
    assert row["input_ids"] == [[BEGIN, *(ids[word] for word in ("say", ":", "the", "cat")), END]]
    assert row["labels"] == [[BEGIN, *(ids[word] for word in ("a", "dog", "runs")), END]]
    assert row["reference"] == ["A Dog  runs"]


def test_a_multilingual_tokenizer_encodes_each_side_in_its_language(folder: Path) -> None:
    from transformers import MBartTokenizer

    MBartTokenizer(vocab=[(piece, 0.0) for piece in ("<s>", "<pad>", "</s>", "<unk>", "\u2581a")]).save_pretrained(
        folder / "mbart"
    )
    (folder / "train.tsv").write_text("source\ttarget\na\ta a\n")
    languages = {"source_lang": "en_XX", "target_lang": "ro_RO"}

    judge = prepare(folder, model={"tokenizer": str(folder / "mbart")}, task=languages, evaluation={"generate": True})

    row, number = judge.splits["train"][[0]], judge.tokenizer.convert_tokens_to_ids
    assert row["input_ids"] == [[4, 2, number("en_XX")]]
    assert row["labels"] == [[4, 4, 2, number("ro_RO")]]
    model = Says([[4, 2]])
    judge.score(model, judge.collate({**row, "labels": [None]}, tiny.HERE), lock_step=False)
    assert model.calls[0]["decoder_start_token_id"] == number("ro_RO")
    assert (judge.tokenizer.src_lang, judge.tokenizer.tgt_lang) == ("en_XX", "ro_RO")


def test_long_sources_and_targets_are_truncated_by_their_settings(folder: Path) -> None:
    long = " ".join(tiny.WORDS[:10])
    (folder / "train.tsv").write_text(f"source\ttarget\n{long}\t{long}\n")

    row = prepare(folder, data={"max_length": 6}, task={"max_target_length": 4}).splits["train"][[0]]

    assert (len(row["input_ids"][0]), len(row["labels"][0])) == (6, 4)
    assert row["input_ids"][0][-1] == row["labels"][0][-1] == END
    assert row["reference"] == [long]  # what is judged is not cut


def test_a_changed_prefix_changes_the_cache_key_and_a_changed_metric_does_not(folder: Path) -> None:
    prepare(folder)
    first = set((folder / "cache").rglob("*.arrow"))

    prepare(folder, task={"metric": "summarization", "label_smoothing": 0.1})
    assert set((folder / "cache").rglob("*.arrow")) == first
    prepare(folder, task={"prefix": "say: "})
    assert set((folder / "cache").rglob("*.arrow")) > first


def test_a_split_without_targets_is_generated_without_metrics(folder: Path) -> None:
    (folder / "test.jsonl").write_text(json.dumps({"source": "the cat runs"}) + "\n")
    splits = {"train": "train.tsv", "validation": "validation.tsv", "test": "test.jsonl"}

    judge = prepare(folder, data={"splits": splits}, evaluation={"generate": True})
    result = evaluate(ForwardOnly(Translates(), config(), ONE_PROCESS), judge, micro_batch_size=4)

    assert set(result.metrics) == {"loss", *judge.metric_names}
    assert result.splits["test"].metrics == {}
    (record,) = result.splits["test"].records
    words = [tiny.WORDS.index(word) for word in ("the", "cat", "runs")]
    assert record["prediction"] in (text_of(translated(words)), text_of(translated(words)[:-2]))
    assert record["reference"] is None


def test_a_bad_row_is_named_by_file_and_line(folder: Path) -> None:
    (folder / "train.tsv").write_text("source\ttarget\nthe cat\ta dog\nthe cat\n")

    with pytest.raises(DataError, match=r"train.tsv, line 3: 1 columns where the header names 2"):
        prepare(folder)


def test_a_character_tokenizer_is_refused_because_it_has_no_end_token(folder: Path) -> None:
    with pytest.raises(ConfigError, match="adds no end token to a target"):
        prepare(folder, model={"tokenizer": "char"})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (
            {"task": {"max_target_length": 17}},
            "task.max_target_length=17, but the model's decoder has positions for 16",
        ),
        (
            {"task": {"max_target_length": 16}, "evaluation": {"generate": True, "max_new_tokens": 20}},
            "evaluation.max_new_tokens=20, but .* positions for 16 tokens only. Set evaluation.max_new_tokens=16",
        ),
    ],
)
def test_targets_beyond_the_decoders_positions_are_refused(folder: Path, settings: dict[str, Any], says: str) -> None:
    model = {"from_scratch": True, "config": {"model_type": "bart", "max_position_embeddings": 16}}

    with pytest.raises(ConfigError, match=says):
        prepare(folder, model=model, **settings)
