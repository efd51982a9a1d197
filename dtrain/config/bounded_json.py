"""Reads JSON that a user or a stranger wrote, with limits: whatever is wrong with it is one kind of error, with its place.

Python's own reader raises a RecursionError for deep nesting, and a ValueError without a place for a number with thousands
of digits.
"""

from __future__ import annotations

import json
import re
from typing import Any

MAX_DEPTH = 100
"""Lists and objects inside each other."""
MAX_DIGITS = 100
"""Digits of a whole number. A 64-bit number has 19."""

_LONG_NUMBER = re.compile(rf"[0-9]{{{MAX_DIGITS + 1}}}")
_STRING_OR_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{\]}]')


def loads(text: str | bytes) -> Any:
    """Returns the value that a JSON text holds.

    Raises:
        json.JSONDecodeError: a ValueError; it is not JSON, or exceeds a limit.
        UnicodeDecodeError: a ValueError; bytes that are not UTF-8.
    """
    text = text if isinstance(text, str) else text.decode("utf-8-sig")
    try:
        # Python is two to three times as slow with a function for numbers, so the check comes first.
        value = json.loads(text, parse_int=_read_whole_number) if _LONG_NUMBER.search(text) else json.loads(text)
    except _NumberError as error:
        raise json.JSONDecodeError(str(error), text, text.find(error.digits)) from None
    except RecursionError:
        raise _depth_error(text) from None
    if text.count("[") + text.count("{") > MAX_DEPTH and _is_too_deep(value):
        raise _depth_error(text)
    return value


class _NumberError(Exception):
    """A number with too many digits."""

    def __init__(self, digits: str) -> None:
        super().__init__(f"a number of {len(digits):,} characters, where at most {MAX_DIGITS} are read")
        self.digits = digits


def _read_whole_number(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise _NumberError(text)
    return int(text)


def _is_too_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        level = [
            child
            for item in level
            for child in (item.values() if isinstance(item, dict) else item if isinstance(item, list) else ())
            if isinstance(child, dict | list)
        ]
    return bool(level)


def _depth_error(text: str) -> json.JSONDecodeError:
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match[0], 0)
        if depth > MAX_DEPTH:
            return json.JSONDecodeError(f"nested more than {MAX_DEPTH} levels deep", text, match.start())
    return json.JSONDecodeError("nested too deeply", text, 0)
