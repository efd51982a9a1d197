"""Pairs of texts: a sentence and its translation, a document and its summary.

They are in two columns, or in a column `translation` with one text per language: `{"translation": {"en": ..., "ro": ...}}`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa

from dtrain.data.readers import Values
from dtrain.data.tables import (
    Origin,
    RowConverter,
    RowFormat,
    configured_columns,
    get_text,
    get_value,
    missing_column,
    require_text,
)
from dtrain.errors import ConfigError, DataError

TRANSLATION = "translation"
"""The column with one text for each language."""

PAIRS = (
    ("source", "target"),
    ("article", "highlights"),
    ("document", "summary"),
    ("dialogue", "summary"),
    ("article", "summary"),
    ("text", "summary"),
    ("input", "output"),
)


def translation_row_format(source: str | None, target: str | None) -> RowFormat:
    """Returns the format of rows with `source` and, if the split has them, `target`. Texts may be empty.

    Args:
        source: language in `translation`, or column; None: the usual names.
        target: the same.
    """

    def converter(first: Values, origin: Origin) -> RowConverter:
        configured = configured_columns(list(first), origin, ("source", "target"))
        if TRANSLATION in first and not configured:
            return _languages(first, origin, source, target)
        return _columns(first, origin, configured.get("source", source), configured.get("target", target))

    return RowFormat("translations", converter)


def _languages(first: Values, origin: Origin, source: str | None, target: str | None) -> RowConverter:
    if source is None or target is None:
        texts = first[TRANSLATION]
        languages = list(texts) if isinstance(texts, Mapping) else []
        example = languages if len(languages) == 2 else ["en", "ro"]
        raise ConfigError(
            f"{origin.name} has translations{' (' + ', '.join(languages) + ')' if languages else ''}: set the languages "
            f"to translate from and into, e.g. task.source={example[0]} task.target={example[1]}"
        )
    has_target = origin.needs_label or _text_or_none(first, target) is not None

    def convert(values: Values, location: str) -> dict[str, str]:
        row = {"source": _language_text(values, source, location)}
        return {**row, "target": _language_text(values, target, location)} if has_target else row

    return RowConverter(_schema(has_target=has_target), convert)


def _text_or_none(values: Values, language: str) -> Any:
    texts = values.get(TRANSLATION)
    return texts.get(language) if isinstance(texts, Mapping) else None


def _language_text(values: Values, language: str, location: str) -> str:
    texts = get_value(values, TRANSLATION, location)
    if not isinstance(texts, Mapping):
        raise DataError(
            f'{location}: {TRANSLATION} must have a text for each language, as in {{"en": ..., "ro": ...}}, '
            f"found {texts!r}"
        )
    if language not in texts:
        raise DataError(
            f"{location}: {TRANSLATION} has no language {language!r}; it has {', '.join(map(str, texts)) or 'none'}"
        )
    return require_text(texts[language], f"{TRANSLATION}.{language}", location)


def _columns(first: Values, origin: Origin, source: str | None, target: str | None) -> RowConverter:
    columns = list(first)
    source, target = _by_usual_names(columns, source, target)
    if source is None or (target is None and origin.needs_label):
        ours, position = ("source", 0) if source is None else ("target", 1)
        usual = list(dict.fromkeys(pair[position] for pair in PAIRS))
        raise missing_column(f"the {ours}", ours, usual, columns, origin)
    for name, setting in ((source, "source"), (target, "target")):
        if name is not None and name not in columns and (setting == "source" or origin.needs_label):
            raise DataError(
                f"{origin.name} has no column {name!r}, which task.{setting} names, and no column {TRANSLATION!r} with "
                f"such a language. Its columns: {', '.join(columns)}"
            )
    source_column = source
    target_column = target if origin.needs_label or first.get(target or "") is not None else None

    def convert(values: Values, location: str) -> dict[str, str]:
        row = {"source": get_text(values, source_column, location)}
        return row if target_column is None else {**row, "target": get_text(values, target_column, location)}

    used = {"source": source_column, **({} if target_column is None else {"target": target_column})}
    return RowConverter(_schema(has_target=target_column is not None), convert, columns=used)


def _by_usual_names(columns: Sequence[str], source: str | None, target: str | None) -> tuple[str | None, str | None]:
    """Completes the names by the first matching pair of usual names; without such a pair, finds only the source."""
    for one, other in PAIRS:
        if one in columns and other in columns and source in (None, one) and target in (None, other):
            return one, other
    alone = next((one for one, _ in PAIRS if one in columns and one != target), None)
    return source or alone, target


def _schema(*, has_target: bool) -> pa.Schema:
    names = ("source", "target") if has_target else ("source",)
    return pa.schema([(name, pa.string()) for name in names])
