"""Sentences with a tag for each word: CoNLL's text, or rows with a list of tokens and one of tags.

In CoNLL's text a line is a token, further columns and its tag, separated by blanks or tabs; an empty line ends a
sentence, and lines that begin with -DOCSTART- are none. In tables the columns are tokens (or words) and tags (ner_tags,
labels); other names by `data.columns`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa

from dtrain.data.readers import TEXT_SUFFIXES, Row, Values, text_lines
from dtrain.data.sources import Source, fixed_label_names, label_order
from dtrain.data.tables import (
    Layout,
    Origin,
    Shape,
    checked_text,
    given_columns,
    label_text,
    missing_column,
    value_of,
)
from dtrain.errors import DataError

TOKENS = ("tokens", "words")
TAGS = ("tags", "ner_tags", "labels")


def tag_names(sources: Mapping[str, Source]) -> tuple[str, ...]:
    """The tags in the order of their ids: fixed by the source, else those of the training rows, sorted.

    Raises:
        DataError: a tag outside that set; or no train split to take them from.
    """
    names = fixed_label_names(sources)
    if names is None:
        if "train" not in sources:
            raise DataError("there is no train split to take the tags from: name one in data.splits")
        names = tuple(sorted({tag for tags in sources["train"].rows["tags"] for tag in tags}, key=label_order))
    check_tags(sources, names)
    return names


def check_tags(sources: Mapping[str, Source], names: Iterable[str]) -> None:
    """Every tag of every split is one of `names`.

    Raises:
        DataError: file, line and token of the first that is not, and the set.
    """
    known = dict.fromkeys(names)
    for source in sources.values():
        if "tags" not in source.rows.column_names:
            continue
        for line, tokens, tags in zip(*(source.rows[name] for name in ("line", "tokens", "tags")), strict=True):
            for position, tag in enumerate(tags):
                if tag not in known:
                    line += position if Path(source.origin).suffix.lower() in TEXT_SUFFIXES else 0  # a token a line
                    raise DataError(
                        f"{source.origin}, {source.unit} {line}: {tag!r}, the tag of {tokens[position]!r}, is not one "
                        f"of the known tags: {', '.join(list(known)[:50])}{', ...' if len(known) > 50 else ''}. They "
                        "come from the training rows, the data set or the model: correct it, or add a training row "
                        "with this tag"
                    )


def _text_rows(path: Path) -> Iterator[Row]:
    """The sentences of a file, each with the line that it begins on.

    Whether lines have tags is seen at the first: a file of bare tokens is one to be predicted.
    """
    sentence: list[list[str]] = []
    begin, tagged, error = 0, None, None
    for line, text in text_lines(path):
        fields = [field for field in re.split(r"[ \t]+", text.strip(" \t\r\n")) if field]
        if not fields or fields[0].startswith("-DOCSTART-"):
            if sentence:
                yield begin, error or _sentence(sentence, tagged=bool(tagged))
            sentence, error = [], None
            continue
        tagged = len(fields) > 1 if tagged is None else tagged
        if (len(fields) > 1) != tagged and error is None:
            error = DataError(
                f"{path}, line {line}: found {text.strip()!r}, expected "
                + ("a token and its tag, separated by a blank or a tab" if tagged else "a token alone, as above it")
            )
        begin = begin if sentence else line
        sentence.append(fields)
    if sentence:
        yield begin, error or _sentence(sentence, tagged=bool(tagged))


def _sentence(lines: Sequence[Sequence[str]], *, tagged: bool) -> Values:
    tokens = {"tokens": [fields[0] for fields in lines]}
    return {**tokens, "tags": [fields[-1] for fields in lines]} if tagged else tokens


def _layout(first: Values, origin: Origin) -> Layout:
    found = list(first)
    given = given_columns(found, origin, ("tokens", "tags"))
    tokens = given.get("tokens") or next((name for name in TOKENS if name in found), None)
    tags = given.get("tags") or next((name for name in TAGS if name in found and name != tokens), None)
    if tokens is None:
        raise missing_column("the tokens", "tokens", TOKENS, found, origin)
    if tags is None and origin.needs_label:
        if Path(origin.name).suffix.lower() in TEXT_SUFFIXES:
            raise DataError(
                f"{origin.name} has no tags: {first[tokens][0]!r} stands alone on the first line that is not empty, "
                "expected a token and its tag, separated by a blank or a tab"
            )
        raise missing_column("the tags", "tags", TAGS, found, origin)
    if tags is not None and not origin.needs_label and first.get(tags) is None:
        tags = None

    def convert(values: Values, place: str) -> dict[str, Any]:
        words = _list(values, tokens, place)
        row: dict[str, Any] = {
            "tokens": [checked_text(word, f"{tokens}, item {n}", place) for n, word in enumerate(words, start=1)]
        }
        if not words:
            raise DataError(f"{place}: {tokens} is empty: a sentence has a token at least")
        if tags is not None:
            names = [label_text(tag, place) for tag in _list(values, tags, place)]
            if len(names) != len(words):
                raise DataError(f"{place}: {len(words)} {tokens} but {len(names)} {tags}: each token needs one tag")
            if None in names:
                raise DataError(f"{place}: {words[names.index(None)]!r} has no tag in {tags}")
            row["tags"] = names
        return row

    columns = [name for name, theirs in (("tokens", tokens), ("tags", tags)) if theirs is not None]
    schema = pa.schema([(name, pa.list_(pa.string())) for name in columns])
    return Layout(schema, convert, origin.class_names.get(tags or ""))


def _list(values: Values, name: str, place: str) -> list[Any]:
    value = value_of(values, name, place)
    if not isinstance(value, list):
        raise DataError(
            f"{place}: {name} must be a list, found {value!r:.80}. CSV and TSV have none: use JSON, JSONL, Parquet or "
            "CoNLL's text (.conll, .txt)"
        )
    return value


TAGGED = Shape("tagged", _layout, text_rows=_text_rows)
