"""Reads data files row by row, with line numbers: CSV, TSV, JSON, JSONL, Parquet, Arrow and plain text.

Keeps text, names and values unchanged, and names file and line (or byte offset) in errors. tables.py decides which column
is the text and which the label.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from dtrain.config import bounded_json
from dtrain.data.delimiters import NumberedFields, delimited_records
from dtrain.data.encodings import read_text, text_lines
from dtrain.errors import DataError

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


def read_rows(
    path: Path, *, delimiter: str | None, header: bool | None, key: str | None = None, encoding: str | None = None
) -> Iterator[Row]:
    """Yields the rows of a file in the format of its suffix.

    Empty lines are skipped. A malformed row is yielded as its error, and reading continues after it.

    Args:
        path: a file with a suffix of TABLE_SUFFIXES.
        delimiter: between the fields of CSV and TSV; None: by suffix, unless the file certainly has another.
        header: whether CSV and TSV begin with column names (None: they do). If not, columns are named "0", "1", ...
        key: entry of a JSON object that holds the rows, e.g. one of several splits.
        encoding: of a text file; None: UTF-8, or what the byte order mark says.

    Raises:
        DataError: the file is unreadable, is not in its encoding, or cannot be read any further.
    """
    match path.suffix.lower():
        case ".csv" | ".tsv" as suffix:
            has_header = header is not False
            records = delimited_records(
                path, delimiter=delimiter, header=has_header, encoding=encoding, is_quoted=suffix == ".csv"
            )
            return _with_column_names(records, path, header=has_header)
        case ".json":
            return _json_rows(path, key, encoding)
        case ".jsonl":
            return _json_line_rows(path, encoding)
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


def _with_column_names(records: Iterable[NumberedFields], path: Path, *, header: bool) -> Iterator[Row]:
    """Yields the records as rows. Trailing columns without a name must be empty, and are left out."""
    names: list[str] | None = None
    for line, fields in records:
        if names is None:
            names = _column_names(fields, path, line) if header else [str(index) for index in range(len(fields))]
            if header:
                continue
        if len(fields) != len(names) and (
            len(fields) < len(names) or any(field.strip() for field in fields[len(names) :])
        ):
            expected = "the header names" if header else "the first row has"
            yield (
                line,
                DataError(
                    f"{path}, line {line}: {len(fields)} columns where {expected} {len(names)} ({', '.join(names)}): "
                    f"{_shown(fields)}"
                ),
            )
            continue
        yield line, dict(zip(names, fields, strict=False))


def _column_names(fields: Sequence[str], path: Path, line: int) -> list[str]:
    """Returns the names in a header without blanks around them. A nameless column before others is called `column 2`."""
    stripped = [field.strip() for field in fields]
    while stripped and not stripped[-1]:
        stripped.pop()
    names = [name or f"column {number}" for number, name in enumerate(stripped, start=1)]
    if duplicates := {name for name in names if names.count(name) > 1}:
        raise DataError(
            f"{path}, line {line}: the column name {min(duplicates)!r} appears twice. If this line is a row "
            "instead of the column names, set data.header=false"
        )
    if not names:
        raise DataError(f"{path}, line {line}: the header names no column. Add the column names, e.g. text,label")
    return names


def _json_line_rows(path: Path, encoding: str | None) -> Iterator[Row]:
    for line, text in text_lines(path, encoding):
        if not text.strip():
            continue
        try:
            values = bounded_json.loads(text)
        except json.JSONDecodeError as error:
            yield line, DataError(f"{path}, line {line}: not JSON: {error}. JSONL holds one object on each line")
            continue
        yield line, _as_row(values, f"{path}, line {line}")


def _json_rows(path: Path, key: str | None, encoding: str | None) -> Iterator[Row]:
    """Yields the rows of a list, alone or as the only value (or "data") of an object; or objects by line, as in JSONL."""
    try:
        content = bounded_json.loads(read_text(path, encoding))
    except json.JSONDecodeError as error:
        if error.msg == "Extra data" and error.lineno > 1:
            yield from _json_line_rows(path, encoding)
            return
        raise DataError(f"{path}, line {error.lineno}, column {error.colno}: not JSON: {error.msg}") from None
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
        with path.open("rb") as file, _opened_arrow(file) as reader:
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
