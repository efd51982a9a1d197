"""A text from a text: translation, summarization.

The loss is over the tokens of the target, each given the target's tokens before it (teacher forcing). With
`evaluation.generate` a text is also generated for every example, and sacrebleu or rouge-score compares it with the target
(text_metrics.py). A micro-batch of an evaluation has the same examples at every world size. An example is therefore
generated with the same padding, and gets the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn
from transformers import AutoModelForSeq2SeqLM

from dtrain.config.schema import Config, Evaluation
from dtrain.config.task import Seq2Seq
from dtrain.data.columns import column_values, row_arrays
from dtrain.data.lengths import RowLengths, token_lengths
from dtrain.data.seeding import DataPosition
from dtrain.data.sources import Source
from dtrain.data.translations import translation_row_format
from dtrain.distributed.collectives import node_first
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import ConfigError
from dtrain.models.heads import Head
from dtrain.models.seq2seq import (
    check_targets_end,
    decoder_inputs,
    end_token_id,
    language_generation_options,
    max_decoder_positions,
    set_languages,
)
from dtrain.tasks.generation import generate_tokens
from dtrain.tasks.info import TaskInfo
from dtrain.tasks.prepare import Meta, Recipe, fill_empty, map_rows, prepare_examples, read_columns
from dtrain.tasks.protocol import IGNORED, Batch, Padding, ScoredBatch, Split, Targets
from dtrain.tasks.target_loss import score_targets, target_loss
from dtrain.tasks.tensors import count_targets, pad_arrays, pad_rows
from dtrain.tasks.text_metrics import TextMetrics
from dtrain.tasks.truncation import FULL_LENGTH, FULL_TARGET_LENGTH, full_lengths

HEAD = Head("seq2seq_lm", AutoModelForSeq2SeqLM, logits=None, has_decoder=True)


def info(settings: Seq2Seq) -> TaskInfo:
    """Returns the information about this task that the rest of dtrain uses."""
    source = settings.source or "source"
    return TaskInfo(
        prepare=lambda config, context: prepare_seq2seq(config, settings, context),
        head=HEAD,
        example_row={source: "A cat sleeps."},
        text_columns=(source,),
        pipeline_tag=settings.metric,  # the hub's names for both
    )


class Seq2SeqTask:
    """Cross entropy of each token of the target. Metrics of generated texts: BLEU and chrF, or ROUGE."""

    name = "seq2seq"
    head = HEAD
    needs_padding = True
    padding = Padding()

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
            splits: Rows with `input_ids`, `labels` (token ids of the target) and `reference` (its text). The last two are
                None for an example without a target.
            max_length: Maximum tokens of a source.
            language: Token of the target language, with a multilingual tokenizer.
        """
        self.splits: Mapping[str, Split] = splits
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.max_target_length = settings.max_target_length
        self.head_config: dict[str, Any] = {}
        self.stop_ids = frozenset(end for end in [end_token_id(tokenizer)] if end is not None)
        self._smoothing = settings.label_smoothing
        self._text_metrics = TextMetrics(settings.metric)
        self.metric_names: Sequence[str] = self._text_metrics.names if evaluation.generate else ()
        self.max_new_tokens = evaluation.max_new_tokens or settings.max_target_length
        self._generates = evaluation.generate
        # Overrides transformers' default of 20 tokens, and never samples. The other options (length penalty, no repeated
        # n-grams, forced tokens) come from the model's generation_config.
        self._generation_options: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "max_length": None,
            "num_beams": evaluation.num_beams,
            "do_sample": False,
            "num_return_sequences": 1,
            "return_dict_in_generate": False,
            **language_generation_options(tokenizer, language),
        }

    def collate(self, rows: Mapping[str, Sequence[Any]], position: DataPosition) -> Batch:
        batch = pad_rows(self.tokenizer, {"input_ids": rows["input_ids"]}, self.padding)
        targets = row_arrays(rows["labels"])
        longest = max(1, *map(len, targets))
        labels = pad_arrays(targets, longest, fill=IGNORED)
        if self.padding.target_length is not None:
            labels = F.pad(labels, (0, self.padding.target_length - longest), value=IGNORED)
        batch["labels"] = labels
        return batch

    def row_lengths(self, split: str) -> RowLengths | None:
        """Returns the lengths of source and target, and how many tokens may be generated: all are computed."""
        rows, padding = self.splits[split], self.padding
        source = token_lengths(rows, length=padding.length)
        target = token_lengths(rows, "labels", length=padding.target_length, minimum=1)
        if source is None or target is None:
            return None
        widths, tokens = {**source.widths, **target.widths}, source.tokens + target.tokens
        generates = self._generates and split != "train"
        generated = self.max_new_tokens * int(self._generation_options["num_beams"]) if generates else 0
        return RowLengths(source.sequences, widths, tokens, source=source.source, generated=generated)

    def targets(self, batch: Batch) -> Targets:
        return count_targets(batch["labels"])

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return target_loss(model, _inputs(model, batch), batch["labels"], label_smoothing=self._smoothing)

    def score(self, module: nn.Module, batch: Batch, *, lock_step: bool) -> ScoredBatch:
        labels = batch["labels"]
        targets = (labels != IGNORED).sum(dim=1)
        losses = torch.zeros(len(labels), dtype=torch.float64, device=labels.device)
        if int(
            targets.sum()
        ):  # all examples of a split have a target or none has, so that every rank takes the same path
            losses = score_targets(module, _inputs(module, batch), labels).loss
        generated = self._generate(module, batch, lock_step=lock_step) if self._generates else None
        return ScoredBatch(losses, targets, generated)

    def _generate(self, module: Any, batch: Batch, *, lock_step: bool) -> torch.Tensor:
        """Returns (batch, max_new_tokens) int64: the generated tokens up to the end token, then pad tokens.

        With lock_step every rank calls this equally often, and a rank whose texts have ended continues with the others.
        """
        end, pad = end_token_id(self.tokenizer), self.tokenizer.pad_token_id
        assert end is not None, "prepare_seq2seq checks it"
        tokens = generate_tokens(
            module,
            {name: batch[name] for name in ("input_ids", "attention_mask")},
            self._generation_options,
            ends=self.stop_ids,
            pad=pad,
            lock_step=lock_step,
        )
        is_end = tokens == end
        after_end = (is_end.cumsum(dim=1) - is_end.long()) > 0
        return tokens.masked_fill(after_end, pad)

    def metrics(self, split: str, *, loss: float, predictions: Sequence[Any]) -> dict[str, float]:
        if not self._generates:
            return {}
        lengths = [self._length(ids) for ids in predictions]
        return self._text_metrics(self._texts(predictions), self._references(split), lengths)

    def records(self, split: str, predictions: Sequence[Any]) -> list[Mapping[str, Any]]:
        references = self._references(split)
        texts = self._texts(predictions) if self._generates else [None] * len(references)
        return [{"prediction": text, "reference": reference} for text, reference in zip(texts, references, strict=True)]

    def _texts(self, predictions: Sequence[Any]) -> list[str]:
        texts: list[str] = self.tokenizer.batch_decode(predictions, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _length(self, ids: Sequence[int]) -> int:
        """Returns the number of tokens up to and including the end token, or the model's own one, after which only pads come."""
        end = end_token_id(self.tokenizer)
        if end in ids:
            return ids.index(end) + 1
        return next((number for number in range(len(ids), 0, -1) if ids[number - 1] != self.tokenizer.pad_token_id), 0)

    def _references(self, split: str) -> Sequence[str | None]:
        """Returns the original texts of the targets in data order."""
        return read_columns(self.splits[split], "reference")["reference"]


def prepare_seq2seq(config: Config, settings: Seq2Seq, context: RankContext) -> Seq2SeqTask:
    """Collective. Tokenizes sources and targets, once per node."""
    _check_positions(config, settings, context)

    def encode(source: Source, tokenizer: Any, _meta: Meta) -> Dataset:
        set_languages(tokenizer, settings.source_lang, settings.target_lang)
        check_targets_end(tokenizer)

        def tokenize(rows: Mapping[str, Any]) -> dict[str, Any]:
            sources = [settings.prefix + text for text in rows["source"]]
            targets = rows.get("target")
            encoded = tokenizer(sources, truncation=True, max_length=config.max_length)
            inputs = fill_empty(encoded, tokenizer)["input_ids"]
            lengths = full_lengths(tokenizer, encoded["input_ids"], {"text": sources}, max_length=config.max_length)
            columns = {"input_ids": inputs, FULL_LENGTH: lengths}
            if targets is None:
                return {**columns, "labels": [None] * len(inputs), "reference": [None] * len(inputs)}
            most = settings.max_target_length
            labels = tokenizer(text_target=targets, truncation=True, max_length=most)["input_ids"]
            lengths = full_lengths(tokenizer, labels, {"text_target": targets}, max_length=most)
            return {**columns, "labels": labels, "reference": targets, FULL_TARGET_LENGTH: lengths}

        return map_rows(source, tokenize, config)

    recipe = Recipe(
        "seq2seq",
        translation_row_format(settings.source, settings.target),
        texts=lambda source: chain(column_values(source.rows, "source"), column_values(source.rows, "target")),
        encode=encode,
        max_target_length=settings.max_target_length,
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
    """Collective. Raises ConfigError if targets exceed the decoder's positions. The encoder is checked in models/."""
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


def _inputs(model: nn.Module, batch: Batch) -> dict[str, Any]:
    """Returns the model's inputs, in which each token of the target is given those before it."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    return {**inputs, "decoder_input_ids": decoder_inputs(model, batch["labels"]), "use_cache": False}
