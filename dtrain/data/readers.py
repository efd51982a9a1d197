"""Reads data files row by row, with line numbers: CSV, TSV, JSON, JSONL, Parquet, Arrow and plain text.

Keeps text, names and values unchanged, and names file and line (or byte offset) in errors. tables.py decides which column
is the text and which the label.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from dtrain.errors import ConfigError, DataError

Values = Mapping[str, Any]
"""The values of one row by column name."""

Row = tuple[int, Values | DataError]
"""1-based line in the file (or row number for formats without lines), and the row's values or the error in it."""

TABLE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow")
NUMBERED_BY_ROW = (".json", ".parquet", ".arrow")
"""Formats whose rows are numbered by row instead of line."""
TEXT_SUFFIXES = (".txt", ".conll")
SUFFIXES = (*TABLE_SUFFIXES, *TEXT_SUFFIXES)

ARROW_FILE_MAGIC = b"ARROW1"
"""First bytes of Arrow's file format. Arrow's stream format has none."""


def read_rows(path: Path, *, delimiter: str | None, header: bool | None, key: str | None = None) -> Iterator[Row]:
    """Yields the rows of a file in the format of its suffix.

    CSV is quoted as in spreadsheets. TSV has no quoting, because a stray quotation mark in a text would swallow the rows
    up to the next one. Empty lines are skipped. A malformed row is yielded as its error, and reading continues after it.

    Args:
        path: a file with a suffix of TABLE_SUFFIXES.
        delimiter: between the fields of CSV and TSV; None: by suffix.
        header: whether CSV and TSV begin with column names (None: they do). If not, columns are named "0", "1", ...
        key: entry of a JSON object that holds the rows, e.g. one of several splits.

    Raises:
        DataError: the file is unreadable, is not UTF-8, or cannot be read any further.
    """
    match path.suffix.lower():
        case ".csv":
            records = _quoted_records(path, _check_delimiter(delimiter or ","))
            return _with_column_names(records, path, header=header is not False)
        case ".tsv":
            records = plain_records(path, _check_delimiter(delimiter or "\t"))
            return _with_column_names(records, path, header=header is not False)
        case ".json":
            return _json_rows(path, key)
        case ".jsonl":
            return _json_line_rows(path)
        case ".parquet":
            return _parquet_rows(path)
        case ".arrow":
            return _arrow_rows(path)
        case suffix:
            raise DataError(
                f"{path}: {suffix or 'a file without a suffix'} is not a supported format of rows. "
                f"Supported: {', '.join(TABLE_SUFFIXES)}"
            )


def row_unit(path: Path) -> Literal["line", "row"]:
    """Returns whether the rows of a file are numbered by line or by row."""
    return "row" if path.suffix.lower() in NUMBERED_BY_ROW else "line"


def plain_records(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    r"""Yields the fields of each nonempty line, split at the delimiter, without quoting. A final "\r" is removed."""
    for line, text in text_lines(path):
        record = text.rstrip("\r\n")
        if record:
            yield line, record.split(delimiter)


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    r"""Yields numbered lines with their line breaks. Only "\n" ends a line; U+2028, \x0b and \x85 are part of the text."""
    offset = 0
    with _open(path) as file:
        for number, raw in enumerate(file, start=1):
            yield number, _decode(raw, path, line=number, offset=offset)
            offset += len(raw)


def read_text(path: Path) -> str:
    """Returns the text of a file unchanged, with all line breaks but without a byte order mark."""
    with _open(path) as file:
        return _decode(file.read(), path, line=1, offset=0)


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}. data.path and data.splits select the files"
        ) from None


def _decode(raw: bytes, path: Path, *, line: int, offset: int) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        guess = "; it looks like UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") and offset == 0 else ""
        raise DataError(
            f"{path}, line {line}: the byte 0x{raw[error.start]:02x} at offset {offset + error.start} is not "
            f"UTF-8{guess}. Save the file as UTF-8 (iconv -f OLD -t UTF-8)"
        ) from None
    return text.removeprefix("\ufeff") if offset == 0 else text


def _check_delimiter(delimiter: str) -> str:
    delimiter = "\t" if delimiter == r"\t" else delimiter  # as shells pass it
    if len(delimiter) != 1 or delimiter in '\r\n"':
        raise ConfigError(
            f"data.delimiter={delimiter!r} is not valid: it must be one character, such as ',' ';' or '\\t'"
        )
    return delimiter


def _quoted_records(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(sys.maxsize)  # the default limit of 131,072 characters would reject a long document
    reader = csv.reader((text for _, text in text_lines(path)), delimiter=delimiter, strict=True)
    while True:
        first_line = reader.line_num + 1  # a quoted field may span several lines
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{path}, line {first_line}: not a row of CSV: {error}. Quote a field that contains the delimiter, a "
                'quotation mark or a line break, and double the quotation marks in it: "a ""b"", c"'
            ) from None
        if fields is None:
            return
        if fields:
            yield first_line, fields


