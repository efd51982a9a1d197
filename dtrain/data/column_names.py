"""The usual names of text and label columns, and the name to propose where a source has none of them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from dtrain.config.yaml_dialect import show

PAIRS = (
    ("text", "text_pair"),
    ("sentence1", "sentence2"),
    ("question1", "question2"),
    ("premise", "hypothesis"),
    ("question", "sentence"),
    ("question", "passage"),
    ("query", "passage"),
)
TEXTS = ("text", "sentence", "content", "review", "comment", "document", "utterance", "question", "query")
LABELS = ("label", "labels", "class", "category", "target", "gold_label", "is_duplicate", "sentiment", "intent")


def cure(setting: str, value: Any) -> str:
    """Returns `setting=value` as it can be pasted into a shell, with quotes where the shell or YAML needs them."""
    plain = value in (",", ";")  # YAML would quote them, but does not need to
    return shlex.quote(f"{setting}={value if plain else show(value)}")


def propose_column(
    ours: str,
    usual: Sequence[str],
    columns: Sequence[str],
    taken: Iterable[str | None],
    first: Mapping[str, Any] | None,
) -> str | None:
    """Returns the column that probably is ours, never one that has another meaning; None: no column is likely."""
    free = [name for name in columns if name not in taken]
    if same := next((name for name in free if name.strip().casefold() in usual), None):
        return same
    others = {*TEXTS, *(name for pair in PAIRS for name in pair), *LABELS, "id", "idx", "index", "line"} - set(usual)
    likely = [name for name in free if name.strip().casefold() not in others]
    if ours in ("text", "turns", "source") and first is not None:
        texts = [name for name in likely if isinstance(first.get(name), str)]
        return max(texts, key=lambda name: len(first[name]), default=likely[0] if likely else None)
    return (likely[-1] if ours in ("label", "tags", "target") else likely[0]) if likely else None


def looks_like_a_value(name: str) -> bool:
    """Returns whether a column name is more likely a text or a number of a file without a header."""
    return len(name.split()) > 3 or re.fullmatch(r"[+-]?\d+(\.\d+)?", name.strip()) is not None
