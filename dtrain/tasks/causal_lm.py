"""The next token of a text.

A split is one stream of tokens. It is cut into blocks of `data.max_length` inputs that overlap by one token, so that every
token but the very first is a target exactly once and none is dropped. The last block may be shorter. With `task.stride`
the splits to evaluate are cut into overlapping windows instead, which give a token more context and still score it once.
With `task.packing: documents` each row of the data is a stream of its own. Several rows share a block without seeing each
other, so that the loss of a document does not depend on its neighbors. The first token of a document is not a target then.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM

from dtrain.config.schema import Config
from dtrain.config.task import CausalLm
from dtrain.console import log
from dtrain.data.columns import arrow_column, column_values, row_arrays
from dtrain.data.lengths import RowLengths, list_lengths, token_lengths
from dtrain.data.packing import pack_segments, split_into_segments
from dtrain.data.seeding import DataPosition
from dtrain.data.sources import Source
from dtrain.data.tables import TEXT
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import DataError
from dtrain.models.heads import Head
from dtrain.models.tokenizer import has_characters_only
from dtrain.tasks.documents import check_separates_documents, document_inputs
from dtrain.tasks.encoding import encode_all
from dtrain.tasks.info import TaskInfo
from dtrain.tasks.prepare import Meta, Recipe, map_rows, prepare_examples
from dtrain.tasks.protocol import IGNORED, Batch, ScoredBatch, Split, Targets
from dtrain.tasks.target_loss import score_targets, target_loss
from dtrain.tasks.tensors import count_targets, perplexity
from dtrain.tasks.truncation import report_rows_without_targets

HEAD = Head("causal_lm", AutoModelForCausalLM, logits="token", is_over_vocabulary=True, is_causal=True)


def info(settings: CausalLm) -> TaskInfo:
    """Returns the information about this task that the rest of dtrain uses."""
    return TaskInfo(
        prepare=lambda config, context: prepare_causal_lm(config, settings, context),
        head=HEAD,
        example_row={"text": "A cat sleeps."},
        prompt="continue",
        chat_format="auto",
        pipeline_tag="text-generation",
    )


class CausalLmTask:
    """Cross entropy of each next token. Metrics: perplexity per token and per word; bits per character."""

    name = "causal_lm"
    head = HEAD
    needs_padding = False

    def __init__(
        self,
        splits: Mapping[str, Split],
        tokenizer: Any,
        *,
        max_length: int,
        is_char: bool,
        words: Mapping[str, int] | None = None,
        settings: CausalLm | None = None,
    ) -> None:
        """
        Args:
            splits: Rows with `input_ids`, at most max_length + 1 of them. With `lengths` and `scored` (see data.packing)
                a row is several pieces, and not all of their tokens are targets.
            is_char: Every token is one character.
            words: Number of white-space-separated words in each split's text, for the perplexity per word. None: no such
                metric.
            settings: The settings that made the splits of a text. None: they were made elsewhere.
        """
        self.splits: Mapping[str, Split] = splits
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.head_config: dict[str, Any] = {}
        self.metric_names: Sequence[str] = (
            "perplexity",
            *(["word_perplexity"] if words is not None else []),
            *(["bits_per_character"] if is_char else []),
        )
        self._is_char = is_char
        self._words = words
        self._settings = settings
        self._is_packed = settings is not None and settings.packing == "documents"
        self._is_checked = not self._is_packed

    def collate(self, rows: Mapping[str, Sequence[Any]], position: DataPosition) -> Batch:
        ids = row_arrays(rows["input_ids"])
        lengths = rows.get("lengths") or [[len(row)] for row in ids]
        scored = rows.get("scored") or [[length - 1 for length in row] for row in lengths]
        longest = max(sum(row) - len(row) for row in lengths)
        inputs = torch.full((len(ids), longest), self.tokenizer.pad_token_id or 0)
        labels = torch.full((len(ids), longest), IGNORED)
        documents = torch.zeros((len(ids), longest), dtype=torch.int64)
        for row, tokens in enumerate(torch.from_numpy(row.astype(np.int64)) for row in ids):
            start = 0
            pieces = torch.split(tokens, list(lengths[row]))
            for number, (piece, count) in enumerate(zip(pieces, scored[row], strict=True), start=1):
                stop = start + len(piece) - 1
                inputs[row, start:stop] = piece[:-1]
                labels[row, stop - count : stop] = piece[len(piece) - count :]
                documents[row, start:stop] = number
                start = stop
        if self._is_packed:
            return {"input_ids": inputs, "document_ids": documents, "labels": labels}
        if documents.all():  # full blocks need no mask, and attention is faster without a mask
            return {"input_ids": inputs, "labels": labels}
        return {"input_ids": inputs, "attention_mask": (documents != 0).long(), "labels": labels}

    def row_lengths(self, split: str) -> RowLengths | None:
        """Returns the number of inputs of each row: the last token of a piece is none."""
        rows = self.splits[split]
        pieces = list_lengths(rows, "lengths")
        return token_lengths(rows, left_out=1 if pieces is None else pieces)

    def targets(self, batch: Batch) -> Targets:
        return count_targets(batch["labels"])

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return target_loss(model, self._inputs(model, batch), batch["labels"])

    def score(self, module: nn.Module, batch: Batch, *, lock_step: bool) -> ScoredBatch:
        scores = score_targets(module, self._inputs(module, batch), batch["labels"])
        return ScoredBatch(scores.loss, scores.targets, None)

    def metrics(self, split: str, *, loss: float, predictions: Sequence[Any]) -> dict[str, float]:
        values = {"perplexity": perplexity(loss)}
        tokens = self._scored_tokens(split)
        if self._words is not None:
            values["word_perplexity"] = perplexity(loss * tokens / max(self._words[split], 1))
        if self._is_char:
            values["bits_per_character"] = loss / math.log(2)
        log.info("%s", self._describe(split, loss * tokens, tokens, values))
        return values

    def records(self, split: str, predictions: Sequence[Any]) -> list[Mapping[str, Any]]:
        return [{"prediction": None, "reference": None} for _ in range(len(self.splits[split]))]

    def _scored_tokens(self, split: str) -> int:
        rows: Any = self.splits[split]
        if isinstance(rows, Dataset):  # without a Python object for each token
            if "scored" in rows.column_names:
                return int(pc.sum(pc.list_flatten(arrow_column(rows, "scored"))).as_py() or 0)
            lengths = list_lengths(rows, "input_ids")
            assert lengths is not None, "a causal language model's rows are lists of tokens"
            return int(lengths.sum()) - len(rows)
        columns = rows[list(range(len(rows)))]
        if "scored" in columns:
            return sum(map(sum, columns["scored"]))
        return sum(len(ids) - 1 for ids in columns["input_ids"])

    def _describe(self, split: str, nll: float, tokens: int, metrics: Mapping[str, float]) -> str:
        """Returns a line with everything that must be equal for two perplexities to be comparable."""
        words = f" and {self._words[split]} words" if self._words is not None else ""
        how = [f"blocks of {self.max_length}"]
        if self._settings is not None:
            joined = f"rows joined by {self._settings.joiner!r}"
            stride = self._settings.stride or self.max_length
            how = ["each row a document" if self._is_packed else joined, *how, f"stride {stride}", "no BOS"]
        values = ", ".join(f"{name} {value:.6g}" for name, value in metrics.items())
        return f"{split}: {values} (nll {nll:.6f} nats over {tokens} tokens{words}; {', '.join(how)})"

    def _inputs(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        if not self._is_checked:
            check_separates_documents(model, max_length=self.max_length)
            self._is_checked = True
        inputs: dict[str, Any] = {key: value for key, value in batch.items() if key not in ("labels", "document_ids")}
        if self._is_packed:
            inputs.update(document_inputs(batch["document_ids"], next(model.parameters()).dtype))
        return {**inputs, "use_cache": False}


def prepare_causal_lm(config: Config, settings: CausalLm, context: RankContext) -> CausalLmTask:
    """Collective. Tokenizes each split into blocks or windows, once per node."""
    is_packed = settings.packing == "documents"

    def texts(source: Source) -> Iterable[str]:
        rows: Iterable[str] = column_values(source.rows, "text")
        return rows if is_packed else [settings.joiner.join(rows)]

    def describe(sources: Mapping[str, Source], tokenizer: Any) -> Meta:
        if has_characters_only(tokenizer):  # bits per character need no definition of a word
            return {"words": None}
        return {"words": {split: sum(map(_count_words, texts(source))) for split, source in sources.items()}}

    def encode(source: Source, tokenizer: Any, _meta: Meta) -> Dataset:
        stride = config.max_length if source.split == "train" else settings.stride or config.max_length
        if is_packed and len(source.rows) == 1:
            log.warning(
                "data: %s is a single document: task.packing=documents packs the rows of a table", source.origin
            )
        streams = _documents(source, tokenizer, config) if is_packed else [_ids(next(iter(texts(source))), tokenizer)]
        pieces = [
            piece for ids in streams for piece in split_into_segments(ids, max_length=config.max_length, stride=stride)
        ]
        if not pieces:
            content = "documents of at most one token" if is_packed else f"{len(streams[0])} token(s)"
            raise DataError(f"{source.origin} has {content}, but a next token needs at least two: use a longer text.")
        if is_packed:
            report_rows_without_targets(source, sum(len(ids) > 1 for ids in streams))
        return Dataset.from_dict(pack_segments(pieces, row_length=config.max_length if is_packed else None))

    recipe = Recipe(
        "causal_lm-2",
        TEXT,
        texts=texts,
        encode=encode,
        describe=describe,
        options=settings.model_dump(mode="json"),
        needs_padding=False,
    )
    examples = prepare_examples(recipe, config, context)
    return CausalLmTask(
        examples.splits,
        examples.tokenizer,
        max_length=config.max_length,
        is_char=has_characters_only(examples.tokenizer),
        words=examples.meta["words"],
        settings=settings,
    )


def _ids(text: str, tokenizer: Any) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return ids


def _documents(source: Source, tokenizer: Any, config: Config) -> Sequence[list[int]]:
    """Returns the tokens of each row."""

    def tokenize(rows: Mapping[str, Any]) -> Mapping[str, Any]:
        return {"input_ids": encode_all(tokenizer, rows["text"], special_tokens=False).columns["input_ids"]}

    documents: Sequence[list[int]] = map_rows(source, tokenize, config)["input_ids"]
    return documents


def _count_words(text: str) -> int:
    return sum(1 for _ in re.finditer(r"\S+", text))  # equals len(text.split()) without making the list
