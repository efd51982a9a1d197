"""Hidden tokens of a text, guessed from what stands on both sides (Devlin et al. 2019, arXiv:1810.04805).

Of the tokens to be guessed 80 % become the mask token, 10 % another token and 10 % stay as they are. Which, is drawn when
the batch is made, from (seed, epoch, example index): anew in each epoch, and the same whatever computes it. What is
evaluated is always masked as in epoch 0. Special tokens are never hidden.

A row of the data is an example. What is longer than data.max_length goes on in further examples, so that a whole text is
one row as well, and nothing of it is dropped. A row without a token to hide is no example.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn

from dtrain.config.schema import Config
from dtrain.config.task import Head, MaskedLm
from dtrain.data.seeding import DataPosition, derive_seed
from dtrain.data.sources import Source
from dtrain.data.tables import TEXT
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import ConfigError, DataError
from dtrain.tasks.prepare import Meta, Recipe, all_texts, map_rows, prepare_examples
from dtrain.tasks.protocol import IGNORED, Batch, Scored, Split, Targets
from dtrain.tasks.tensors import counted, full_precision, padded, perplexity

MASKED, REPLACED = 0.8, 0.1
"""Shares of the tokens to be guessed that become the mask token, and another token."""

Ints = npt.NDArray[np.int64]


class MaskedLmTask:
    """Cross entropy over the hidden tokens; how many of them are guessed right, and perplexity."""

    name = "masked_lm"
    head: Head = "masked_lm"
    needs_padding = True
    metric_names: Sequence[str] = ("accuracy", "perplexity")

    def __init__(
        self, splits: Mapping[str, Split], tokenizer: Any, settings: MaskedLm, *, max_length: int, seed: int
    ) -> None:
        """
        Args:
            splits: rows with `input_ids`, at most max_length of them, at least one not special; for whole words
                `word_ids` as well, the number of the word that each token belongs to.
            seed: of what is hidden.
        """
        self.splits: Mapping[str, Split] = splits
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.head_config: dict[str, Any] = {}
        self._settings = settings
        self._seed = seed
        self._special = np.array(sorted(set(tokenizer.all_special_ids)), dtype=np.int64)
        known = np.array(sorted(tokenizer.get_vocab().values()), dtype=np.int64)
        self._ordinary = known[~np.isin(known, self._special)]

    def collate(self, rows: Mapping[str, Sequence[Any]], place: DataPosition) -> Batch:
        words = rows["word_ids"] if self._settings.whole_word else rows["input_ids"]
        hidden, labels = [], []
        for ids, word_ids, index in zip(rows["input_ids"], words, place.example_index, strict=True):
            draws = np.random.default_rng(derive_seed(self._seed, "mask", place.epoch, index))
            shown, wanted = self._hide(np.array(ids, dtype=np.int64), np.array(word_ids, dtype=np.int64), draws)
            hidden.append(shown.tolist())
            labels.append(torch.from_numpy(wanted))
        batch = padded(self.tokenizer, {"input_ids": hidden})
        batch["labels"] = torch.full_like(batch["input_ids"], IGNORED)
        batch["labels"][batch["attention_mask"].bool()] = torch.cat(labels)  # wherever the tokenizer puts its padding
        return batch

    def targets(self, batch: Batch) -> Targets:
        return counted(batch["labels"])

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        logits, labels = _logits(model, batch)
        return F.cross_entropy(logits, labels, reduction="sum")

    def score(self, module: nn.Module, batch: Batch, *, lock_step: bool) -> Scored:
        logits, labels = _logits(module, batch)
        is_target = batch["labels"] != IGNORED
        losses = torch.zeros(is_target.shape, dtype=torch.float64, device=logits.device)
        losses[is_target] = F.cross_entropy(logits, labels, reduction="none").double()
        correct = torch.zeros_like(batch["labels"])
        correct[is_target] = (logits.argmax(dim=-1) == labels).long()
        targets = is_target.sum(dim=1)
        return Scored(losses.sum(dim=1), targets, torch.stack([correct.sum(dim=1), targets], dim=1))

    def metrics(self, split: str, *, loss: float, predictions: Sequence[Any]) -> dict[str, float]:
        correct, targets = (sum(column) for column in zip(*predictions, strict=True))
        return {"accuracy": correct / targets, "perplexity": perplexity(loss)}

    def records(self, split: str, predictions: Sequence[Any]) -> list[Mapping[str, Any]]:
        """`correct` of the example's `targets`; what was hidden is not written down."""
        return [{"prediction": None, "reference": None, "correct": int(correct)} for correct, _ in predictions]

    def _hide(self, ids: Ints, words: Ints, draws: np.random.Generator) -> tuple[Ints, Ints]:
        """What the model is shown and what it has to say: (length,) each."""
        places = np.flatnonzero(~np.isin(ids, self._special))
        wanted = np.full_like(ids, IGNORED)
        if len(places) == 0:
            return ids, wanted
        # The things to choose from: words, or the places themselves.
        _, thing = np.unique(words[places] if self._settings.whole_word else places, return_inverse=True)
        number = int(thing.max()) + 1
        is_chosen = draws.random(number) < self._settings.mask_probability
        if not is_chosen.any():  # a short example would teach nothing
            is_chosen[draws.integers(number)] = True
        chosen = places[is_chosen[thing]]
        how = draws.random(len(chosen))
        others = self._ordinary[draws.integers(len(self._ordinary), size=len(chosen))]
        shown = ids.copy()
        shown[chosen] = np.where(
            how < MASKED, self.tokenizer.mask_token_id, np.where(how < MASKED + REPLACED, others, ids[chosen])
        )
        wanted[chosen] = ids[chosen]
        return shown, wanted


