"""A tag for each word of a sentence, such as the names of persons and places in it.

The first token of a word carries the word's tag and says what is predicted for it; its other tokens are no targets.
Words beyond data.max_length, and those that the tokenizer makes nothing of, are neither learned nor judged; how many
there are is said.
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

from dtrain.config.schema import Config
from dtrain.config.task import Head, TokenClassification
from dtrain.console import log
from dtrain.data.seeding import DataPosition
from dtrain.data.sources import Source
from dtrain.data.token_tags import TAGGED, check_tags, tag_names
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import ConfigError
from dtrain.tasks.prepare import Meta, Recipe, columns_of, known_labels, label_outputs, map_rows, prepare_examples
from dtrain.tasks.protocol import IGNORED, Batch, Scored, Split, Targets
from dtrain.tasks.tensors import counted, logits_of, padded

NO_TOKEN = -1
"""The place of a word that no token stands for."""


class TokenClassificationTask:
    """Cross entropy over the tags of each word; F1, precision and recall of whole entities, and accuracy, by seqeval."""

    name = "token_classification"
    head: Head = "token_classification"
    needs_padding = True

    def __init__(self, splits: Mapping[str, Split], tokenizer: Any, labels: Sequence[str], *, max_length: int) -> None:
        """
        Args:
            splits: rows with `input_ids`, `token_type_ids`, `places` (each word's first token, or NO_TOKEN) and `tags`
                (each word's, an index into `labels`; None where they are unknown).
            labels: tags in the order of the model's outputs. Where they are no beginnings and insides of entities
                (B-PER, I-PER, O), accuracy is the only metric.
        """
        self.splits: Mapping[str, Split] = splits
        self.tokenizer = tokenizer
        self.labels = tuple(labels)
        self.max_length = max_length
        self.head_config: dict[str, Any] = label_outputs(labels)
        self._has_entities = all(re.fullmatch(r"O|[BIES](-.+)?", label) for label in labels)
        self.metric_names: Sequence[str] = (
            ("f1", "precision", "recall", "accuracy") if self._has_entities else ("accuracy",)
        )

    def collate(self, rows: Mapping[str, Sequence[Any]], place: DataPosition) -> Batch:
        """Inputs and labels (batch, length); a label stands at each word's first token."""
        inputs = {key: rows[key] for key in rows if key in ("input_ids", "token_type_ids")}
        # On the right whatever the tokenizer is used to: places count from the first token.
        batch: Batch = padded(self.tokenizer, inputs, side="right")
        batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
        for row, (places, tags) in enumerate(zip(rows["places"], rows["tags"], strict=True)):
            for where, tag in zip(places, tags or [], strict=False):
                if where != NO_TOKEN:
                    batch["labels"][row, where] = tag
        return batch

    def targets(self, batch: Batch) -> Targets:
        return counted(batch["labels"])

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        logits, labels = logits_of(model, batch), batch["labels"]
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")

    def score(self, module: nn.Module, batch: Batch, *, lock_step: bool) -> Scored:
        """prediction: (batch, max_length) the likeliest tag of every token, IGNORED behind a row's last."""
        logits, labels = logits_of(module, batch), batch["labels"]
        losses = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        found = logits.argmax(dim=-1).masked_fill(batch["attention_mask"] == 0, IGNORED)
        found = F.pad(found, (0, self.max_length - found.shape[1]), value=IGNORED)
        return Scored(losses.double().sum(dim=1), (labels != IGNORED).sum(dim=1), found)

    def metrics(self, split: str, *, loss: float, predictions: Sequence[Any]) -> dict[str, float]:
        from seqeval.metrics import accuracy_score, f1_score, precision_score, recall_score

        truth, found = [], []
        for record in self.records(split, predictions):
            if record["reference"] is not None:
                pairs = zip(record["reference"], record["prediction"], strict=True)
                judged = [(tag, guess) for tag, guess in pairs if guess is not None]
                truth.append([tag for tag, _ in judged])
                found.append([guess for _, guess in judged])
        if not any(truth):
            return {}
        accuracy = {"accuracy": float(accuracy_score(truth, found))}
        if not self._has_entities:
            return accuracy
        return {
            "f1": float(f1_score(truth, found, zero_division=0)),
            "precision": float(precision_score(truth, found, zero_division=0)),
            "recall": float(recall_score(truth, found, zero_division=0)),
            **accuracy,
        }

    def records(self, split: str, predictions: Sequence[Any]) -> list[Mapping[str, Any]]:
        """A tag for each word of the sentence; None in `prediction` for a word that no token stands for."""
        columns = columns_of(self.splits[split], "places", "tags")
        return [
            {
                "prediction": [None if where == NO_TOKEN else self.labels[found[where]] for where in places],
                "reference": None if tags is None else [self.labels[tag] for tag in tags],
            }
            for found, places, tags in zip(predictions, columns["places"], columns["tags"], strict=True)
        ]


def prepare_token_classification(
    config: Config, settings: TokenClassification, context: RankContext
) -> TokenClassificationTask:
    """Collective. Tokenises each split once per node and fixes the order of the tags."""
    order = known_labels(config, context)

    def describe(sources: Mapping[str, Source], _tokenizer: Any) -> dict[str, list[str]]:
        if "train" not in sources and order is not None:
            check_tags(sources, names := order)  # an evaluation: the model knows its tags
        else:
            names = tag_names(sources)
        if order is not None and set(order) == set(names):
            names = order  # the model's outputs keep their meaning
        return {"labels": list(names)}

    def encode(source: Source, tokenizer: Any, meta: Meta) -> Dataset:
        if not tokenizer.is_fast:
            raise ConfigError(
                f"{type(tokenizer).__name__} does not say which word a token belongs to. Set model.tokenizer to one "
                "with a tokenizer.json (a fast tokenizer)."
            )
        identity = {name: index for index, name in enumerate(meta["labels"])}

        def tokenise(rows: Mapping[str, Any]) -> dict[str, Any]:
            tags = rows.get("tags") or [None] * len(rows["tokens"])
            return {
                **encode_words(rows["tokens"], tokenizer, max_length=config.max_length),
                "tags": [None if row is None else [identity[tag] for tag in row] for row in tags],
            }

        return map_rows(source, tokenise, config)

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
            "data: the tags (%s) are no beginnings and insides of entities (B-PER, I-PER, O): accuracy is the only metric",
            ", ".join(labels[:10]),
        )
    return task


def encode_words(sentences: Sequence[Sequence[str]], tokenizer: Any, *, max_length: int) -> dict[str, Any]:
    """Sentences of words as the tokenizer's columns, and `places`: the first token of each word, or NO_TOKEN."""
    blank = _blank(tokenizer)
    encoded = tokenizer(
        [[blank + word for word in words] for words in sentences],
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
    return {**encoded, "places": places}


def _blank(tokenizer: Any) -> str:
    """What stands before a word: a blank for tokenizers that have it in a word's first token (GPT-2's, RoBERTa's)."""
    alone, behind = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", " a"))
    return " " if alone != behind and len(alone) == len(behind) else ""


def _report_lost_words(splits: Mapping[str, Dataset], max_length: int) -> None:
    for split, rows in splits.items():
        lost = [places.count(NO_TOKEN) for places in rows["places"]]
        if any(lost):
            log.warning(
                "data: %s: %d words of %d sentences are neither learned nor judged, for they stand beyond "
                "data.max_length=%d or the tokenizer makes nothing of them",
                *(split, sum(lost), sum(map(bool, lost)), max_length),
            )


def _texts(source: Source) -> Iterator[str]:
    return chain.from_iterable(source.rows["tokens"])
