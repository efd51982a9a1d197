"""Masked tokens of a text, predicted from the tokens on both sides (Devlin et al. 2019, arXiv:1810.04805).

Of the tokens to predict, 80 % become the mask token, 10 % another token, and 10 % stay unchanged. They are drawn when the
batch is made, from (seed, epoch, example index): every epoch masks other tokens, and every engine and world size masks the
same. An evaluation always uses the masks of epoch 0. Special tokens are never masked.

A row of the data is an example. A row longer than data.max_length becomes several examples, so that a row may be a complete
text and no token is dropped. A row without a token to mask is skipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForMaskedLM

from dtrain.config.schema import Config
from dtrain.config.task import MaskedLm
from dtrain.data.columns import ListColumn, row_arrays
from dtrain.data.seeding import DataPosition, derive_seed
from dtrain.data.sources import Source
from dtrain.data.tables import TEXT
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import ConfigError, DataError
from dtrain.models.heads import Head
from dtrain.tasks.info import TaskInfo
from dtrain.tasks.prepare import Meta, Recipe, all_texts, map_rows, prepare_examples
from dtrain.tasks.protocol import IGNORED, Batch, Padding, ScoredBatch, Split, Targets
from dtrain.tasks.target_loss import score_targets, target_loss
from dtrain.tasks.tensors import count_targets, pad_rows, perplexity
from dtrain.tasks.truncation import report_rows_without_targets

MASKED, REPLACED = 0.8, 0.1
"""Shares of the tokens to predict that become the mask token, and another token."""

Ints = npt.NDArray[np.int64]

HEAD = Head("masked_lm", AutoModelForMaskedLM, logits="token", is_over_vocabulary=True)


def info(settings: MaskedLm) -> TaskInfo:
    """Returns the information about this task that the rest of dtrain uses."""
    return TaskInfo(
        prepare=lambda config, context: prepare_masked_lm(config, settings, context),
        head=HEAD,
        example_row={"text": "A cat [MASK]."},
        prompt="fill",
        pipeline_tag="fill-mask",
    )


class MaskedLmTask:
    """Cross entropy over the masked tokens. Metrics: accuracy and perplexity."""

    name = "masked_lm"
    head = HEAD
    needs_padding = True
    padding = Padding()
    metric_names: Sequence[str] = ("accuracy", "perplexity")

    def __init__(
        self, splits: Mapping[str, Split], tokenizer: Any, settings: MaskedLm, *, max_length: int, seed: int
    ) -> None:
        """
        Args:
            splits: Rows with `input_ids`, at most max_length of them and at least one that is not special. For whole
                words also `word_ids`, the number of each token's word.
            seed: Seed of the masks.
        """
        self.splits: Mapping[str, Split] = splits
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.head_config: dict[str, Any] = {}
        self._settings = settings
        self._seed = seed
        self._special = np.array(sorted(set(tokenizer.all_special_ids)), dtype=np.int64)
        vocabulary = np.array(sorted(tokenizer.get_vocab().values()), dtype=np.int64)
        self._ordinary = vocabulary[~np.isin(vocabulary, self._special)]

    def collate(self, rows: Mapping[str, Sequence[Any]], position: DataPosition) -> Batch:
        words = rows["word_ids"] if self._settings.whole_word else rows["input_ids"]
        inputs, labels = [], []
        tokens, words_of_tokens = row_arrays(rows["input_ids"]), row_arrays(words)
        for ids, word_ids, index in zip(tokens, words_of_tokens, position.example_index, strict=True):
            draws = np.random.default_rng(derive_seed(self._seed, "mask", position.epoch, index))
            masked, targets = self._mask(ids.astype(np.int64), word_ids.astype(np.int64), draws)
            inputs.append(masked)
            labels.append(torch.from_numpy(targets))
        batch = pad_rows(self.tokenizer, {"input_ids": ListColumn(inputs)}, self.padding)
        batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
        batch["labels"][batch["attention_mask"].bool()] = torch.cat(labels)  # on whichever side padding is
        return batch

    def targets(self, batch: Batch) -> Targets:
        return count_targets(batch["labels"])

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return target_loss(model, _inputs(batch), batch["labels"])

    def score(self, module: nn.Module, batch: Batch, *, lock_step: bool) -> ScoredBatch:
        scores = score_targets(module, _inputs(batch), batch["labels"])
        return ScoredBatch(scores.loss, scores.targets, torch.stack([scores.correct, scores.targets], dim=1))

    def metrics(self, split: str, *, loss: float, predictions: Sequence[Any]) -> dict[str, float]:
        correct, targets = (sum(column) for column in zip(*predictions, strict=True))
        return {"accuracy": correct / targets, "perplexity": perplexity(loss)}

    def records(self, split: str, predictions: Sequence[Any]) -> list[Mapping[str, Any]]:
        """Returns records without texts: `correct` is the number of targets that were the most likely token."""
        return [{"prediction": None, "reference": None, "correct": int(correct)} for correct, _ in predictions]

    def _mask(self, ids: Ints, words: Ints, draws: np.random.Generator) -> tuple[Ints, Ints]:
        """Returns the tokens that the model sees and the labels, (length,) each."""
        candidates = np.flatnonzero(~np.isin(ids, self._special))
        labels = np.full_like(ids, IGNORED)
        if len(candidates) == 0:
            return ids, labels
        # One draw decides about a unit: a word, or a single token.
        _, unit = np.unique(words[candidates] if self._settings.whole_word else candidates, return_inverse=True)
        number = int(unit.max()) + 1
        is_chosen = draws.random(number) < self._settings.mask_probability
        if not is_chosen.any():  # else a short example could have no target
            is_chosen[draws.integers(number)] = True
        chosen = candidates[is_chosen[unit]]
        draw = draws.random(len(chosen))
        others = self._ordinary[draws.integers(len(self._ordinary), size=len(chosen))]
        masked = ids.copy()
        masked[chosen] = np.where(
            draw < MASKED, self.tokenizer.mask_token_id, np.where(draw < MASKED + REPLACED, others, ids[chosen])
        )
        labels[chosen] = ids[chosen]
        return masked, labels


def prepare_masked_lm(config: Config, settings: MaskedLm, context: RankContext) -> MaskedLmTask:
    """Collective. Tokenizes each split once per node."""

    def encode(source: Source, tokenizer: Any, _meta: Meta) -> Dataset:
        special = set(tokenizer.all_special_ids)

        def tokenize(rows: Mapping[str, Any]) -> dict[str, list[Any]]:
            examples = _examples(rows["text"], tokenizer, config.max_length)
            kept = [example for example in examples if not special.issuperset(example[0])]
            columns: dict[str, list[Any]] = {
                "input_ids": [ids for ids, _, _ in kept],
                "line": [rows["line"][row] for _, _, row in kept],
            }
            return {**columns, "word_ids": [words for _, words, _ in kept]} if settings.whole_word else columns

        rows = map_rows(source, tokenize, config)
        if len(rows) == 0:
            raise DataError(f"{source.origin} has only special tokens, and no token that can be masked: use a text.")
        report_rows_without_targets(source, len(rows.unique("line")))
        return rows.remove_columns("line")

    def describe(_sources: Mapping[str, Source], tokenizer: Any) -> Meta:
        _check_tokenizer(tokenizer, config, settings)
        return {}

    recipe = Recipe(
        "masked_lm",
        TEXT,
        texts=all_texts,
        encode=encode,
        describe=describe,
        options={"whole_word": settings.whole_word},
    )
    examples = prepare_examples(recipe, config, context)
    return MaskedLmTask(
        examples.splits, examples.tokenizer, settings, max_length=config.max_length, seed=config.run.seed
    )


def _check_tokenizer(tokenizer: Any, config: Config, settings: MaskedLm) -> None:
    """Raises ConfigError if the tokenizer cannot mask or leaves no room for text."""
    if tokenizer.mask_token_id is None:
        raise ConfigError(
            "task.name=masked_lm needs a tokenizer with a mask token, and this one has none. Use the tokenizer of a masked "
            "language model (bert-base-uncased, roberta-base), or model.tokenizer=train-bpe."
        )
    if settings.whole_word and not tokenizer.is_fast:
        raise ConfigError(
            f"task.whole_word=true needs a fast tokenizer, which maps tokens to words; {type(tokenizer).__name__} is not "
            "one. Set task.whole_word=false."
        )
    if config.max_length <= (special := tokenizer.num_special_tokens_to_add()):
        raise ConfigError(
            f"data.max_length={config.max_length} leaves no room for text besides {special} special tokens: increase it."
        )


def _examples(texts: Sequence[str], tokenizer: Any, max_length: int) -> Iterator[tuple[list[int], list[int], int]]:
    """Yields tokens, with a fast tokenizer the word of each token (-1: special), and the number of the text.

    A long text gives several examples.
    """
    if not tokenizer.is_fast:
        room = max_length - tokenizer.num_special_tokens_to_add()
        for row, text in enumerate(texts):
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            for start in range(0, len(ids), room):
                yield tokenizer.build_inputs_with_special_tokens(ids[start : start + room]), [], row
        return
    encoded = tokenizer(texts, truncation=True, max_length=max_length, return_overflowing_tokens=True)
    for number, ids in enumerate(encoded["input_ids"]):
        words = [-1 if word is None else word for word in encoded.word_ids(number)]
        yield ids, words, encoded["overflow_to_sample_mapping"][number]


def _inputs(batch: Batch) -> Batch:
    return {key: value for key, value in batch.items() if key != "labels"}