def _with_column_names(records: Iterable[tuple[int, list[str]]], path: Path, *, header: bool) -> Iterator[Row]:
    names: list[str] | None = None
    for line, fields in records:
        if names is None:
            names = fields if header else [str(index) for index in range(len(fields))]
            if duplicates := {name for name in names if names.count(name) > 1}:
                raise DataError(
                    f"{path}, line {line}: the column name {min(duplicates)!r} appears twice. If this line is a row "
                    "instead of the column names, set data.header=false"
                )
            if header:
                continue
        if len(fields) != len(names):
            expected = "the header names" if header else "the first row has"
            yield (
                line,
                DataError(
                    f"{path}, line {line}: {len(fields)} columns where {expected} {len(names)} ({', '.join(names)}): "
                    f"{_shown(fields)}"
                ),
            )
            continue
        yield line, dict(zip(names, fields, strict=True))


def _json_line_rows(path: Path) -> Iterator[Row]:
    for line, text in text_lines(path):
        if not text.strip():
            continue
        try:
            values = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            yield line, DataError(f"{path}, line {line}: not JSON: {error}. JSONL holds one object on each line")
            continue
        yield line, _as_row(values, f"{path}, line {line}")


def _json_rows(path: Path, key: str | None) -> Iterator[Row]:
    """Yields the rows of a list, alone or as the only value (or "data") of an object; or objects by line, as in JSONL."""
    try:
        content = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1:
            yield from _json_line_rows(path)
            return
        raise DataError(f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
    except RecursionError:
        raise DataError(f"{path}: not rows: the JSON is nested too deeply") from None
    if key is not None:
        if not isinstance(content, dict) or key not in content:
            content_name = (
                f"an object with {', '.join(content)}" if isinstance(content, dict) else type(content).__name__
            )
            raise DataError(f"{path}: data.splits names {key!r} in it, but the file holds {content_name}")
        content = content[key]
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = content["data"] if "data" in content else lists[0] if len(lists) == 1 == len(content) else [content]
    if not isinstance(content, list):
        raise DataError(f"{path}: not rows: JSON data is a list of objects, found {type(content).__name__}")
    for number, values in enumerate(content, start=1):
        yield number, _as_row(values, f"{path}, row {number}")


def _as_row(values: Any, location: str) -> Values | DataError:
    if isinstance(values, list):  # a dialogue as a plain list of turns
        return {"turns": values}
    if not isinstance(values, dict):
        return DataError(f'{location}: not a row: expected an object such as {{"text": ...}}, found {_shown(values)}')
    return values


def _parquet_rows(path: Path) -> Iterator[Row]:
    def batches() -> Iterator[pa.RecordBatch]:
        with pq.ParquetFile(path) as file:
            yield from file.iter_batches(batch_size=1000)

    return _batch_rows(batches(), path, "a Parquet")


def _arrow_rows(path: Path) -> Iterator[Row]:
    def batches() -> Iterator[pa.RecordBatch]:
        with _open(path) as file, _opened_arrow(file) as reader:
            if isinstance(reader, pa.ipc.RecordBatchFileReader):
                yield from map(reader.get_batch, range(reader.num_record_batches))
            else:
                yield from reader

    return _batch_rows(batches(), path, "an Arrow")


def _opened_arrow(file: BinaryIO) -> Any:
    """Opens either of Arrow's formats: a stream, as `save_to_disk` writes it, or a file with a footer."""
    is_file = file.read(len(ARROW_FILE_MAGIC)) == ARROW_FILE_MAGIC
    file.seek(0)
    return pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)


def read_schema(path: Path) -> pa.Schema | None:
    """Returns the schema of a Parquet or Arrow file; None for other or unreadable files."""
    try:
        match path.suffix.lower():
            case ".parquet":
                return pq.read_schema(path)
            case ".arrow":
                with path.open("rb") as file, _opened_arrow(file) as reader:
                    return reader.schema
    except (pa.ArrowException, OSError):
        pass  # reading the rows will report the error
    return None


def _batch_rows(batches: Iterator[pa.RecordBatch], path: Path, kind: str) -> Iterator[Row]:
    """Yields the rows of record batches, numbered from 1. kind: `a Parquet` or `an Arrow`, for the error message."""
    number = 0
    try:
        for batch in batches:
            batch.validate(full=True)  # the offsets in a damaged file could point outside its memory
            for begin in range(0, len(batch), 1000):  # a batch may be the entire file
                for values in batch.slice(begin, 1000).to_pylist():
                    number += 1
                    yield number, values
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: not {kind} file that can be read (after row {number}): {reason}") from None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
