"""Dialogues: the next token of every turn, or of the assistant's turns only."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import nn

from dtrain.config.schema import Config
from dtrain.config.task import Chat
from dtrain.console import log
from dtrain.data.columns import column_values, row_arrays
from dtrain.data.dialogues import dialogue_row_format
from dtrain.data.lengths import RowLengths, token_lengths
from dtrain.data.seeding import DataPosition
from dtrain.data.sources import Source
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import DataError
from dtrain.models.chat_format import ChatFormat, choose_format, encode_truncated
from dtrain.models.chat_template import ChatMessage
from dtrain.models.encoded_dialogue import EncodedDialogue
from dtrain.tasks.causal_lm import HEAD
from dtrain.tasks.info import TaskInfo
from dtrain.tasks.prepare import Meta, Recipe, map_rows, prepare_examples
from dtrain.tasks.protocol import IGNORED, Batch, ScoredBatch, Split, Targets
from dtrain.tasks.target_loss import score_targets, target_loss
from dtrain.tasks.tensors import count_targets, perplexity
from dtrain.tasks.truncation import FULL_LENGTH


def info(settings: Chat) -> TaskInfo:
    """Returns the information about this task that the rest of dtrain uses."""
    return TaskInfo(
        prepare=lambda config, context: prepare_chat(config, settings, context),
        head=HEAD,
        example_row={"prompt": "Where is the cat?"},
        text_columns=("prompt",),
        prompt="reply",
        chat_format=settings.format,
        pipeline_tag="text-generation",
    )


class ChatTask:
    """Cross entropy of each next token that is a target. Metrics: perplexity, and accuracy of the most likely token."""

    name = "chat"
    head = HEAD
    needs_padding = False  # padding is masked and is no target, so that any token can be used for it
    metric_names: Sequence[str] = ("perplexity", "accuracy")

    def __init__(self, splits: Mapping[str, Split], tokenizer: Any, chat: ChatFormat, *, max_length: int) -> None:
        """
        Args:
            splits: Rows with `input_ids`, at most max_length of them, and `is_target` for each token.
            chat: The format that the rows were encoded in.
        """
        self.splits: Mapping[str, Split] = splits
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.head_config: dict[str, Any] = dict(chat.head_config)
        self.stop_ids = chat.stop_ids
        self._padding: int = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0

    def collate(self, rows: Mapping[str, Sequence[Any]], position: DataPosition) -> Batch:
        tokens = row_arrays(rows["input_ids"])
        longest = max(max(map(len, tokens)) - 1, 1)
        shape = (len(tokens), longest)
        inputs, labels = torch.full(shape, self._padding), torch.full(shape, IGNORED)
        mask = torch.zeros(shape, dtype=torch.int64)
        for row, (row_tokens, is_target) in enumerate(zip(tokens, row_arrays(rows["is_target"]), strict=True)):
            ids = torch.from_numpy(row_tokens.astype(np.int64))
            used = len(ids) - 1  # the last token has no next token
            inputs[row, :used] = ids[:-1]
            labels[row, :used] = ids[1:].masked_fill(torch.from_numpy(is_target[1:] == 0), IGNORED)
            mask[row, : max(used, 1)] = 1  # attention to no token at all is nan
        return {"input_ids": inputs, "attention_mask": mask, "labels": labels}

    def row_lengths(self, split: str) -> RowLengths | None:
        """Returns the number of inputs of each row: the last token is none."""
        return token_lengths(self.splits[split], left_out=1, minimum=1)

    def targets(self, batch: Batch) -> Targets:
        return count_targets(batch["labels"])

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return target_loss(model, _inputs(batch), batch["labels"])

    def score(self, module: nn.Module, batch: Batch, *, lock_step: bool) -> ScoredBatch:
        """Returns as prediction (batch, 2) how many targets were the most likely token, and the number of targets."""
        scores = score_targets(module, _inputs(batch), batch["labels"])
        return ScoredBatch(scores.loss, scores.targets, torch.stack([scores.correct, scores.targets], dim=1))

    def metrics(self, split: str, *, loss: float, predictions: Sequence[Any]) -> dict[str, float]:
        correct, count = (sum(column) for column in zip(*predictions, strict=True))
        return {"perplexity": perplexity(loss), "accuracy": correct / count}

    def records(self, split: str, predictions: Sequence[Any]) -> list[Mapping[str, Any]]:
        """Returns records without texts: `correct` is the number of targets that were the most likely token."""
        return [{"prediction": None, "reference": None, "correct": int(correct)} for correct, _ in predictions]


def _inputs(batch: Batch) -> dict[str, Any]:
    return {**{key: value for key, value in batch.items() if key != "labels"}, "use_cache": False}


def prepare_chat(config: Config, settings: Chat, context: RankContext) -> ChatTask:
    """Collective. Encodes each dialogue, once per node. A dialogue without a target is a bad row."""
    replies_only = settings.loss_on == "replies"

    def describe(_sources: Mapping[str, Source], tokenizer: Any) -> Meta:
        return {"format": choose_format(tokenizer, settings.format).name}

    def encode(source: Source, tokenizer: Any, meta: Meta) -> Dataset:
        chat = choose_format(tokenizer, meta["format"])

        def tokenize(rows: Mapping[str, Any]) -> dict[str, list[Any]]:
            columns: dict[str, list[Any]] = {"input_ids": [], "is_target": [], FULL_LENGTH: []}
            for line, messages in zip(rows["line"], rows["turns"], strict=True):
                try:
                    examples, longest = _examples(
                        chat, messages, config.max_length, replies_only=replies_only, needs_targets=source.needs_label
                    )
                except DataError as error:
                    raise DataError(f"{source.origin}, {source.unit} {line}: {error}") from None
                for number, example in enumerate(examples):
                    values = (example.ids, example.is_target, longest if number == 0 else 0)
                    for column, value in zip(columns, values, strict=True):
                        columns[column].append(value)
            return columns

        return map_rows(source, tokenize, config)

    recipe = Recipe(
        "chat-2",
        dialogue_row_format(needs_reply=replies_only),
        texts=_texts,
        encode=encode,
        describe=describe,
        options={"format": settings.format, "loss_on": settings.loss_on},
        needs_padding=False,
    )
    examples = prepare_examples(recipe, config, context)
    chat = choose_format(examples.tokenizer, examples.meta["format"])
    if chat.warning is not None:
        log.warning("%s", chat.warning)
    return ChatTask(examples.splits, examples.tokenizer, chat, max_length=config.max_length)


def _examples(
    chat: ChatFormat,
    messages: Sequence[ChatMessage],
    max_length: int,
    *,
    replies_only: bool,
    needs_targets: bool,
) -> tuple[list[EncodedDialogue], int]:
    """Returns what `encode_truncated` does.

    Raises:
        DataError: the dialogue cannot be encoded, or has no target.
    """
    examples, longest = encode_truncated(chat, messages, max_length=max_length, replies_only=replies_only)
    if needs_targets and not any(example.has_targets for example in examples):
        if longest > max_length:
            reason = (
                f"the first data.max_length={max_length} of its {longest} tokens have no target. Set "
                f"data.max_length={longest}, or skip such rows with data.max_bad_rows"
            )
        else:
            reason = (
                "the chat template writes no token of a reply (or marks none with {% generation %}). Remove the dialogue, "
                "or skip such rows with data.max_bad_rows"
            )
        raise DataError(f"a dialogue without a target: {reason}")
    return examples, longest


def _texts(source: Source) -> Iterator[str]:
    for turns in column_values(source.rows, "turns"):
        for turn in turns:
            yield turn["content"]
