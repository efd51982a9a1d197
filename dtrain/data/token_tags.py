"""Sentences with a tag for each word: CoNLL's text format, or rows with a list of tokens and a list of tags.

In CoNLL's text, a line has a token, optional further columns, and its tag, separated by blanks or tabs. An empty line
ends a sentence, and lines that begin with -DOCSTART- are skipped. In tables, the columns are tokens (or words) and tags
(ner_tags, labels). `data.columns` can name other columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from dtrain.data.columns import column_values
from dtrain.data.encodings import text_lines
from dtrain.data.label_names import label_text
from dtrain.data.readers import TEXT_SUFFIXES, Row, Values
from dtrain.data.sources import Source, fixed_label_names, label_order
from dtrain.data.tables import (
    Origin,
    RowConverter,
    RowFormat,
    configured_columns,
    get_value,
    missing_column,
    require_text,
)
from dtrain.errors import DataError

TOKEN_COLUMNS = ("tokens", "words")
TAG_COLUMNS = ("tags", "ner_tags", "labels")


def tag_names(sources: Mapping[str, Source]) -> tuple[str, ...]:
    """Returns the tags in the order of their ids: those that the source defines, else the sorted training tags.

    Raises:
        DataError: a row has another tag, or there is no train split to take the tags from.
    """
    names = fixed_label_names(sources)
    if names is None:
        if "train" not in sources:
            raise DataError("there is no train split to take the tags from: name one in data.splits")
        names = tuple(
            sorted({tag for tags in column_values(sources["train"].rows, "tags") for tag in tags}, key=label_order)
        )
    check_tags(sources, names)
    return names


def check_tags(sources: Mapping[str, Source], names: Iterable[str]) -> None:
    """Checks that every tag of every split is one of `names`.

    Raises:
        DataError: with file, line and token of the first other tag, and the known tags.
    """
    known = dict.fromkeys(names)
    for source in sources.values():
        if "tags" not in source.rows.column_names:
            continue
        for line, tokens, tags in zip(*(source.rows[name] for name in ("line", "tokens", "tags")), strict=True):
            for position, tag in enumerate(tags):
                if tag not in known:
                    line += position if Path(source.origin).suffix.lower() in TEXT_SUFFIXES else 0  # one token per line
                    raise DataError(
                        f"{source.origin}, {source.unit} {line}: {tag!r}, the tag of {tokens[position]!r}, is not one "
                        f"of the known tags: {', '.join(list(known)[:50])}{', ...' if len(known) > 50 else ''}. They "
                        "come from the training rows, the data set or the model: correct it, or add a training row "
                        "with this tag"
                    )


def _text_rows(path: Path, encoding: str | None) -> Iterator[Row]:
    """Yields the sentences of a file, each with its first line number.

    The first line decides whether lines have tags. A file with only tokens is for prediction.
    """
    sentence: list[list[str]] = []
    begin, has_tags, error = 0, None, None
    for line, text in text_lines(path, encoding):
        fields = [field for field in re.split(r"[ \t]+", text.strip(" \t\r\n")) if field]
        if not fields or fields[0].startswith("-DOCSTART-"):
            if sentence:
                yield begin, error or _sentence(sentence, has_tags=bool(has_tags))
            sentence, error = [], None
            continue
        has_tags = len(fields) > 1 if has_tags is None else has_tags
        if (len(fields) > 1) != has_tags and error is None:
            error = DataError(
                f"{path}, line {line}: found {text.strip()!r}, expected "
                + ("a token and its tag, separated by a blank or a tab" if has_tags else "only a token, as above it")
            )
        begin = begin if sentence else line
        sentence.append(fields)
    if sentence:
        yield begin, error or _sentence(sentence, has_tags=bool(has_tags))


def _sentence(lines: Sequence[Sequence[str]], *, has_tags: bool) -> Values:
    tokens = {"tokens": [fields[0] for fields in lines]}
    return {**tokens, "tags": [fields[-1] for fields in lines]} if has_tags else tokens


def _converter(first: Values, origin: Origin) -> RowConverter:
    columns = list(first)
    configured = configured_columns(columns, origin, ("tokens", "tags"))
    tokens = configured.get("tokens") or next((name for name in TOKEN_COLUMNS if name in columns), None)
    tags = configured.get("tags") or next((name for name in TAG_COLUMNS if name in columns and name != tokens), None)
    if tokens is None:
        raise missing_column("the tokens", "tokens", TOKEN_COLUMNS, columns, origin)
    if tags is None and origin.needs_label:
        if Path(origin.name).suffix.lower() in TEXT_SUFFIXES:
            raise DataError(
                f"{origin.name} has no tags: the first nonempty line has only {first[tokens][0]!r}, "
                "expected a token and its tag, separated by a blank or a tab"
            )
        raise missing_column("the tags", "tags", TAG_COLUMNS, columns, origin)
    if tags is not None and not origin.needs_label and first.get(tags) is None:
        tags = None

    def convert(values: Values, location: str) -> dict[str, Any]:
        words = _list(values, tokens, location)
        row: dict[str, Any] = {
            "tokens": [require_text(word, f"{tokens}, item {n}", location) for n, word in enumerate(words, start=1)]
        }
        if not words:
            raise DataError(f"{location}: {tokens} is empty: a sentence needs at least one token")
        if tags is not None:
            names = [label_text(tag, location) for tag in _list(values, tags, location)]
            if len(names) != len(words):
                raise DataError(f"{location}: {len(words)} {tokens} but {len(names)} {tags}: each token needs one tag")
            if None in names:
                raise DataError(f"{location}: {words[names.index(None)]!r} has no tag in {tags}")
            row["tags"] = names
        return row

    names = [name for name, column in (("tokens", tokens), ("tags", tags)) if column is not None]
    schema = pa.schema([(name, pa.list_(pa.string())) for name in names])
    return RowConverter(
        schema, convert, origin.class_names.get(tags or ""), {"tokens": tokens, **({"tags": tags} if tags else {})}
    )


def _list(values: Values, name: str, location: str) -> list[Any]:
    value = get_value(values, name, location)
    if not isinstance(value, list):
        raise DataError(
            f"{location}: {name} must be a list, found {value!r:.80}. CSV and TSV have no lists: use JSON, JSONL, Parquet or "
            "CoNLL's text (.conll, .txt)"
        )
    return value


TAGGED = RowFormat("tagged", _converter, text_rows=_text_rows)
