"""A text from a text: translation, summarisation.

The loss is over the tokens of the target given those before (teacher forcing). With `evaluation.generate` a text is
written for every example as well, and judged by sacrebleu or rouge-score (text_metrics.py). A micro-batch of an
evaluation is the same list of examples at every world size, so the padding that an example is generated with is the
same too, and with it every token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn

from dtrain.config.schema import Config, Evaluation
from dtrain.config.task import Head, Seq2Seq
from dtrain.data.seeding import DataPosition
from dtrain.data.sources import Source
from dtrain.data.translations import translation_row_format
from dtrain.distributed.collectives import node_first
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import ConfigError
from dtrain.models.seq2seq import (
    check_targets_end,
    decoder_inputs,
    end_token_id,
    language_generation_options,
    max_decoder_positions,
    set_languages,
)
from dtrain.tasks.prepare import Meta, Recipe, columns_of, map_rows, prepare_examples
from dtrain.tasks.protocol import IGNORED, Batch, Scored, Split, Targets
from dtrain.tasks.tensors import counted, logits_of, padded
from dtrain.tasks.text_metrics import TextMetrics


class Seq2SeqTask:
    """Cross entropy of each token of the target; BLEU and chrF, or ROUGE, of generated texts."""

    name = "seq2seq"
    head: Head = "seq2seq_lm"
    needs_padding = True

    def __init__(
        self,
        splits: Mapping[str, Split],
        tokenizer: Any,
        settings: Seq2Seq,
        evaluation: Evaluation,
        *,
        max_length: int,
        language: int | None = None,
    ) -> None:
        """
        Args:
            splits: rows with `input_ids`, `labels` (token ids of the target) and `reference` (its text); the last two
                are None where the example has no target.
            max_length: tokens of a source.
            language: token of the target language, of a multilingual tokenizer.
        """
        self.splits: Mapping[str, Split] = splits
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.head_config: dict[str, Any] = {}
        self._smoothing = settings.label_smoothing
        self._judge = TextMetrics(settings.metric)
        self.metric_names: Sequence[str] = self._judge.names if evaluation.generate else ()
        self.max_new_tokens = evaluation.max_new_tokens or settings.max_target_length
        self._generates = evaluation.generate
        # Never transformers' own default of 20 tokens, and never sampling; the rest (length penalty, no repeated
        # n-grams, forced tokens) is the model's own generation_config.
        self._how = {
            "max_new_tokens": self.max_new_tokens,
            "max_length": None,
            "num_beams": evaluation.num_beams,
            "do_sample": False,
            **language_generation_options(tokenizer, language),
        }

    def collate(self, rows: Mapping[str, Sequence[Any]], place: DataPosition) -> Batch:
        batch = padded(self.tokenizer, {"input_ids": rows["input_ids"]})
        targets = [torch.tensor(ids or [IGNORED], dtype=torch.int64) for ids in rows["labels"]]
        batch["labels"] = nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=IGNORED)
        return batch

    def targets(self, batch: Batch) -> Targets:
        return counted(batch["labels"])

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return F.cross_entropy(
            _logits(model, batch).flatten(0, 1),
            batch["labels"].flatten(),
            ignore_index=IGNORED,
            label_smoothing=self._smoothing,
            reduction="sum",
        )

    def score(self, module: nn.Module, batch: Batch, *, lock_step: bool) -> Scored:
        labels = batch["labels"]
        targets = (labels != IGNORED).sum(dim=1)
        losses = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
        if int(targets.sum()):  # all examples of a split have a target or none has: every rank decides alike
            logits = _logits(module, batch).transpose(1, 2)
            losses = F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="none").double().sum(dim=1)
        written = self._generate(module, batch, lock_step=lock_step) if self._generates else None
        return Scored(losses, targets, written)

    def _generate(self, module: Any, batch: Batch, *, lock_step: bool) -> torch.Tensor:
        """(batch, max_new_tokens) int64: what the module writes up to its end token, then pad tokens.

        Under lock_step every rank calls this equally often, and a rank whose texts have ended goes on with the others.
        """
        made = module.generate(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], synced_gpus=lock_step, **self._how
        )[:, 1:]  # without the token that the decoder starts with
        ended = (made == end_token_id(self.tokenizer)).cumsum(dim=1)
        after_end = (ended - (made == end_token_id(self.tokenizer)).long()) > 0
        pad = self.tokenizer.pad_token_id
        return F.pad(made.masked_fill(after_end, pad), (0, self.max_new_tokens - made.shape[1]), value=pad)

    def metrics(self, split: str, *, loss: float, predictions: Sequence[Any]) -> dict[str, float]:
        if not self._generates:
            return {}
        lengths = [self._length(ids) for ids in predictions]
        return self._judge(self._texts(predictions), self._references(split), lengths)

    def records(self, split: str, predictions: Sequence[Any]) -> list[Mapping[str, Any]]:
        references = self._references(split)
        texts = self._texts(predictions) if self._generates else [None] * len(references)
        return [{"prediction": text, "reference": reference} for text, reference in zip(texts, references, strict=True)]

    def _texts(self, predictions: Sequence[Any]) -> list[str]:
        texts: list[str] = self.tokenizer.batch_decode(predictions, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _length(self, ids: Sequence[int]) -> int:
        """Tokens up to the end token, which counts."""
        end = end_token_id(self.tokenizer)
        if end in ids:
            return ids.index(end) + 1
        return len(ids)

    def _references(self, split: str) -> Sequence[str | None]:
        """The targets' texts as they were given, in data order."""
        return columns_of(self.splits[split], "reference")["reference"]