def prepare_masked_lm(config: Config, settings: MaskedLm, context: RankContext) -> MaskedLmTask:
    """Collective. Tokenises each split once per node."""

    def encode(source: Source, tokenizer: Any, _meta: Meta) -> Dataset:
        special = set(tokenizer.all_special_ids)

        def tokenise(rows: Mapping[str, Any]) -> dict[str, list[Any]]:
            found = _examples(rows["text"], tokenizer, config.max_length)
            kept = [example for example in found if not special.issuperset(example[0])]
            columns = {"input_ids": [ids for ids, _ in kept]}
            return {**columns, "word_ids": [words for _, words in kept]} if settings.whole_word else columns

        rows = map_rows(source, tokenise, config)
        if len(rows) == 0:
            raise DataError(f"{source.origin} holds no token that could be hidden: special tokens only. Give a text.")
        return rows

    def describe(_sources: Mapping[str, Source], tokenizer: Any) -> Meta:
        _check(tokenizer, config, settings)
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


def _check(tokenizer: Any, config: Config, settings: MaskedLm) -> None:
    """What the tokenizer has to be able to do."""
    if tokenizer.mask_token_id is None:
        raise ConfigError(
            "task.name=masked_lm needs a tokenizer with a mask token, and this one has none. Use that of a model that "
            "was trained this way (bert-base-uncased, roberta-base), or model.tokenizer=train-bpe."
        )
    if settings.whole_word and not tokenizer.is_fast:
        raise ConfigError(
            f"task.whole_word=true needs a fast tokenizer, which knows the word of each token; "
            f"{type(tokenizer).__name__} does not. Set task.whole_word=false."
        )
    if config.max_length <= (special := tokenizer.num_special_tokens_to_add()):
        raise ConfigError(
            f"data.max_length={config.max_length} leaves no room for text beside {special} special tokens: raise it."
        )


def _examples(texts: Sequence[str], tokenizer: Any, max_length: int) -> Iterator[tuple[list[int], list[int]]]:
    """Tokens and, from a fast tokenizer, the word of each (-1: special); a long text gives several."""
    if not tokenizer.is_fast:
        room = max_length - tokenizer.num_special_tokens_to_add()
        for text in texts:
            ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            for start in range(0, len(ids), room):
                yield tokenizer.build_inputs_with_special_tokens(ids[start : start + room]), []
        return
    encoded = tokenizer(texts, truncation=True, max_length=max_length, return_overflowing_tokens=True)
    for number, ids in enumerate(encoded["input_ids"]):
        yield ids, [-1 if word is None else word for word in encoded.word_ids(number)]


def _logits(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the hidden tokens alone, (targets, vocabulary) and (targets,): a vocabulary for every token would be waste."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    is_target = batch["labels"] != IGNORED
    return full_precision(model(**inputs).logits[is_target]), batch["labels"][is_target]
