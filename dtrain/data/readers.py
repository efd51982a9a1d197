"""Rows of a data file, one at a time, each with the line it began on: CSV, TSV, JSON, JSONL, Parquet, Arrow, plain text.

Reads bytes, names and values as they are, and says file and line (or byte offset) of what it cannot read. Which column
is the text and which the label is decided in rows.py.
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
"""One row's values by column name."""

Row = tuple[int, Values | DataError]
"""1-based line of the file (or number of the row, where a format has no lines), and its values, or what is wrong with it."""

TABLE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".arrow")
WITHOUT_LINES = (".json", ".parquet", ".arrow")
"""Of these a row's number is told, not its line."""
TEXT_SUFFIXES = (".txt", ".conll")
SUFFIXES = (*TABLE_SUFFIXES, *TEXT_SUFFIXES)

ARROW_FILE = b"ARROW1"
"""How a file of Arrow's begins that is no stream."""


def read_rows(path: Path, *, delimiter: str | None, header: bool | None, key: str | None = None) -> Iterator[Row]:
    """Rows of a file in the format of its suffix.

    CSV is quoted as spreadsheets do it. TSV has no quoting at all, since a stray quotation mark in a text would swallow
    the rows up to the next one. Empty lines are no rows.

    Args:
        path: a file with a suffix of TABLE_SUFFIXES.
        delimiter: between the fields of CSV and TSV; None: by suffix.
        header: whether CSV and TSV begin with the columns' names, which are "0", "1", ... if not; None: they do.
        key: of the list in a JSON file whose object holds several, e.g. one for each split.

    A row that is not what its format says comes as the error that says so, and reading goes on behind it.

    Raises:
        DataError: unreadable file, bytes that are not UTF-8, or a place behind which no row can be told.
    """
    match path.suffix.lower():
        case ".csv":
            return _named(_quoted_records(path, _one_character(delimiter or ",")), path, header=header is not False)
        case ".tsv":
            return _named(plain_records(path, _one_character(delimiter or "\t")), path, header=header is not False)
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
                f"{path}: {suffix or 'a file without a suffix'} is no format of rows that dtrain reads. "
                f"Those are {', '.join(TABLE_SUFFIXES)}"
            )


def unit_of(path: Path) -> Literal["line", "row"]:
    """What the numbers of a file's rows count."""
    return "row" if path.suffix.lower() in WITHOUT_LINES else "line"


def plain_records(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    r"""Fields of each line that is not empty, split at the delimiter alone: no quoting; "\r" at the end is dropped."""
    for line, text in text_lines(path):
        record = text.rstrip("\r\n")
        if record:
            yield line, record.split(delimiter)


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    r"""Numbered lines, each with its line break. Only "\n" ends a line: U+2028, \x0b and \x85 belong to the text."""
    offset = 0
    with _open(path) as file:
        for number, raw in enumerate(file, start=1):
            yield number, _decode(raw, path, line=number, offset=offset)
            offset += len(raw)


def whole_text(path: Path) -> str:
    """The text of a file as it is, every line break kept (a byte order mark is not text)."""
    with _open(path) as file:
        return _decode(file.read(), path, line=1, offset=0)


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}. data.path and data.splits say which files are read"
        ) from None


def _decode(raw: bytes, path: Path, *, line: int, offset: int) -> str:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        guess = "; it looks like UTF-16" if raw[:2] in (b"\xff\xfe", b"\xfe\xff") and offset == 0 else ""
        raise DataError(
            f"{path}, line {line}: the byte 0x{raw[error.start]:02x} at offset {offset + error.start} is not "
            f"UTF-8{guess}. "
            "Write the file as UTF-8 (iconv -f OLD -t UTF-8)"
        ) from None
    return text.removeprefix("\ufeff") if offset == 0 else text


def _one_character(delimiter: str) -> str:
    delimiter = "\t" if delimiter == r"\t" else delimiter  # as a shell passes it
    if len(delimiter) != 1 or delimiter in '\r\n"':
        raise ConfigError(
            f"data.delimiter={delimiter!r} is not a delimiter: it must be one character, such as ',' ';' or '\\t'"
        )
    return delimiter


