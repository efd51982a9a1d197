"""Decodes text files: which encoding a file has, where its lines end, and what to do if it is not UTF-8.

UTF-8 is the default. A byte order mark decides between UTF-8, UTF-16 and UTF-32. Every other encoding is named by
`data.encoding`, since guessing it wrong would train on garbage; the error for a file that is not UTF-8 proposes one.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dtrain.errors import DataError

_MARKS = (  # UTF-32 first: its mark begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_SAMPLE_BYTES = 1 << 16
_WORKBOOKS = (b"PK\x03\x04", b"\xd0\xcf\x11\xe0")

_FREQUENT = {
    name: characters
    for name, _, characters in (
        line.partition(" ")
        for line in (Path(__file__).parent / "frequent_characters.txt").read_text(encoding="utf-8").splitlines()
    )
}
"""Per encoding, characters that make up a quarter or more of ordinary text, and almost nothing of wrongly decoded text."""

_FULL_WIDTH = str.maketrans(",!?", "\uff0c\uff01\uff1f")


def text_lines(path: Path, encoding: str | None = None) -> Iterator[tuple[int, str]]:
    r"""Yields numbered lines with their line breaks.

    Only "\n" ends a line; U+2028, \x0b and \x85 are part of the text. In a file without any "\n", "\r" ends a line, as on
    old Macs.

    Args:
        encoding: `data.encoding`; None: UTF-8, or what the byte order mark says.

    Raises:
        DataError: the file is unreadable or is not in this encoding.
    """
    with _open(path) as file:
        encoding = _encoding_of(file, path, encoding)
        lines = _utf8_lines(file, path) if encoding == "utf-8" else _other_lines(file, path, encoding)
        first = next(lines, None)
        if first is None:
            return
        first = first.removeprefix("\ufeff")
        if "\r" in first and not first.endswith("\n"):  # then it is the whole file
            yield from enumerate(re.findall(r"[^\r]*\r|[^\r]+", first), start=1)
            return
        yield 1, first
        yield from enumerate(lines, start=2)


def read_text(path: Path, encoding: str | None = None) -> str:
    """Returns the text of a file unchanged, with all line breaks but without a byte order mark."""
    with _open(path) as file:
        encoding = _encoding_of(file, path, encoding)
        content = file.read()
        if encoding == "utf-8":
            return _decode(content, path, line=1, offset=0).removeprefix("\ufeff")
        try:
            return content.decode(encoding).removeprefix("\ufeff")
        except UnicodeError as error:
            start = error.start if isinstance(error, UnicodeDecodeError) else 0
            raise _wrong_encoding(path, content.count(b"\n", 0, start) + 1, encoding, error) from None


def guess_encoding(path: Path) -> str | None:
    """Returns the likely encoding of a file that is not UTF-8, by its first 64 KiB; None if it looks like none."""
    with path.open("rb") as file:
        sample = file.read(_SAMPLE_BYTES)
    if utf16 := _guess_utf16(sample):
        return utf16
    runs = re.findall(rb"[\x80-\xff]+", sample)
    if runs and sum(len(run) == 1 for run in runs) >= 0.7 * len(runs):
        return "cp1252"  # single accented letters among ASCII
    share = {encoding: _frequent_share(sample, encoding) for encoding in _FREQUENT}
    best = max(share, key=lambda name: share[name])
    if share[best] >= 0.15:
        return best
    return "gb18030" if _frequent_share(sample, "gb18030") >= 0.05 else None


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(
            f"{path} cannot be read: {error.strerror}. data.path and data.splits select the files"
        ) from None


def _encoding_of(file: BinaryIO, path: Path, encoding: str | None) -> str:
    """Returns the encoding of an open file, which stays at its beginning."""
    head = file.read(4096)
    file.seek(0)
    if head.startswith(_WORKBOOKS):
        raise DataError(
            f"{path} is a workbook (Excel, LibreOffice) or a zip archive, not text: open it and save it as CSV UTF-8"
        )
    if encoding is not None:
        return codecs.lookup(encoding).name
    marked = next((name for mark, name in _MARKS if head.startswith(mark)), None)
    if marked is None and b"\0" in head:
        guess = _guess_utf16(head)
        reason = f"It looks like UTF-16: set data.encoding={guess}" if guess else "Is it a text file?"
        raise DataError(
            f"{path}, line {head[: head.index(0)].count(10) + 1}: the byte 0x00 at offset {head.index(0)} is not part of "
            f"UTF-8 text. {reason}"
        )
    return marked or "utf-8"


def _utf8_lines(file: BinaryIO, path: Path) -> Iterator[str]:
    offset = 0
    for number, raw in enumerate(file, start=1):
        yield _decode(raw, path, line=number, offset=offset)
        offset += len(raw)


def _other_lines(file: BinaryIO, path: Path, encoding: str) -> Iterator[str]:
    number = 0
    try:
        for line in io.TextIOWrapper(file, encoding=encoding, newline="\n"):
            number += 1
            yield line
    except UnicodeError as error:
        raise _wrong_encoding(path, number + 1, encoding, error) from None


def _wrong_encoding(path: Path, line: int, encoding: str, error: UnicodeError) -> DataError:
    return DataError(
        f"{path}, line {line} or soon after: not {encoding}: {getattr(error, 'reason', error)}. Correct data.encoding, or "
        "save the file as UTF-8 and remove the setting"
    )


def _decode(raw: bytes, path: Path, *, line: int, offset: int) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line += raw.count(b"\n", 0, error.start)
        guess = guess_encoding(path)
        cure = (
            f"It looks like {guess}: set data.encoding={guess}, or save it as UTF-8 (iconv -f {guess} -t UTF-8)"
            if guess
            else "Name its encoding, e.g. data.encoding=gb18030, or save it as UTF-8 (iconv -f OLD -t UTF-8)"
        )
        raise DataError(
            f"{path}, line {line}: the byte 0x{raw[error.start]:02x} at offset {offset + error.start} is not UTF-8. {cure}"
        ) from None


def _guess_utf16(sample: bytes) -> str | None:
    """Returns the byte order of UTF-16 without a mark; None if the bytes do not look like UTF-16."""
    sample = sample[: len(sample) // 2 * 2]
    for encoding in ("utf-16-le", "utf-16-be"):
        text = sample.decode(encoding, errors="replace")
        usual = sum(
            map(len, re.findall(r"[\t\r\n -~\u00a0-\u024f\u0370-\u052f\u3000-\u30ff\u4e00-\u9fff\uff00-\uff5f]+", text))
        )
        if text and b"\0" in sample and usual >= 0.95 * len(text):
            return encoding
    return None


def _frequent_share(sample: bytes, encoding: str) -> float:
    """Returns the share of frequent characters among those outside ASCII; 0 if the bytes are not in this encoding."""
    try:  # incremental, because the sample may end inside a character
        text = codecs.getincrementaldecoder(encoding)().decode(sample)
    except UnicodeError:
        return 0.0
    others = [character for character in text if not character.isascii()]
    frequent = set(_FREQUENT[encoding].translate(_FULL_WIDTH))
    return sum(character in frequent for character in others) / len(others) if others else 0.0
