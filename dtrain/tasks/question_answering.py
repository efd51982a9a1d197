"""The answer to a question as a span of a text (SQuAD).

With task.no_answer a context may not answer the question (SQuAD 2). Position 0 is then the target of all of its windows.

An example is one question. A context longer than data.max_length is cut into windows, and neighboring windows share
task.doc_stride tokens. A batch holds all windows of its examples. Each window is one target: the positions at which the
answer starts and ends, or position 0 (the [CLS] token) for both if the window does not contain the complete answer. The
loss is the sum over windows of (start + end) / 2, each a cross entropy over the window's tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import nn
from transformers import AutoModelForQuestionAnswering

from dtrain.config.schema import Config
from dtrain.config.task import QuestionAnswering
from dtrain.console import log
from dtrain.data.columns import flat_rows, row_arrays
from dtrain.data.questions import questions
from dtrain.data.seeding import DataPosition
from dtrain.data.sources import Source
from dtrain.distributed.rank_context import RankContext
from dtrain.errors import ConfigError, DataError
from dtrain.models.heads import Head
from dtrain.tasks.answers import NOT_IN_CONTEXT, best_spans, squad2_scores, squad_scores
from dtrain.tasks.info import TaskInfo
from dtrain.tasks.prepare import Meta, Recipe, map_rows, prepare_examples, read_columns
from dtrain.tasks.protocol import IGNORED, Batch, Padding, ScoredBatch, Split, Targets
from dtrain.tasks.tensors import full_precision, pad_arrays, pad_rows

INPUTS = ("input_ids", "token_type_ids", "attention_mask")

HEAD = Head("question_answering", AutoModelForQuestionAnswering, logits=None)


def info(settings: QuestionAnswering) -> TaskInfo:
    """Returns the information about this task that the rest of dtrain uses."""
    return TaskInfo(
        prepare=lambda config, context: prepare_question_answering(config, settings, context),
        head=HEAD,
        example_row={"question": "Who came?", "context": "Ann came late."},
        text_columns=("question", "context"),
        needs_text_pair=True,
        format_prediction=lambda text, _row, _columns: text or "(no answer in this text)",
        pipeline_tag="question-answering",
    )


class QuestionAnsweringTask:
    """Cross entropy of the answer's first and last token. Metrics: SQuAD's exact match and F1, in percent."""

    name = "question_answering"
    head = HEAD
    needs_padding = True
    padding = Padding()
    metric_names: Sequence[str] = ("exact_match", "f1")

    def __init__(
        self, splits: Mapping[str, Split], tokenizer: Any, settings: QuestionAnswering, *, max_length: int
    ) -> None:
        """
        Args:
            splits: Rows with `input_ids`, `token_type_ids`, `offset_starts` and `offset_ends` (characters of the context;
                -1 for other tokens), a list for each window; `start_positions` and `end_positions`, a number for each
                window (None: no label); and `context`, `answers` (None: unknown), `id`.
        """
        self.splits: Mapping[str, Split] = splits
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.head_config: dict[str, Any] = {"num_labels": 2}  # an output for the start, one for the end
        self._settings = settings
        if settings.no_answer:
            parts = ("has_answer_exact_match", "has_answer_f1", "no_answer_exact_match", "no_answer_f1")
            self.metric_names = (*self.metric_names, *parts)

    def collate(self, rows: Mapping[str, Sequence[Any]], position: DataPosition) -> Batch:
        """Returns all windows of the rows: inputs (windows, length), offsets (windows, length, 2), positions (windows,).

        `example`, (windows,), is the row of this batch that a window belongs to, in order. Each row has a window.
        """
        inputs = {key: flat_rows(rows[key]) for key in INPUTS if key in rows}
        # Always on the right: positions count from the start of the window.
        batch = pad_rows(self.tokenizer, inputs, Padding("right", self.padding.length))
        batch["offsets"] = torch.full((*batch["input_ids"].shape, 2), NOT_IN_CONTEXT)
        for side, key in enumerate(("offset_starts", "offset_ends")):
            offsets = pad_arrays(row_arrays(flat_rows(rows[key])), batch["input_ids"].shape[1], fill=NOT_IN_CONTEXT)
            batch["offsets"][:, :, side] = offsets
        for key in ("start_positions", "end_positions"):
            batch[key] = torch.tensor(
                [IGNORED if position is None else position for position in chain.from_iterable(rows[key])]
            )
        windows = torch.tensor([len(ids) for ids in rows["input_ids"]])
        batch["example"] = torch.arange(len(windows)).repeat_interleave(windows)
        return batch

    def targets(self, batch: Batch) -> Targets:
        """Returns the targets: one for each window."""
        count = int((batch["start_positions"] != IGNORED).sum())
        return Targets(float(count), count)

    def loss(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        return _losses(*_logits(model, batch), batch).sum()

    def score(self, module: nn.Module, batch: Batch, *, lock_step: bool) -> ScoredBatch:
        """Returns as prediction (batch, 2) the characters of the context where the answer starts and ends."""
        start, end = _logits(module, batch)
        windows = torch.unique_consecutive(batch["example"], return_counts=True)[1].tolist()
        targets = (batch["start_positions"] != IGNORED).long()
        spans = best_spans(
            start,
            end,
            batch["offsets"],
            windows,
            n_best=self._settings.n_best,
            max_answer_length=self._settings.max_answer_length,
            no_answer_threshold=self._settings.no_answer_threshold if self._settings.no_answer else None,
        )
        losses = _losses(start, end, batch).double()
        return ScoredBatch(_by_example(losses, windows), _by_example(targets, windows), spans)

    def metrics(self, split: str, *, loss: float, predictions: Sequence[Any]) -> dict[str, float]:
        labeled = [record for record in self.records(split, predictions) if record["reference"] is not None]
        if not labeled:
            return {}
        scores = squad2_scores if self._settings.no_answer else squad_scores
        return scores([record["prediction"] for record in labeled], [record["reference"] for record in labeled])

    def records(self, split: str, predictions: Sequence[Any]) -> list[Mapping[str, Any]]:
        """Returns records. `prediction` is the text of the span, `reference` all answers that count as correct."""
        columns = read_columns(self.splits[split], "context", "answers", "id")
        return [
            {
                "prediction": context[begin:stop] if begin != NOT_IN_CONTEXT else "",
                "reference": answers,
                **({} if identity is None else {"id": identity}),
            }
            for context, answers, identity, (begin, stop) in zip(
                columns["context"], columns["answers"], columns["id"], predictions, strict=True
            )
        ]


_PLACES = ("offset_starts", "offset_ends", "start_positions", "end_positions")


def prepare_question_answering(
    config: Config, settings: QuestionAnswering, context: RankContext
) -> QuestionAnsweringTask:
    """Collective. Tokenizes each split into windows, once per node."""

    def encode(source: Source, tokenizer: Any, _meta: Meta) -> Dataset:
        _check_tokenizer(tokenizer, settings, config.max_length)
        file = f"{source.origin}, {source.unit}"

        def windows(rows: Mapping[str, Any]) -> dict[str, Any]:
            places = [f"{file} {line}" for line in rows["line"]]
            return encode_windows(rows, tokenizer, places, max_length=config.max_length, doc_stride=settings.doc_stride)

        examples = map_rows(source, windows, config)
        report_lost_answers(source.split, examples, max_length=config.max_length)
        return examples

    recipe = Recipe(
        "question_answering",
        questions(allows_none=settings.no_answer),
        texts=_texts,
        encode=encode,
        options={"doc_stride": settings.doc_stride},
    )
    examples = prepare_examples(recipe, config, context)
    return QuestionAnsweringTask(examples.splits, examples.tokenizer, settings, max_length=config.max_length)


def encode_windows(
    rows: Mapping[str, Any], tokenizer: Any, places: Sequence[str], *, max_length: int, doc_stride: int
) -> dict[str, Any]:
    """Returns the rows of QuestionAnsweringTask's splits.

    Args:
        rows: Columns context, question, id and, if they are known, answers and answer_starts.
        places: "file, row 3" of each row, for messages.

    Raises:
        DataError: a question leaves too little of max_length for the context.
    """
    _check_questions(rows["question"], tokenizer, places, max_length=max_length, doc_stride=doc_stride)
    encoded = tokenizer(
        rows["question"],
        rows["context"],
        truncation="only_second",
        max_length=max_length,
        stride=doc_stride,
        return_overflowing_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
    )
    number = len(rows["question"])
    answers = rows.get("answers") or [None] * number
    starts = rows.get("answer_starts") or [None] * number
    tokens = [key for key in INPUTS if key in encoded]
    columns: dict[str, list[list[Any]]] = {key: [[] for _ in range(number)] for key in (*tokens, *_PLACES)}
    for window, row in enumerate(encoded["overflow_to_sample_mapping"]):
        if not encoded["input_ids"][window]:
            raise DataError(f"{places[row]}: question and context are both empty")
        for key in tokens:
            columns[key][row].append(encoded[key][window])
        offsets = [
            pair if part == 1 else (NOT_IN_CONTEXT, NOT_IN_CONTEXT)
            for pair, part in zip(encoded["offset_mapping"][window], encoded.sequence_ids(window), strict=True)
        ]
        columns["offset_starts"][row].append([begin for begin, _ in offsets])
        columns["offset_ends"][row].append([stop for _, stop in offsets])
        first, last = None, None
        if answers[row]:  # of several answers the first one is the target
            begin = starts[row][0]
            first, last = token_positions(offsets, begin, begin + len(answers[row][0]))
        elif answers[row] is not None:
            first, last = 0, 0
        columns["start_positions"][row].append(first)
        columns["end_positions"][row].append(last)
    return {**columns, "context": rows["context"], "answers": answers, "id": rows["id"]}


def report_lost_answers(split: str, examples: Split, *, max_length: int) -> None:
    """Logs how many questions have an answer that no window holds as a whole, so that the windows say "not here"."""
    columns = read_columns(examples, "answers", "start_positions")
    lost = sum(
        bool(answers) and not any(starts)
        for answers, starts in zip(columns["answers"], columns["start_positions"], strict=True)
    )
    if lost:
        log.warning(
            "data: %s: %d of %d questions have an answer that no window of data.max_length=%d tokens holds: the model learns "
            "that they have none. Increase data.max_length or task.doc_stride",
            *(split, lost, len(columns["answers"]), max_length),
        )


def token_positions(offsets: Sequence[tuple[int, int]], begin: int, stop: int) -> tuple[int, int]:
    """Returns the first and last token of a window that share a character with the answer.

    Args:
        offsets: First character of each token in the context and the one after its last; NOT_IN_CONTEXT for other tokens.
        begin: The answer's first character.
        stop: The character after the answer's last.

    Returns:
        (0, 0) if the window does not contain the complete answer.
    """
    inside = [token for token, (first, _) in enumerate(offsets) if first != NOT_IN_CONTEXT]
    if not inside or offsets[inside[0]][0] > begin or offsets[inside[-1]][1] < stop:
        return 0, 0
    overlapping = [token for token in inside if offsets[token][1] > begin and offsets[token][0] < stop]
    return (overlapping[0], overlapping[-1]) if overlapping else (0, 0)


def _check_tokenizer(tokenizer: Any, settings: QuestionAnswering, max_length: int) -> None:
    if not tokenizer.is_fast:
        raise ConfigError(
            f"{type(tokenizer).__name__} does not map tokens to characters, which locate an answer in its text. Set "
            "model.tokenizer to a tokenizer with a tokenizer.json (a fast tokenizer)."
        )
    if settings.doc_stride + tokenizer.num_special_tokens_to_add(pair=True) >= max_length:
        raise ConfigError(
            f"task.doc_stride={settings.doc_stride} leaves no room in data.max_length={max_length}: it is the number of "
            "tokens that two neighboring windows share. Decrease it, or increase data.max_length (384 is usual)."
        )


def _check_questions(
    questions: Sequence[str], tokenizer: Any, places: Sequence[str], *, max_length: int, doc_stride: int
) -> None:
    longest = max_length - tokenizer.num_special_tokens_to_add(pair=True) - doc_stride - 1
    tokens = tokenizer(list(questions), add_special_tokens=False, return_attention_mask=False, verbose=False)
    for place, ids in zip(places, tokens["input_ids"], strict=True):
        if len(ids) > longest:
            raise DataError(
                f"{place}: the question has {len(ids)} tokens, expected at most {longest}: data.max_length={max_length} "
                f"must hold it and more than task.doc_stride={doc_stride} tokens of the context. Change one of the two "
                "settings, shorten the question, or skip such rows with data.max_bad_rows"
            )


def _texts(source: Source) -> Iterator[str]:
    for row in source.rows:
        yield row["question"]
        yield row["context"]


def _logits(model: nn.Module, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns logits of the start and of the end, (windows, length) each. Padding gets the lowest value."""
    output = model(**{key: batch[key] for key in INPUTS if key in batch})
    if getattr(output, "end_logits", None) is None:
        raise ConfigError(
            f"{type(model).__name__} has no start and end logits for each token (it searches spans itself), which this "
            "task needs. Use another model, such as BERT."
        )
    padding = batch["attention_mask"] == 0
    start, end = full_precision(output.start_logits), full_precision(output.end_logits)
    # Otherwise the loss of a window would depend on the longest window in its batch.
    lowest = torch.finfo(start.dtype).min
    return start.masked_fill(padding, lowest), end.masked_fill(padding, lowest)


def _losses(start: torch.Tensor, end: torch.Tensor, batch: Batch) -> torch.Tensor:
    """Returns (windows,) losses in nats, 0 without a label."""
    first = F.cross_entropy(start, batch["start_positions"], ignore_index=IGNORED, reduction="none")
    last = F.cross_entropy(end, batch["end_positions"], ignore_index=IGNORED, reduction="none")
    return (first + last) / 2


def _by_example(values: torch.Tensor, windows: Sequence[int]) -> torch.Tensor:
    """Returns the sum over each example's windows, always added in the same order."""
    return torch.stack([part.sum() for part in torch.split(values, list(windows))])