def prepare_seq2seq(config: Config, settings: Seq2Seq, context: RankContext) -> Seq2SeqTask:
    """Collective. Tokenises sources and targets, once per node."""
    _check_positions(config, settings, context)

    def encode(source: Source, tokenizer: Any, _meta: Meta) -> Dataset:
        set_languages(tokenizer, settings.source_lang, settings.target_lang)
        check_targets_end(tokenizer)

        def tokenise(rows: Mapping[str, Any]) -> dict[str, Any]:
            sources = [settings.prefix + text for text in rows["source"]]
            targets = rows.get("target")
            inputs = tokenizer(sources, truncation=True, max_length=config.max_length)["input_ids"]
            if targets is None:
                return {"input_ids": inputs, "labels": [None] * len(inputs), "reference": [None] * len(inputs)}
            labels = tokenizer(text_target=targets, truncation=True, max_length=settings.max_target_length)
            return {"input_ids": inputs, "labels": labels["input_ids"], "reference": targets}

        return map_rows(source, tokenise, config)

    recipe = Recipe(
        "seq2seq",
        translation_row_format(settings.source, settings.target),
        texts=lambda source: [*source.rows["source"], *source.rows["target"]],
        encode=encode,
        options=settings.model_dump(mode="json", exclude={"name", "metric", "label_smoothing"}),
    )
    examples = prepare_examples(recipe, config, context)
    language = set_languages(examples.tokenizer, settings.source_lang, settings.target_lang)
    return Seq2SeqTask(
        examples.splits,
        examples.tokenizer,
        settings,
        config.evaluation,
        max_length=config.max_length,
        language=language,
    )


def _check_positions(config: Config, settings: Seq2Seq, context: RankContext) -> None:
    """Collective. The decoder's side of what models.checks asks of the encoder."""
    bound = node_first(lambda: max_decoder_positions(config.model), context)
    longest = {"task.max_target_length": settings.max_target_length}
    if config.evaluation.generate:
        longest["evaluation.max_new_tokens"] = config.evaluation.max_new_tokens or 0
    for setting, length in longest.items():
        if bound is not None and length > bound:
            raise ConfigError(
                f"{setting}={length}, but the model's decoder has positions for {bound} tokens only. Set {setting}={bound} "
                "or less."
            )


def _logits(model: nn.Module, batch: Batch) -> torch.Tensor:
    """(batch, length, vocabulary) in full precision, for each token of the target given those before it."""
    return logits_of(model, batch, decoder_input_ids=decoder_inputs(model, batch["labels"]), use_cache=False)
