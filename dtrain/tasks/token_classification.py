"""A tag for each word of a sentence, e.g. to find the names of persons and places.

The tag of a word is the target of its first token, which also gives the prediction. Its other tokens are not targets. Words
beyond data.max_length, and words for which the tokenizer has no token, are not trained on and not evaluated. A warning
says how many there are.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn
from transformers import AutoModelForTokenClassification

from dtrain.config.schema import Config
from dtrain.config.task import TokenClassification
from dtrain.console import log
from dtrain.data.columns import column_values, row_arrays
from dtrain.data.seeding import DataPosition
from dtrain.data.sources import Source
from dtrain.data.token_tags import TAGGED, TOKEN_COLUMNS, check_tags, tag_names
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import ConfigError, DataError
from dtrain.models.heads import Head
from dtrain.tasks.info import TaskInfo
from dtrain.tasks.prepare import (
    Meta,
    Recipe,
    fill_empty,
    label_config,
    map_rows,
    prepare_examples,
    pretrained_labels,
    read_columns,
)
from dtrain.tasks.protocol import IGNORED, Batch, Padding, ScoredBatch, Split, Targets
from dtrain.tasks.tensors import compute_logits, count_targets, pad_rows

NO_TOKEN = -1
"""The place of a word without a token."""

HEAD = Head("token_classification", AutoModelForTokenClassification, logits="token", has_label_names=True)


def info(settings: TokenClassification) -> TaskInfo:
    """Returns the information about this task that the rest of dtrain uses."""
    return TaskInfo(
        prepare=lambda config, context: prepare_token_classification(config, settings, context),
        head=HEAD,
        example_row={"tokens": ["A", "cat", "sleeps", "."]},
        text_columns=("tokens",),
        parse_text=str.split,
        format_prediction=_format_tags,
        pipeline_tag="token-classification",
    )


def _format_tags(tags: Sequence[str | None], row: Mapping[str, Any], columns: Mapping[str, str]) -> str:
    words = next(row[name] for name in (columns.get("tokens", ""), *TOKEN_COLUMNS) if name in row)
    return " ".join(word if tag is None else f"{word}/{tag}" for word, tag in zip(words, tags, strict=True))


class TokenClassificationTask:
    """Cross entropy over the tags of each word. Metrics from seqeval: F1, precision and recall of entities; accuracy."""

    name = "token_classification"
    head = HEAD
    needs_padding = True
    padding = Padding()

    def __init__(self, splits: Mapping[str, Split], tokenizer: Any, labels: Sequence[str], *, max_length: int) -> None:
        """
        Args:
            splits: Rows with `input_ids`, `token_type_ids`, `places` (the first token of each word, or NO_TOKEN) and
                `tags` (for each word an index into `labels`; None: unknown).
            labels: Tags in the order of the model's outputs. If they do not mark the beginnings and insides of entities
                (B-PER, I-PER, O), accuracy is the only metric.
        """
        self.splits: Mapping[str, Split] = splits
        self.tokenizer = tokenizer
        self.labels = tuple(labels)
        self.max_length = max_length
        self.head_config: dict[str, Any] = label_config(labels)
        self._has_entities = all(re.fullmatch(r"O|[BIES](-.+)?", label) for label in labels)
        self.metric_names: Sequence[str] = (
            ("f1", "precision", "recall", "accuracy") if self._has_entities else ("accuracy",)
        )

    def collate(self, rows: Mapping[str, Sequence[Any]], position: DataPosition) -> Batch:
        """Returns inputs and labels (batch, length). The label of a word is at its first token."""
        inputs = {key: rows[key] for key in rows if key in ("input_ids", "token_type_ids")}
        # Always on the right: places count from the first token.
        batch: Batch = pad_rows(self.tokenizer, inputs, Padding("right", self.padding.length))
        batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
        targets = batch["labels"].numpy()
        for row, places, tags in zip(targets, row_arrays(rows["places"]), row_arrays(rows["tags"]), strict=True):
            number = min(len(places), len(tags))
            has_token = places[:number] != NO_TOKEN
            row[places[:number][has_token]] = tags[:number][has_token]
        return batch

    def targets(self, batch: Batch) -> Targets:
        return count_targets(batch["labels"])

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        logits, labels = compute_logits(model, batch), batch["labels"]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")

    def score(self, module: nn.Module, batch: Batch, *, lock_step: bool) -> ScoredBatch:
        """Returns as prediction (batch, max_length) the most likely tag of every token, IGNORED for padding."""
        logits, labels = compute_logits(module, batch), batch["labels"]
        losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        tags = logits.argmax(dim=-1).masked_fill(batch["attention_mask"] == 0, IGNORED)
        tags = F.pad(tags, (0, self.max_length - tags.shape[1]), value=IGNORED)
        return ScoredBatch(losses.double().sum(dim=1), (labels != IGNORED).sum(dim=1), tags)

    def metrics(self, split: str, *, loss: float, predictions: Sequence[Any]) -> dict[str, float]:
        from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score

        expected, predicted = [], []
        for record in self.records(split, predictions):
            if record["reference"] is not None:
                pairs = zip(record["reference"], record["prediction"], strict=True)
                known = [(tag, prediction) for tag, prediction in pairs if prediction is not None]
                expected.append([tag for tag, _ in known])
                predicted.append([prediction for _, prediction in known])
        if not any(expected):
            return {}
        accuracy = {"accuracy": float(accuracy_score(expected, predicted))}
        if not self._has_entities:
            return accuracy
        return {
            "f1": float(f1_score(expected, predicted, zero_division=0)),
            "precision": float(precision_score(expected, predicted, zero_division=0)),
            "recall": float(recall_score(expected, predicted, zero_division=0)),
            **accuracy,
        }

    def records(self, split: str, predictions: Sequence[Any]) -> list[Mapping[str, Any]]:
        """Returns a tag for each word of a sentence. None in `prediction` for a word without a token."""
        columns = read_columns(self.splits[split], "places", "tags")
        return [
            {
                "prediction": [None if token == NO_TOKEN else self.labels[predicted[token]] for token in places],
                "reference": None if tags is None else [self.labels[tag] for tag in tags],
            }
            for predicted, places, tags in zip(predictions, columns["places"], columns["tags"], strict=True)
        ]


def prepare_token_classification(
    config: Config, settings: TokenClassification, context: RankContext
) -> TokenClassificationTask:
    """Collective. Tokenizes each split once per node and fixes the order of the tags."""
    order = pretrained_labels(config, context)

    def describe(sources: Mapping[str, Source], _tokenizer: Any) -> dict[str, list[str]]:
        if "train" not in sources and order is not None:
            check_tags(sources, names := order)  # an evaluation: the tags are the model's
        else:
            names = tag_names(sources)
        if order is not None and set(order) == set(names):
            names = order  # so that the model's outputs keep their meaning
        return {"labels": list(names)}

    def encode(source: Source, tokenizer: Any, meta: Meta) -> Dataset:
        if not tokenizer.is_fast:
            raise ConfigError(
                f"{type(tokenizer).__name__} does not map tokens to words. Set model.tokenizer to a tokenizer with a "
                "tokenizer.json (a fast tokenizer)."
            )
        identity = {name: index for index, name in enumerate(meta["labels"])}

        def tokenize(rows: Mapping[str, Any]) -> dict[str, Any]:
            tags = rows.get("tags") or [None] * len(rows["tokens"])
            encoded = encode_words(rows["tokens"], tokenizer, max_length=config.max_length)
            for line, words, places in zip(rows["line"], rows["tokens"], encoded["places"], strict=True):
                if set(places) == {NO_TOKEN} and source.needs_label:
                    raise DataError(
                        f"{source.origin}, {source.unit} {line}: a sentence without a target: the tokenizer has no token for "
                        f"any of its {len(words)} word(s) ({', '.join(map(ascii, words[:3]))}) within "
                        f"data.max_length={config.max_length}. Remove it, or skip such rows with data.max_bad_rows"
                    )
            return {
                **encoded,
                "tags": [None if row is None else [identity[tag] for tag in row] for row in tags],
            }

        return map_rows(source, tokenize, config)

    recipe = Recipe(
        "token_classification",
        TAGGED,
        texts=_texts,
        encode=encode,
        describe=describe,
        options={"labels": None if order is None else list(order)},
    )
    examples = prepare_examples(recipe, config, context)
    _report_lost_words(examples.splits, config.max_length)
    labels = [str(name) for name in examples.meta["labels"]]
    task = TokenClassificationTask(examples.splits, examples.tokenizer, labels, max_length=config.max_length)
    if "f1" not in task.metric_names:
        log.info(
            "data: the tags (%s) do not mark the beginnings and insides of entities (B-PER, I-PER, O): accuracy is the "
            "only metric",
            ", ".join(labels[:10]),
        )
    return task


def encode_words(sentences: Sequence[Sequence[str]], tokenizer: Any, *, max_length: int) -> dict[str, Any]:
    """Returns the tokenizer's columns of sentences, and `places`: the first token of each word, or NO_TOKEN."""
    space = _space_before_words(tokenizer)
    encoded = tokenizer(
        [[space + word for word in words] for words in sentences],
        is_split_into_words=True,
        truncation=True,
        max_length=max_length,
        return_attention_mask=False,
    )
    places = []
    for row, words in enumerate(sentences):
        first: dict[int, int] = {}
        for token, word in enumerate(encoded.word_ids(row)):
            if word is not None:
                first.setdefault(word, token)
        places.append([first.get(word, NO_TOKEN) for word in range(len(words))])
    return {**fill_empty(encoded, tokenizer), "places": places}


def _space_before_words(tokenizer: Any) -> str:
    """Returns a space for tokenizers whose tokens include the space before a word (GPT-2, RoBERTa), else no text."""
    without, with_space = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", " a"))
    return " " if without != with_space and len(without) == len(with_space) else ""


def _report_lost_words(splits: Mapping[str, Dataset], max_length: int) -> None:
    for split, rows in splits.items():
        lost = [places.count(NO_TOKEN) for places in column_values(rows, "places")]
        if any(lost):
            log.warning(
                "data: %s: %d words of %d sentences are not trained on and not evaluated: they are beyond "
                "data.max_length=%d, or the tokenizer has no token for them",
                *(split, sum(lost), sum(map(bool, lost)), max_length),
            )


def _texts(source: Source) -> Iterator[str]:
    return chain.from_iterable(column_values(source.rows, "tokens"))
