"""Questions about a text with answers quoted from it: SQuAD's nested JSON, or one question per row.

A row is {id, context, question, answers}, where answers is {text: [...], answer_start: [...]} or a list of {text,
answer_start}. answer_start counts characters (Unicode code points) from 0. `data.columns` can name other columns. In SQuAD 2
answers is empty where the context does not answer the question.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import pyarrow as pa

from dtrain.data.readers import Row, Values
from dtrain.data.tables import Origin, RowConverter, RowFormat, configured_columns, get_text, get_value, require_text
from dtrain.errors import DataError

OURS = ("context", "question", "answers", "id")


def _unnested(rows: Iterable[Row], origin: Origin) -> Iterator[Row]:
    """Yields the questions of SQuAD's articles ({paragraphs: [{context, qas: [...]}]}), renumbered; other rows unchanged."""
    number = 0
    for line, values in rows:
        if isinstance(values, DataError) or "paragraphs" not in values:
            number += 1
            yield line, values
            continue
        for question in _questions(values, f"{origin.name}, article {line}"):
            number += 1
            yield number if origin.unit == "row" else line, question


def _questions(article: Values, location: str) -> Iterator[Values | DataError]:
    for position, paragraph in enumerate(_list(article["paragraphs"]), start=1):
        here = f"{location}, paragraph {position}"
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


def _converter(first: Values, origin: Origin, *, allows_none: bool) -> RowConverter:
    columns = list(first)
    configured = configured_columns(columns, origin, OURS)
    names = {our: configured.get(our, our) for our in OURS}
    for our in ("context", "question", "answers") if origin.needs_label else ("context", "question"):
        if names[our] not in columns:
            raise DataError(
                f"{origin.name} has no column {our}. A question has context, question and answers (text and "
                f"answer_start). Its columns: {', '.join(columns)}. Name the right one: data.columns.{our}=COLUMN"
            )
    # A test split has answers in all rows or in none.
    has_answers = origin.needs_label or bool(_answers(first.get(names["answers"]), names["answers"], origin.name))

    def convert(values: Values, location: str) -> dict[str, Any]:
        context = get_text(values, names["context"], location)
        identity = values.get(names["id"])
        row: dict[str, Any] = {
            "id": None if identity is None else str(identity),
            "context": context,
            "question": get_text(values, names["question"], location),
        }
        if has_answers:
            answers = _answers(get_value(values, names["answers"], location), names["answers"], location)
            if not answers and not allows_none:
                raise DataError(
                    f"{location}: the question has no answer. If that may be so, as in SQuAD 2, set task.no_answer=true; "
                    "otherwise remove such rows, or skip them with data.max_bad_rows"
                )
            for text, start in answers:
                _check_answer(text, start, context, location)
            row["answers"] = [text for text, _ in answers]
            row["answer_starts"] = [start for _, start in answers]
        return row

    fields = [("id", pa.string()), ("context", pa.string()), ("question", pa.string())]
    if has_answers:
        fields += [("answers", pa.list_(pa.string())), ("answer_starts", pa.list_(pa.int64()))]
    return RowConverter(pa.schema(fields), convert)


def _answers(value: Any, name: str, location: str) -> list[tuple[Any, Any]]:
    """Returns (text, answer_start) of each answer, not yet checked."""
    if value is None:
        return []
    if isinstance(value, Mapping) and {"text", "answer_start"} <= set(value):
        texts, starts = _list(value["text"]), _list(value["answer_start"])
        if len(texts) != len(starts):
            raise DataError(f"{location}: {name} has {len(texts)} text but {len(starts)} answer_start: each needs both")
        return list(zip(texts, starts, strict=True))
    if isinstance(value, list) and all(isinstance(one, Mapping) for one in value):
        return [(one.get("text"), one.get("answer_start")) for one in value]
    raise DataError(
        f'{location}: expected {name} such as {{"text": ["1066"], "answer_start": [17]}}, found {value!r:.120}. CSV and '
        "TSV do not support this: use JSON, JSONL or Parquet"
    )


def _check_answer(text: Any, start: Any, context: str, location: str) -> None:
    if not require_text(text, "the text of an answer", location):
        raise DataError(f"{location}: the text of an answer is empty")
    if not isinstance(start, int) or isinstance(start, bool):
        raise DataError(f"{location}: answer_start of {text!r:.80} must be a number of characters, found {start!r}")
    actual = context[start : start + len(text)] if start >= 0 else ""
    if actual != text:
        position = context.find(text)
        hint = f"it is at {position}" if position >= 0 else "it is not in the context"
        raise DataError(
            f"{location}: answer_start={start} does not fit: expected {text!r:.80} there, found {actual!r:.80} ({hint}). "
            "answer_start counts characters, not bytes, from 0"
        )


def questions(*, allows_none: bool) -> RowFormat:
    """Returns the format of questions.

    Args:
        allows_none: Whether a question may have no answer.
    """
    name = "questions, some without answer" if allows_none else "questions"
    return RowFormat(name, partial(_converter, allows_none=allows_none), unnest=_unnested)
