"""Questions about a text whose answers are places in it: SQuAD's nested JSON, or a row for each question.

A row is {id, context, question, answers}, where answers is {text: [...], answer_start: [...]} or a list of {text,
answer_start}; answer_start counts characters (Unicode code points) from 0 on. Other names by `data.columns`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa

from dtrain.data.readers import Row, Values
from dtrain.data.tables import Layout, Origin, Shape, checked_text, given_columns, text_of, value_of
from dtrain.errors import DataError

OURS = ("context", "question", "answers", "id")


def _unnested(rows: Iterable[Row], origin: Origin) -> Iterator[Row]:
    """The questions of SQuAD's articles ({paragraphs: [{context, qas: [...]}]}), numbered through; others as they are."""
    number = 0
    for line, values in rows:
        if isinstance(values, DataError) or "paragraphs" not in values:
            number += 1
            yield line, values
            continue
        for question in _questions(values, f"{origin.name}, article {line}"):
            number += 1
            yield number if origin.unit == "row" else line, question


def _questions(article: Values, place: str) -> Iterator[Values | DataError]:
    for position, paragraph in enumerate(_list(article["paragraphs"]), start=1):
        here = f"{place}, paragraph {position}"
        questions = _list(paragraph.get("qas")) if isinstance(paragraph, Mapping) else []
        if not questions or not isinstance(paragraph, Mapping) or "context" not in paragraph:
            yield DataError(f"{here}: expected a context and a list qas of questions, as in SQuAD's files")
            continue
        for question in questions:
            if isinstance(question, Mapping):
                yield {**question, "context": paragraph["context"]}
            else:
                yield DataError(f"{here}: expected a question with its answers, found {question!r:.80}")


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _layout(first: Values, origin: Origin) -> Layout:
    found = list(first)
    given = given_columns(found, origin, OURS)
    names = {our: given.get(our, our) for our in OURS}
    for our in ("context", "question", "answers") if origin.needs_label else ("context", "question"):
        if names[our] not in found:
            raise DataError(
                f"{origin.name} has no column {our}. A question has context, question and answers (text and "
                f"answer_start). Its columns: {', '.join(found)}. Say which it is: data.columns={{{our}: ...}}"
            )
    # A test split has answers in all rows or in none.
    answered = origin.needs_label or bool(_answers(first.get(names["answers"]), names["answers"], origin.name))

    def convert(values: Values, place: str) -> dict[str, Any]:
        context = text_of(values, names["context"], place)
        identity = values.get(names["id"])
        row: dict[str, Any] = {
            "id": None if identity is None else str(identity),
            "context": context,
            "question": text_of(values, names["question"], place),
        }
        if answered:
            answers = _answers(value_of(values, names["answers"], place), names["answers"], place)
            if not answers:
                raise DataError(
                    f"{place}: the question has no answer. This task learns and judges questions that the context "
                    "answers, as in SQuAD 1.1: drop the others, or pass over so many of them: data.max_bad_rows"
                )
            for text, start in answers:
                _check_answer(text, start, context, place)
            row["answers"] = [text for text, _ in answers]
            row["answer_starts"] = [start for _, start in answers]
        return row

    columns = [("id", pa.string()), ("context", pa.string()), ("question", pa.string())]
    if answered:
        columns += [("answers", pa.list_(pa.string())), ("answer_starts", pa.list_(pa.int64()))]
    return Layout(pa.schema(columns), convert)


def _answers(value: Any, name: str, place: str) -> list[tuple[Any, Any]]:
    """(text, answer_start) of each answer, not yet checked."""
    if value is None:
        return []
    if isinstance(value, Mapping) and {"text", "answer_start"} <= set(value):
        texts, starts = _list(value["text"]), _list(value["answer_start"])
        if len(texts) != len(starts):
            raise DataError(f"{place}: {name} has {len(texts)} text but {len(starts)} answer_start: one for each")
        return list(zip(texts, starts, strict=True))
    if isinstance(value, list) and all(isinstance(one, Mapping) for one in value):
        return [(one.get("text"), one.get("answer_start")) for one in value]
    raise DataError(
        f'{place}: expected {name} such as {{"text": ["1066"], "answer_start": [17]}}, found {value!r:.120}. CSV and '
        "TSV cannot hold them: use JSON, JSONL or Parquet"
    )


def _check_answer(text: Any, start: Any, context: str, place: str) -> None:
    if not checked_text(text, "the text of an answer", place):
        raise DataError(f"{place}: the text of an answer is empty")
    if not isinstance(start, int) or isinstance(start, bool):
        raise DataError(f"{place}: answer_start of {text!r:.80} must be a number of characters, found {start!r}")
    there = context[start : start + len(text)] if start >= 0 else ""
    if there != text:
        where = context.find(text)
        cure = f"it stands at {where}" if where >= 0 else "it is not in the context"
        raise DataError(
            f"{place}: answer_start={start} does not fit: expected {text!r:.80} there, found {there!r:.80} ({cure}). "
            "answer_start counts characters, not bytes, from 0 on"
        )


QUESTIONS = Shape("questions", _layout, unnest=_unnested)
