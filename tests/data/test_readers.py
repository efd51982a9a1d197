"""Files are read as rows with line numbers, unchanged, and unreadable content is named by file and line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dtrain.data.encodings import read_text
from dtrain.data.readers import Row, read_rows
from dtrain.errors import ConfigError, DataError


def write(folder: Path, name: str, content: str | bytes) -> Path:
    file = folder / name
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def rows_of(file: Path, *, delimiter: str | None = None, header: bool | None = None) -> list[Row]:
    """Returns all rows; raises the error of the first bad one."""
    rows = list(read_rows(file, delimiter=delimiter, header=header))
    for _, values in rows:
        if isinstance(values, DataError):
            raise values
    return rows


def test_reading_continues_after_a_malformed_row(tmp_path: Path) -> None:
    table = list(read_rows(write(tmp_path, "a.csv", "text,label\na,x\nb\nc,y\n"), delimiter=None, header=None))
    lines = list(
        read_rows(write(tmp_path, "a.jsonl", '{"text": "a"}\n{\n3\n{"text": "b"}'), delimiter=None, header=None)
    )

    assert [line for line, values in table if not isinstance(values, DataError)] == [2, 4]
    assert [line for line, values in lines if not isinstance(values, DataError)] == [1, 4]


def test_a_quoted_csv_field_keeps_delimiter_quotes_and_line_break_and_later_line_numbers_are_right(
    tmp_path: Path,
) -> None:
    file = write(tmp_path, "a.csv", 'text,label\r\n"a ""b"", c\nd",x\r\n\r\nplain,y\r\n')

    assert rows_of(file) == [(2, {"text": 'a "b", c\nd', "label": "x"}), (5, {"text": "plain", "label": "y"})]


def test_a_stray_quotation_mark_in_a_tsv_is_text_and_swallows_no_row(tmp_path: Path) -> None:
    file = write(tmp_path, "a.tsv", 'text\tlabel\n"open\tx\n5" pipe\ty\n')

    assert rows_of(file) == [(2, {"text": '"open', "label": "x"}), (3, {"text": '5" pipe', "label": "y"})]


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    odd = "a\u2028b\x0bc\x85d\x1ce\rf"

    assert rows_of(write(tmp_path, "a.tsv", f"text\n{odd}\n")) == [(2, {"text": odd})]
    assert rows_of(write(tmp_path, "a.jsonl", json.dumps({"text": odd}, ensure_ascii=False))) == [(1, {"text": odd})]
    assert read_text(write(tmp_path, "a.txt", f" {odd}\r\n\n ")) == f" {odd}\r\n\n "


def test_blanks_at_the_ends_of_a_line_are_part_of_its_fields(tmp_path: Path) -> None:
    assert rows_of(write(tmp_path, "a.tsv", "text\tmore\r\n  a \t b \r\n")) == [(2, {"text": "  a ", "more": " b "})]


def test_words_that_look_like_missing_values_are_kept(tmp_path: Path) -> None:
    file = write(tmp_path, "a.csv", "text,label\nnull,nan\nNA,\n")

    assert [values for _, values in rows_of(file)] == [{"text": "null", "label": "nan"}, {"text": "NA", "label": ""}]


@pytest.mark.parametrize(
    ("name", "content"), [("a.csv", "text\nx\n"), ("a.tsv", "text\nx\n"), ("a.jsonl", '{"text": "x"}')]
)
def test_a_byte_order_mark_is_not_part_of_the_first_name(tmp_path: Path, name: str, content: str) -> None:
    ((_, values),) = rows_of(write(tmp_path, name, b"\xef\xbb\xbf" + content.encode()))

    assert values == {"text": "x"}


def test_without_a_header_the_first_line_is_a_row_and_columns_are_numbered(tmp_path: Path) -> None:
    file = write(tmp_path, "a.csv", "x;1\ny;2\n")

    assert rows_of(file, delimiter=";", header=False) == [(1, {"0": "x", "1": "1"}), (2, {"0": "y", "1": "2"})]


def test_a_field_longer_than_the_csv_modules_own_limit_is_read(tmp_path: Path) -> None:
    ((_, values),) = rows_of(write(tmp_path, "a.csv", f"text\n{'x' * 200_000}\n"))

    assert len(values["text"]) == 200_000


@pytest.mark.parametrize(
    "content",
    [
        '[{"text": "a"}, {"text": "b"}]',
        '{"data": [{"text": "a"}, {"text": "b"}], "version": 1}',
        '{"rows": [{"text": "a"}, {"text": "b"}]}',
        '{"text": "a"}\n{"text": "b"}\n',
    ],
)
def test_json_rows_are_found_as_a_list_in_an_object_or_line_by_line(tmp_path: Path, content: str) -> None:
    assert rows_of(write(tmp_path, "a.json", content)) == [(1, {"text": "a"}), (2, {"text": "b"})]


def test_parquet_rows_are_numbered_from_one(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a", "b"], "label": [1, 0]}), tmp_path / "a.parquet")

    assert rows_of(tmp_path / "a.parquet") == [(1, {"text": "a", "label": 1}), (2, {"text": "b", "label": 0})]


def arrow(*batches: dict[str, list[Any]], kind: Any = pa.ipc.new_stream) -> bytes:
    """Returns the record batches in one of Arrow's two formats."""
    sink = pa.BufferOutputStream()
    schema = pa.table(dict(batches[0])).schema
    tables = [pa.RecordBatch.from_pydict(batch, schema=schema) for batch in batches]
    with kind(sink, schema) as writer:
        for table in tables:
            writer.write_batch(table)
    return bytes(sink.getvalue())


