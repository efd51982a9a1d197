"""Token classification: which token carries a word's tag, sums by hand, entities as seqeval counts them, CoNLL's files."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score
from torch import nn

from dtrain.config.schema import Config, Data
from dtrain.config.task import TokenClassification
from dtrain.data.sources import Source, load_sources
from dtrain.data.token_tags import TAGGED
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.errors import ConfigError, DataError
from dtrain.tasks.protocol import Targets
from dtrain.tasks.token_classification import TokenClassificationTask, encode_words, prepare_token_classification
from tests.support import tiny
from tests.support.tiny import Table

LABELS = ("B-LOC", "B-PER", "I-LOC", "I-PER", "O")
CONLL = "-DOCSTART- -X- O\n\nthe DT O\ncat NN B-PER\nruns VB I-PER\n\n\na DT O\ndog\tNN\tB-PER\r\n"


def word_pieces() -> Any:
    """A tokenizer that cuts "unsees" into three tokens and drops a lone control character."""
    from transformers import BertTokenizerFast

    words = [*tiny.SPECIAL, "un", "##see", "##s", "cat", "dog"]
    return BertTokenizerFast(vocab={word: number for number, word in enumerate(words)})


def task(
    sentences: Sequence[Sequence[str]] = (("unsees", "cat"), ("dog",)),
    tags: Sequence[Sequence[int] | None] = ((1, 4), (0,)),
    labels: Sequence[str] = LABELS,
    **options: int,
) -> TokenClassificationTask:
    limits = {"max_length": 8, **options}
    table = Table({**encode_words(sentences, word_pieces(), **limits), "tags": list(tags)})
    return TokenClassificationTask({"train": table, "validation": table}, word_pieces(), labels, **limits)


def batch(made: TokenClassificationTask) -> dict[str, torch.Tensor]:
    rows = made.splits["train"]
    return made.collate(rows[list(range(len(rows)))], tiny.HERE)


class Says(nn.Module):
    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, **inputs: torch.Tensor) -> Any:
        assert set(inputs) <= {"input_ids", "attention_mask", "token_type_ids"}
        return SimpleNamespace(logits=self.logits)


def random_logits(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def nll(row: torch.Tensor, label: int) -> float:
    return math.log(sum(math.exp(value) for value in row.tolist())) - float(row[label])


# Words and tokens


def test_the_first_token_of_a_word_carries_its_tag() -> None:
    made = batch(task())

    assert made["input_ids"].tolist() == [[2, 5, 6, 7, 8, 3], [2, 9, 3, 0, 0, 0]]
    assert made["labels"].tolist() == [[-100, 1, -100, -100, 4, -100], [-100, 0, -100, -100, -100, -100]]
    assert task().targets(made) == Targets(3.0, 3)
    assert set(made) == {"input_ids", "attention_mask", "token_type_ids", "labels"}


def test_truncated_words_and_words_without_a_token_have_no_place() -> None:
    encoded = encode_words([["cat", "\x01", "unsees", "dog", "cat"]], word_pieces(), max_length=6)

    assert encoded["input_ids"] == [[2, 8, 5, 6, 7, 3]]
    assert encoded["places"] == [[1, -1, 2, -1, -1]]


def test_padding_is_on_the_right() -> None:
    left = task()
    left.tokenizer.padding_side = "left"

    made = batch(left)

    assert made["input_ids"][1].tolist() == [2, 9, 3, 0, 0, 0]


def test_a_byte_level_tokenizer_gets_a_space_before_each_word() -> None:
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import RobertaTokenizerFast

    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>", *sorted(ByteLevel.alphabet()), "\u0120a", "\u0120b"]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    roberta = RobertaTokenizerFast(vocab=vocabulary, merges=[("\u0120", "a"), ("\u0120", "b")])

    encoded = encode_words([["ac", "b"]], roberta, max_length=8)

    assert roberta.convert_ids_to_tokens(encoded["input_ids"][0]) == ["<s>", "\u0120a", "c", "\u0120b", "</s>"]
    assert encoded["places"] == [[1, 3]]


# Sums


def test_the_loss_is_summed_over_words() -> None:
    made, logits = task(), random_logits(2, 6, 5)

    loss = made.loss(Says(logits), batch(made))

    assert float(loss) == pytest.approx(nll(logits[0, 1], 1) + nll(logits[0, 4], 4) + nll(logits[1, 1], 0), rel=1e-6)
    assert made.loss(Says(logits.bfloat16()), batch(made)).dtype == torch.float32


def test_scores_are_per_sentence_and_predictions_have_a_fixed_width() -> None:
    made, logits = task(), random_logits(2, 6, 5)

    scored = made.score(Says(logits), batch(made), lock_step=False)

    assert scored.loss.dtype == torch.float64
    assert scored.loss.tolist() == pytest.approx([nll(logits[0, 1], 1) + nll(logits[0, 4], 4), nll(logits[1, 1], 0)])
    assert scored.targets.tolist() == [2, 1]
    assert scored.prediction is not None
    guesses = logits.argmax(dim=-1).tolist()
    assert scored.prediction.tolist() == [[*guesses[0], -100, -100], [*guesses[1][:3], *[-100] * 5]]


def test_a_sentence_without_tags_is_predicted_but_not_in_the_metrics() -> None:
    made = task([["unsees", "cat"], ["dog"]], [None, None])

    assert made.targets(batch(made)) == Targets(0.0, 0)
    assert made.records("validation", [[4, 1, 4, 4, 3], [4, 0, 4]]) == [
        {"prediction": ["B-PER", "I-PER"], "reference": None},
        {"prediction": ["B-LOC"], "reference": None},
    ]
    assert made.metrics("validation", loss=0.0, predictions=[[4] * 6, [4] * 6]) == {}


# Metrics


def metrics(truth: Sequence[Sequence[str]], found: Sequence[Sequence[str]]) -> tuple[dict[str, float], dict[str, Any]]:
    """Of sentences of cats, and what seqeval gives of the records that are written."""
    made = task([["cat"] * len(tags) for tags in truth], [[LABELS.index(tag) for tag in tags] for tags in truth])
    predictions = [[-100, *(LABELS.index(tag) for tag in tags), -100] for tags in found]
    records = made.records("validation", predictions)
    written = ([record["reference"] for record in records], [record["prediction"] for record in records])
    expected = {"accuracy": accuracy_score(*written)}
    for name, score in (("f1", f1_score), ("precision", precision_score), ("recall", recall_score)):
        expected[name] = score(*written, zero_division=0)
    return made.metrics("validation", loss=0.0, predictions=predictions), expected


def test_an_entity_counts_only_if_all_of_it_is_correct() -> None:
    # Wanted: PER in words 1-2, LOC in word 4, LOC in word 1 of the second. Found: half of the first, the second, PER.
    truth = [["B-PER", "I-PER", "O", "B-LOC"], ["B-LOC"]]
    found, expected = metrics(truth, [["B-PER", "O", "O", "B-LOC"], ["B-PER"]])

    assert found == pytest.approx({"precision": 1 / 3, "recall": 1 / 3, "f1": 1 / 3, "accuracy": 3 / 5}, abs=1e-12)
    assert found == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("truth", "found"),
    [
        ([["O", "O"]], [["O", "O"]]),
        ([["O", "O"]], [["B-PER", "O"]]),
        ([["B-PER", "I-PER"]], [["O", "O"]]),
        ([["B-PER", "I-PER", "B-PER"]], [["I-PER", "I-PER", "B-PER"]]),  # an inside that begins an entity
        ([["B-LOC"], ["I-LOC"]], [["B-LOC"], ["I-LOC"]]),  # sentences are not joined
    ],
)
def test_degenerate_metrics_are_those_of_seqeval(
    truth: list[list[str]], found: list[list[str]], recwarn: pytest.WarningsRecorder
) -> None:
    result, expected = metrics(truth, found)

    assert result == pytest.approx(expected, abs=1e-12)
    assert not recwarn.list


def test_words_without_a_token_have_no_prediction() -> None:
    made = task([["cat", "\x01", "dog"]], [[1, 0, 4]])

    found = made.metrics("validation", loss=0.0, predictions=[[-100, 1, 4, -100]])

    assert made.records("validation", [[-100, 1, 4, -100]]) == [
        {"prediction": ["B-PER", None, "O"], "reference": ["B-PER", "B-LOC", "O"]}
    ]
    assert found == {"f1": 1.0, "precision": 1.0, "recall": 1.0, "accuracy": 1.0}


def test_tags_that_are_not_entities_have_only_accuracy() -> None:
    made = task(labels=("NN", "DT", "VB", "JJ", "O"))

    assert made.metric_names == ("accuracy",)
    assert made.metrics("validation", loss=0.0, predictions=[[9, 1, 9, 9, 0], [9, 0]]) == {"accuracy": 2 / 3}


# From files


def write(folder: Path, **splits: str) -> Path:
    for split, text in splits.items():
        (folder / f"{split}.conll").write_bytes(text.encode())
    return folder


def load(folder: Path, **data: Any) -> dict[str, Source]:
    return load_sources(Data.model_validate({"path": str(folder), **data}), TAGGED)


@pytest.mark.parametrize("suffix", ["conll", "txt"])
def test_sentences_of_a_text_end_at_empty_lines(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"train.{suffix}").write_bytes(CONLL.encode())

    rows = load(tmp_path)["train"].rows

    assert rows["tokens"][:] == [["the", "cat", "runs"], ["a", "dog"]]
    assert rows["tags"][:] == [["O", "B-PER", "I-PER"], ["O", "B-PER"]]
    assert rows["line"][:] == [3, 8]
    assert load(tmp_path, limit=1)["train"].rows["line"][:] == [3]


def test_a_document_line_ends_a_sentence_and_odd_spaces_belong_to_a_token(tmp_path: Path) -> None:
    rows = load(write(tmp_path, train="a\u00a0b O\n-DOCSTART- O\n\u2028 B-PER"))["train"].rows

    assert rows["tokens"][:] == [["a\u00a0b"], ["\u2028"]]


def test_validation_fraction_cuts_between_sentences(tmp_path: Path) -> None:
    cut = load(write(tmp_path, train=CONLL), validation_fraction=0.5, split="end")
    drawn = load(write(tmp_path, train=CONLL), validation_fraction=0.5)

    assert cut["validation"].rows["tokens"][:] == [["a", "dog"]]
    assert sorted(drawn["train"].rows["tokens"][:] + drawn["validation"].rows["tokens"][:]) == sorted(
        cut["train"].rows["tokens"][:] + cut["validation"].rows["tokens"][:]
    )


def test_lists_of_tables_keep_the_names_of_their_classes(tmp_path: Path) -> None:
    rows = {"id": ["x"], "tokens": [["a", "cat"]], "ner_tags": [[0, 2]]}
    features = Features(
        {
            "id": Value("string"),
            "tokens": List(Value("string")),
            "ner_tags": List(ClassLabel(names=["O", "B-X", "I-X"])),
        }
    )
    Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")

    found = load(tmp_path / "saved")["train"]

    assert found.rows["tags"][:] == [["O", "I-X"]]
    assert found.label_names == ("O", "B-X", "I-X")


def test_columns_may_have_other_names_and_tags_be_numbers(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"w": ["a", "cat"], "t": [10, 9]}\n')

    assert load(tmp_path, columns={"tokens": "w", "tags": "t"})["train"].rows["tags"][:] == [["10", "9"]]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "the O\ncat\n\na O\n",
            r"train.conll, line 2: found 'cat', expected a token and its tag, separated by a blank",
        ),
        ("\nthe\ncat O\n", r"train.conll, line 3: found 'cat O', expected only a token, as above it"),
        ("the\ncat\n", r"train.conll has no tags: the first nonempty line has only 'the', expected"),
        ("\n-DOCSTART- O\n\n", r"train.conll has no rows"),
    ],
)
def test_faults_in_a_text_are_named_by_line(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        load(write(tmp_path, train=text))


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (
            {"tokens": ["a", "b", "c"], "tags": ["O", "O"]},
            r"train.jsonl, line 2: 3 tokens but 2 tags: each token needs",
        ),
        ({"tokens": ["a", "b"], "tags": ["O", None]}, r"line 2: 'b' has no tag in tags"),
        (
            {"tokens": "a b", "tags": ["O", "O"]},
            r"line 2: tokens must be a list, found 'a b'\. CSV and TSV have no lists",
        ),
        ({"tokens": ["a", 1], "tags": ["O", "O"]}, r"line 2: tokens, item 2 must be text, found 1"),
        ({"tokens": ["a"], "tags": [["O"]]}, r"line 2: a label is a name or a number, found \['O'\]"),
        ({"tokens": [], "tags": []}, r"line 2: tokens is empty"),
        ({"tokens": ["a"]}, r"line 2: the column 'tags' is missing"),
    ],
)
def test_faults_in_a_row_are_named(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    good = {"tokens": ["a"], "tags": ["O"]}
    (tmp_path / "train.jsonl").write_text("\n".join(json.dumps(values) for values in (good, row, good)))

    with pytest.raises(DataError, match=said):
        load(tmp_path)
    found = load(tmp_path, max_bad_rows=1)["train"]
    assert (found.rows["line"][:], found.skipped) == ([1, 3], 1)


@pytest.mark.parametrize(("row", "said"), [('{"text": ["a"]}', "the tokens"), ('{"tokens": ["a"]}', "the tags")])
def test_a_table_without_tokens_or_tags_is_refused(tmp_path: Path, row: str, said: str) -> None:
    (tmp_path / "train.jsonl").write_text(row)

    with pytest.raises(DataError, match=rf"train.jsonl has no column with a usual name for {said}"):
        load(tmp_path)


def prepare(folder: Path, **data: Any) -> TokenClassificationTask:
    word_pieces().save_pretrained(folder / "model")
    if not (folder / "model" / "config.json").exists():
        (folder / "model" / "config.json").write_text('{"model_type": "bert"}')
    (folder / "model" / "model.safetensors").touch()
    config = Config.model_validate(
        {
            "task": {"name": "token_classification"},
            "data": {"path": str(folder), "cache_dir": str(folder / "cache"), "max_length": 8, **data},
            "model": {"name_or_path": str(folder / "model")},
        }
    )
    assert isinstance(config.task, TokenClassification)
    return prepare_token_classification(config, config.task, ONE_PROCESS)


def test_files_become_labels_in_one_order_and_tests_need_no_tags(tmp_path: Path) -> None:
    write(tmp_path, train="unsees B-PER\ncat O\n\ndog I-PER\n", test="dog\nunsees\n")

    made = prepare(tmp_path, splits={"train": "train.conll", "test": "test.conll"})

    assert made.labels == ("B-PER", "I-PER", "O")
    assert made.head_config["label2id"] == {"B-PER": 0, "I-PER": 1, "O": 2}
    assert made.splits["train"][[0, 1]]["tags"] == [[0, 2], [1]]
    assert made.splits["train"][[0]]["places"] == [[1, 4]]
    assert made.records("test", [[9, 2, 0, 9, 9]]) == [{"prediction": ["O", "B-PER"], "reference": None}]
    assert made.targets(made.collate(made.splits["test"][[0]], tiny.HERE)).count == 0


def test_a_trained_models_tag_order_is_kept_by_name(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "bert", "id2label": {"0": "O", "1": "B-PER"}}')

    made = prepare(write(tmp_path, train="cat B-PER\ndog O\n"))

    assert made.labels == ("O", "B-PER")
    assert made.splits["train"][[0]]["tags"] == [[1, 0]]


def test_an_unknown_tag_is_named_with_its_line(tmp_path: Path) -> None:
    write(tmp_path, train="cat B-PER\ndog O\n", dev="cat O\n\ncat O\ndog B-LOC\n")

    with pytest.raises(DataError, match=r"dev.conll, line 4: 'B-LOC', the tag of 'dog', is not one.*: B-PER, O\. They"):
        prepare(tmp_path)


def test_truncated_words_are_counted_in_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, train="cat O\n" * 9 + "\ndog O\n")

    with caplog.at_level(logging.WARNING, logger="dtrain"):
        prepare(tmp_path)

    assert "train: 3 words of 1 sentences are not trained on and not evaluated" in caplog.text


def test_a_tokenizer_without_words_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, train="cat O\n")
    monkeypatch.setattr(type(tiny.tokenizer()), "is_fast", False)

    with pytest.raises(ConfigError, match="does not map tokens to words"):
        prepare(tmp_path)
