"""Splits the lines of CSV and TSV files into fields: which delimiter a file has, and how its header is written.

CSV is quoted as in spreadsheets. TSV has no quoting, because a stray quotation mark in a text would swallow the rows up
to the next one.
"""

from __future__ import annotations

import csv
import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain, islice
from pathlib import Path

from dtrain.console import log
from dtrain.data.encodings import text_lines
from dtrain.errors import ConfigError, DataError

NumberedFields = tuple[int, list[str]]
"""1-based number of the record's first line, and its fields."""

DELIMITERS = (",", ";", "\t", "|", "\uff0c", "\uff1b")
"""The delimiters that are recognized. The last two are the comma and the semicolon of Chinese keyboards."""

SAMPLE_LINES = 50


@dataclass(frozen=True)
class Layout:
    """How the fields of a file are written.

    Attributes:
        delimiter: one character.
        is_quoted: quotation marks enclose a field that has the delimiter or a line break in it.
        has_blanks: a blank follows each delimiter, as in `text, label`.
    """

    delimiter: str
    is_quoted: bool
    has_blanks: bool = False


def delimited_records(
    path: Path, *, delimiter: str | None, header: bool, encoding: str | None, is_quoted: bool
) -> Iterator[NumberedFields]:
    """Yields the nonempty records of a file, the header included.

    Excel's first line `sep=;` is skipped and obeyed. Without `data.delimiter`, another delimiter than the suffix's is used
    if the header has only that one and the rows agree.

    Raises:
        ConfigError: the delimiter is not one character.
        DataError: the file cannot be read any further.
    """
    lines = text_lines(path, encoding)
    sample = list(islice(lines, SAMPLE_LINES))
    usual = "," if is_quoted else "\t"
    declared = re.fullmatch(r'"?sep=(.)"?\s*', sample[0][1], re.IGNORECASE) if sample else None
    if declared:
        sample = sample[1:]
        delimiter = delimiter or declared[1]
    chosen = check_delimiter(delimiter) if delimiter else _recognize(sample, usual, path, header=header)
    layout = Layout(chosen, is_quoted or (chosen == "," and delimiter is None))
    if layout.is_quoted and header and sample:
        layout = Layout(chosen, True, has_blanks=_has_blanks(sample, chosen))
    everything = chain(sample, lines)
    return _quoted_records(everything, path, layout) if layout.is_quoted else plain_records(everything, chosen)


def plain_records(lines: Iterable[tuple[int, str]], delimiter: str) -> Iterator[NumberedFields]:
    r"""Yields the fields of each nonempty line, split at the delimiter, without quoting. A final "\r" is removed."""
    for line, text in lines:
        record = text.rstrip("\r\n")
        if record:
            yield line, record.split(delimiter)


def check_delimiter(delimiter: str) -> str:
    """Returns the delimiter after checking it."""
    delimiter = "\t" if delimiter == r"\t" else delimiter  # as shells pass it
    if len(delimiter) != 1 or delimiter in '\r\n"':
        raise ConfigError(
            f"data.delimiter={delimiter!r} is not valid: it must be one character, such as ',' ';' or '\\t'"
        )
    return delimiter


def likely_delimiter(names: Iterable[str]) -> str | None:
    """Returns the delimiter that column names contain, so that they are probably several names; None if they have none."""
    return next((mark for mark in DELIMITERS for name in names if mark in name.strip(mark)), None)


def _recognize(sample: list[tuple[int, str]], usual: str, path: Path, *, header: bool) -> str:
    """Returns the delimiter that the first lines are written with: the usual one unless another certainly is it."""
    if not sample:
        return usual
    usual_fields, usual_agreement = _fields_and_agreement(sample, usual)
    if usual_fields > 1 and usual_agreement >= 0.9 and likely_delimiter([sample[0][1].replace(usual, "")]) is None:
        return usual
    for delimiter in DELIMITERS:
        fields, agreement = _fields_and_agreement(sample, delimiter)
        if delimiter == usual or fields < 2 or agreement < (0.9 if header else 1):
            continue
        if (usual_fields == 1 or usual_agreement < 0.9) and (header or len(sample) > 2):
            _report(path, delimiter, usual)
            return delimiter
    return usual


@cache
def _report(path: Path, delimiter: str, usual: str) -> None:
    """Says once per file which delimiter it has: two splits may come from one file."""
    log.info("data: %s: the columns are separated by %r, not by %r (data.delimiter)", path, delimiter, usual)


def _fields_and_agreement(sample: list[tuple[int, str]], delimiter: str) -> tuple[int, float]:
    """Returns the number of fields of the first line, and the share of the others that have as many."""
    texts = [text.rstrip("\r\n") for _, text in sample if text.strip()]
    try:
        numbers = [len(record) for record in csv.reader(texts, delimiter=delimiter) if record]
    except csv.Error:  # such as a carriage return inside a field, which TSV allows
        numbers = [len(text.split(delimiter)) for text in texts]
    others = numbers[1:-1] if len(texts) == SAMPLE_LINES else numbers[1:]  # the last may be cut inside a quoted field
    return (
        (numbers[0], sum(number == numbers[0] for number in others) / len(others) if others else 1.0)
        if numbers
        else (0, 0)
    )


def _has_blanks(sample: list[tuple[int, str]], delimiter: str) -> bool:
    names = sample[0][1].rstrip("\r\n").split(delimiter)[1:]
    return bool(names) and all(name.startswith(" ") for name in names)


def _quoted_records(lines: Iterable[tuple[int, str]], path: Path, layout: Layout) -> Iterator[NumberedFields]:
    csv.field_size_limit(sys.maxsize)  # the default limit of 131,072 characters would reject a long document
    first_line = line = 0

    def texts() -> Iterator[str]:
        nonlocal line, first_line
        for line, text in lines:
            first_line = first_line or line  # a quoted field may span several lines
            yield text

    reader = csv.reader(texts(), delimiter=layout.delimiter, strict=True, skipinitialspace=layout.has_blanks)
    while True:
        first_line = 0
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{path}, line {first_line or line}: not a row of CSV: {error}. Quote a field that contains the delimiter, "
                'a quotation mark or a line break, and double the quotation marks in it: "a ""b"", c"'
            ) from None
        if fields is None:
            return
        if fields:
            yield first_line, fields
