"""Delimiters, headers, encodings and line ends as spreadsheets and other programs write them."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from dtrain.config.load import load_config
from dtrain.config.schema import Data
from dtrain.data.encodings import guess_encoding, read_text, text_lines
from dtrain.data.sources import load_sources
from dtrain.data.tables import LABELED
from dtrain.errors import DataError

SENTENCES = dict(
    line.split(" ", 1) for line in (Path(__file__).parent / "sentences.txt").read_text(encoding="utf-8").splitlines()
)
"""By language, a sentence; in a file, since code is ASCII."""

ZH = "\u8fd9\u4e2a\u7535\u5f71\u5f88\u597d\u770b,\u6211\u975e\u5e38\u559c\u6b22"
EXPECTED = [("a good one, really", "pos"), ("bad", "neg"), (ZH, "pos")]
HEADER = ("text", "label")


def written(delimiter: str, *, quote: str = '"', line_end: str = "\n") -> str:
    lines = [HEADER, *((f"{quote}{text}{quote}", label) for text, label in EXPECTED)]
    return "".join(delimiter.join(fields) + line_end for fields in lines)


def load(file: Path, content: str | bytes, **settings: Any) -> list[tuple[str, str]]:
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    rows = load_sources(Data(path=file, **settings), LABELED)["train"].rows
    return [(row["text"], row["label"]) for row in rows]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.csv", written(",")),
        ("a.csv", written(";")),
        ("a.csv", written("; ")),
        ("a.csv", written(";", quote="")),  # the header decides, not the commas in the texts
        ("a.csv", written("\t", quote="")),
        ("a.csv", written("|")),
        ("a.csv", written("\uff1b")),
        ("a.tsv", written("\t", quote="")),
        ("a.tsv", written(",")),
        ("a.tsv", written(";", quote="")),
        ("a.csv", "sep=;\n" + written(";")),
        ("a.csv", '"sep=,"\r\n' + written(",", line_end="\r\n")),
        ("a.csv", "SEP=\t\n" + written("\t", quote="")),
        ("a.csv", written(", ")),  # a blank follows the delimiter
        ("a.csv", written(",").replace("text,label", " text , label ")),
        ("a.csv", written(",", line_end="\r")),  # old Mac
        ("a.tsv", written("\t", quote="", line_end="\r")),
        ("a.csv", written(",", line_end=",,\n")),  # nameless trailing columns
        ("a.csv", written(",").replace("pos\n", "pos,, \n")),
        ("a.csv", "\ufeff" + written(";")),
    ],
)
def test_a_table_is_read_as_it_was_meant(tmp_path: Path, name: str, content: str) -> None:
    assert load(tmp_path / name, content) == EXPECTED


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
def test_a_byte_order_mark_decides(tmp_path: Path, encoding: str) -> None:
    assert load(tmp_path / "a.csv", written(",").encode(encoding)) == EXPECTED


@pytest.mark.parametrize("encoding", ["gb18030", "gbk", "utf-16-le", "utf-16-be", "big5"])
@pytest.mark.parametrize("line_end", ["\n", "\r"])
def test_another_encoding_is_named_by_the_error_and_read_when_it_is_set(
    tmp_path: Path, encoding: str, line_end: str
) -> None:
    text = written(";", line_end=line_end)
    if encoding == "big5":
        text = text.replace(ZH, "\u9019\u500b\u96fb\u5f71\u5f88\u597d\u770b,\u6211\u975e\u5e38\u559c\u6b61")
    content = text.encode(encoding)

    with pytest.raises(DataError, match=r"a\.csv, line \d.*It looks like .*data\.encoding=") as error:
        load(tmp_path / "a.csv", content)
    proposed = str(error.value).split("data.encoding=")[1].split(",")[0].split()[0]

    assert load(tmp_path / "a.csv", content, encoding=proposed)[:2] == EXPECTED[:2]
    assert load(tmp_path / "a.csv", content, encoding=proposed) == load(tmp_path / "b.csv", text)


@pytest.mark.parametrize(
    ("text", "encoding", "guess"),
    [
        ("\u4e00\u4e8c\u4e09\u56db\u4e94,\u516d\u4e03\u516b\u4e5d\u5341\u3002" * 3, "gb18030", "gb18030"),
        (
            SENTENCES["ja"],
            "shift_jis",
            "shift_jis",
        ),
        (
            SENTENCES["ja"],
            "euc_jp",
            "euc_jp",
        ),
        (
            SENTENCES["ko"],
            "cp949",
            "cp949",
        ),
        (
            SENTENCES["ru"],
            "cp1251",
            "cp1251",
        ),
        ("Un tr\u00e8s bon film, d\u00e9j\u00e0 vu \u00e0 l'\u00e9t\u00e9", "cp1252", "cp1252"),
    ],
)
def test_the_guess_of_an_encoding(tmp_path: Path, text: str, encoding: str, guess: str) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))

    assert guess_encoding(tmp_path / "a.txt") == guess


def test_a_wrong_encoding_is_named_with_the_line(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 1 or soon after: not shift_jis: .*Correct data\.encoding"):
        load(tmp_path / "a.csv", b"text,label\n\xff\xff,x\n", encoding="shift_jis")
    with pytest.raises(DataError, match=r"0x00 at offset 4 is not part of UTF-8 text\. Is it a text file\?"):
        load(tmp_path / "a.csv", b"\x89bin\0\xde\xad\xbe\xef")
    (tmp_path / "a.txt").write_bytes(b"\xff\xff")
    with pytest.raises(DataError, match=r"line 1 or soon after: not gb18030"):
        read_text(tmp_path / "a.txt", "gb18030")


@pytest.mark.parametrize("content", [b"PK\x03\x04\x14\0\x06\0", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"])
def test_a_workbook_with_the_suffix_of_a_table_is_named(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(DataError, match=r"a\.csv is a workbook .* save it as CSV UTF-8"):
        load(tmp_path / "a.csv", content * 9)


def test_lines_of_every_encoding_end_at_line_feeds_only(tmp_path: Path) -> None:
    text = "a\u2028b\x85\r\n c\r d\n"
    for encoding in ("utf-8", "utf-16", "gb18030"):
        (tmp_path / "a.txt").write_bytes(text.encode(encoding))
        given = None if encoding == "utf-16" else encoding

        assert list(text_lines(tmp_path / "a.txt", given)) == [(1, "a\u2028b\x85\r\n"), (2, " c\r d\n")]
        assert read_text(tmp_path / "a.txt", given) == text


@pytest.mark.parametrize(
    "content",
    [
        "text\na; b\nc\n",  # one column
        "text\n" + "a;b\n" * 20,
        "text,label\na;b,x\nc;d,y\n",
        "text,a;b,label\nt,u,x\n",
    ],
)
def test_a_usual_file_is_not_mistaken_for_another(tmp_path: Path, content: str) -> None:
    from dtrain.data.readers import read_rows

    (tmp_path / "a.csv").write_text(content)
    (_, first), *_ = read_rows(tmp_path / "a.csv", delimiter=None, header=None)

    assert isinstance(first, dict)
    assert list(first) == content.split("\n")[0].split(",")


def test_text_in_a_nameless_column_is_an_error_of_its_row(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"line 2: 3 columns where the header names 2"):
        load(tmp_path / "a.csv", "text,label,\nHello, world,pos\n")


@pytest.mark.parametrize(
    ("header", "row", "pasted"),
    [
        ("txt,label", "a b c,x", "data.columns.text=txt"),
        ("label,body", "x,a b c", "data.columns.text=body"),
        ("id,label,my words", "1,x,a b c", "data.columns.text=my words"),
        ("Text,label", "a,x", "data.columns.text=Text"),
        ("text,Label", "a,x", "data.columns.label=Label"),
        ("text,note,verdict", "a,b,x", "data.columns.label=verdict"),
        ("yes,label", "a b,x", "data.columns.text='yes'"),
        ("\u8bc4\u8bba,label", "\u597d,x", "data.columns.text=\u8bc4\u8bba"),
    ],
)
def test_the_cure_works_when_it_is_pasted(tmp_path: Path, header: str, row: str, pasted: str) -> None:
    content = f"{header}\n{row}\n{row}\n"
    with pytest.raises(DataError, match="Name the right one: ") as error:
        load(tmp_path / "a.csv", content)

    (word,) = shlex.split(str(error.value).split("Name the right one: ")[1])
    assert word == pasted
    columns = load_config(None, [f"data.path={tmp_path / 'a.csv'}", "task.name=classification", word]).data.columns
    assert len(load(tmp_path / "a.csv", content, columns=columns)) == 2


@pytest.mark.parametrize("header", ["label,id", "label", "sentiment,class"])
def test_a_label_is_never_proposed_as_the_text(tmp_path: Path, header: str) -> None:
    with pytest.raises(DataError, match=r"Name the right one, if there is one: data\.columns\.text=NAME"):
        load(tmp_path / "a.csv", f"{header}\n" + ",".join("x" for _ in header.split(",")) + "\n")


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_a_delimiter_that_was_set_wrong_is_named_and_the_cure_works(tmp_path: Path, delimiter: str) -> None:
    content = f"text{delimiter}label\na{delimiter}x\n"
    with pytest.raises(DataError, match="These look separated by ") as error:
        load(tmp_path / "a.csv", content, delimiter="^")

    (word,) = shlex.split(str(error.value).rsplit(": ", 1)[1])
    assert load_config(None, ["task.name=classification", word]).data.delimiter == delimiter
    assert load(tmp_path / "a.csv", content, delimiter=delimiter) == [("a", "x")]


def test_a_file_without_a_header_gets_the_cure(tmp_path: Path) -> None:
    content = "this is a very good film,1\nthis is a bad film,0\n"
    with pytest.raises(DataError, match=r"no header: data\.header=false"):
        load(tmp_path / "a.csv", content)

    assert load(tmp_path / "a.csv", content, header=False, columns={"text": "0", "label": "1"})[1][1] == "0"


@pytest.mark.parametrize("left", ["test.csv", "testing.jsonl"])
def test_files_that_look_like_splits_and_are_not_used_are_said(tmp_path: Path, left: str) -> None:
    from dtrain.data.sources import source_notes

    for name in ("train.csv", "dev.csv", left, "notes.csv"):
        (tmp_path / name).write_text("text,label\na,x\nb,y\n")

    (note,) = source_notes(load_sources(Data(path=tmp_path), LABELED))
    (alone,) = source_notes(load_sources(Data(path=tmp_path / "train.csv", split="end"), LABELED))

    assert (
        note
        == f"not used: {left}. To evaluate it as well: 'data.splits={{train: train.csv, validation: dev.csv, test: {left}}}'"
    )
    assert alone.startswith(f"not used: dev.csv, {left}.")
    assert alone.endswith(f"data.path={tmp_path}")


def test_a_relative_path_says_where_it_was_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "reviews.csv").write_text("")

    with pytest.raises(DataError) as error:
        load_sources(Data(path=Path("revews.csv")), LABELED)
    assert (
        f"looked for {tmp_path}/revews.csv). In {tmp_path}: reviews.csv. Did you mean {tmp_path}/reviews.csv?"
        in str(error.value)
    )