def _quoted_records(path: Path, delimiter: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(sys.maxsize)  # the module's guard of 131,072 characters would refuse a long document
    reader = csv.reader((text for _, text in text_lines(path)), delimiter=delimiter, strict=True)
    while True:
        first_line = reader.line_num + 1  # a quoted field may go over several lines
        try:
            fields = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{path}, line {first_line}: not a row of CSV: {error}. A field that holds the delimiter, a "
                f"quotation mark or a "
                'line break is put in quotation marks, and quotation marks in it are doubled: "a ""b"", c"'
            ) from None
        if fields is None:
            return
        if fields:
            yield first_line, fields


def _named(records: Iterable[tuple[int, list[str]]], path: Path, *, header: bool) -> Iterator[Row]:
    names: list[str] | None = None
    for line, fields in records:
        if names is None:
            names = fields if header else [str(index) for index in range(len(fields))]
            if twice := {name for name in names if names.count(name) > 1}:
                raise DataError(
                    f"{path}, line {line}: the column name {min(twice)!r} is there twice. If this line is a row and "
                    f"not the "
                    "columns' names, say data.header=false"
                )
            if header:
                continue
        if len(fields) != len(names):
            what = "the header names" if header else "the first row has"
            yield (
                line,
                DataError(
                    f"{path}, line {line}: {len(fields)} columns where {what} {len(names)} ({', '.join(names)}): "
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
        yield line, _object(values, f"{path}, line {line}")


def _json_rows(path: Path, key: str | None) -> Iterator[Row]:
    """A list of objects, alone or as the one value (or "data") of an object; or objects line by line, as JSONL."""
    try:
        content = json.loads(whole_text(path))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1:
            yield from _json_line_rows(path)
            return
        raise DataError(f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
    except RecursionError:
        raise DataError(f"{path}: not rows: JSON nested too deep to be read") from None
    if key is not None:
        if not isinstance(content, dict) or key not in content:
            what = f"an object with {', '.join(content)}" if isinstance(content, dict) else type(content).__name__
            raise DataError(f"{path}: data.splits names {key!r} in it, but it holds {what}")
        content = content[key]
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list)]
        content = content["data"] if "data" in content else lists[0] if len(lists) == 1 == len(content) else [content]
    if not isinstance(content, list):
        raise DataError(f"{path}: not rows: JSON data is a list of objects, found {type(content).__name__}")
    for number, values in enumerate(content, start=1):
        yield number, _object(values, f"{path}, row {number}")


def _object(values: Any, place: str) -> Values | DataError:
    if isinstance(values, list):  # a dialogue that is nothing but its turns
        return {"turns": values}
    if not isinstance(values, dict):
        return DataError(f'{place}: not a row: expected an object such as {{"text": ...}}, found {_shown(values)}')
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
    """Either of Arrow's formats: a stream, as `save_to_disk` writes it, or a file with a table of contents."""
    is_file = file.read(len(ARROW_FILE)) == ARROW_FILE
    file.seek(0)
    return pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)


def stored_schema(path: Path) -> pa.Schema | None:
    """What a Parquet or Arrow file says of its columns; None for other files, and for one that cannot be read."""
    try:
        match path.suffix.lower():
            case ".parquet":
                return pq.read_schema(path)
            case ".arrow":
                with path.open("rb") as file, _opened_arrow(file) as reader:
                    return reader.schema
    except (pa.ArrowException, OSError):
        pass  # reading its rows tells what is wrong
    return None


def _batch_rows(batches: Iterator[pa.RecordBatch], path: Path, kind: str) -> Iterator[Row]:
    """The rows of record batches, numbered through. kind: `a Parquet`, for the message about a broken file."""
    number = 0
    try:
        for batch in batches:
            batch.validate(full=True)  # offsets of a damaged file would lead out of its memory
            for begin in range(0, len(batch), 1000):  # a batch may be the whole file
                for values in batch.slice(begin, 1000).to_pylist():
                    number += 1
                    yield number, values
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: not {kind} file that can be read (after row {number}): {reason}") from None


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."