@pytest.mark.parametrize("kind", [pa.ipc.new_stream, pa.ipc.new_file], ids=["stream", "file"])
def test_arrow_rows_of_both_formats_are_numbered_across_batches(tmp_path: Path, kind: Any) -> None:
    content = arrow({"text": ["a", "b"], "label": [1, 0]}, {"text": ["c"], "label": [None]}, kind=kind)

    found = rows_of(write(tmp_path, "a.arrow", content))

    assert found == [
        (1, {"text": "a", "label": 1}),
        (2, {"text": "b", "label": 0}),
        (3, {"text": "c", "label": None}),
    ]


@pytest.mark.parametrize("kind", [pa.ipc.new_stream, pa.ipc.new_file], ids=["stream", "file"])
@pytest.mark.parametrize("cut", [0, 7, 200, -40])
def test_a_truncated_arrow_file_is_named(tmp_path: Path, kind: Any, cut: int) -> None:
    whole = arrow({"text": ["a" * 99, "b"] * 20}, {"text": ["c"] * 40}, kind=kind)

    with pytest.raises(DataError, match=r"a\.arrow: not an Arrow file that can be read \(after row \d+\): "):
        rows_of(write(tmp_path, "a.arrow", whole[:cut]))


@pytest.mark.parametrize("kind", [pa.ipc.new_stream, pa.ipc.new_file], ids=["stream", "file"])
def test_an_arrow_file_with_damaged_bytes_is_named_and_does_not_crash(tmp_path: Path, kind: Any) -> None:
    content = arrow({"text": ["abc", "de"]}, kind=kind)
    offsets = pa.array([0, 3, 5], pa.int32()).buffers()[1].to_pybytes()[:12]
    assert content.count(offsets) == 1
    damaged = content.replace(offsets, pa.array([0, 3, 2**30], pa.int32()).buffers()[1].to_pybytes()[:12])

    with pytest.raises(DataError, match=r"a\.arrow: not an Arrow file that can be read \(after row 0\): "):
        rows_of(write(tmp_path, "a.arrow", damaged))


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "text,label\na,x\nb\n", r"a\.csv, line 3: 1 columns where the header names 2 \(text, label\)"),
        ("a.csv", "text,label\na,x\nb,c,y\n", r"a\.csv, line 3: 3 columns"),
        ("a.csv", 'text,label\na,x\n"open,y\nb,z\n', r"a\.csv, line 3: not a row of CSV"),
        ("a.csv", 'text,label\n"a"b,x\n', r"a\.csv, line 2: not a row of CSV"),
        ("a.csv", "a,a\nb,c\n", r"a\.csv, line 1: the column name 'a' appears twice"),
        ("a.tsv", "text\tlabel\n\na\n", r"a\.tsv, line 3: 1 columns"),
        ("a.tsv", b"text\na\nb\xff\n", r"a\.tsv, line 3: the byte 0xff at offset 8 is not UTF-8"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", "1\n", r"a\.jsonl, line 1: not a row"),
        ("a.json", '[{"text": "a"},\n{"text": }]', r"a\.json, line 2, column 10: not JSON"),
        ("a.json", '[{"text": "a"}, 3]', r"a\.json, row 2: not a row"),
        ("a.json", b'{"text":\n"\xe4"}', r"a\.json, line 2: the byte 0xe4 at offset 10"),
        (
            "a.csv",
            b"text\n" + "\u00e9t\u00e9\n".encode("latin-1"),
            r"line 2: .* It looks like cp1252: set data\.encoding=cp1252",
        ),
        ("a.parquet", b"PAR1 not really", r"a\.parquet: not a Parquet file"),
        ("a.arrow", b"ARROW1 not really", r"a\.arrow: not an Arrow file"),
        ("a.arrow", "text\na\n", r"a\.arrow: not an Arrow file"),
        ("a.xlsx", b"", r"a\.xlsx: \.xlsx is not a supported format"),
    ],
)
def test_unreadable_content_is_named_by_file_and_line(
    tmp_path: Path, name: str, content: str | bytes, said: str
) -> None:
    with pytest.raises(DataError, match=said) as raised:
        rows_of(write(tmp_path, name, content))

    assert raised.value.__suppress_context__ or raised.value.__context__ is None


def test_an_offset_counts_the_bytes_of_all_lines_before(tmp_path: Path) -> None:
    content = "text\n" + "\u00e4\n" * 5000 + "x"
    file = write(tmp_path, "a.tsv", content.encode() + b"\xc3\n")

    with pytest.raises(DataError, match=re.escape(f"line 5002: the byte 0xc3 at offset {len(content.encode())} ")):
        rows_of(file)


@pytest.mark.parametrize("delimiter", [",,", "\r", '"', "\n"])
def test_a_delimiter_that_is_not_one_character_is_a_config_error(tmp_path: Path, delimiter: str) -> None:
    with pytest.raises(ConfigError, match=r"data\.delimiter"):
        rows_of(write(tmp_path, "a.csv", "a\n"), delimiter=delimiter)


def test_a_tab_may_be_written_as_a_shell_passes_it(tmp_path: Path) -> None:
    assert rows_of(write(tmp_path, "a.csv", "a\tb\n1\t2\n"), delimiter=r"\t") == [(2, {"a": "1", "b": "2"})]
