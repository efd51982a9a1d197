"""Rows with a number to predict (a rating, a similarity, a price) for a text or a pair of texts."""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa

from dtrain.data.readers import Values
from dtrain.data.tables import Origin, RowConverter, RowFormat, labeled_converter
from dtrain.errors import DataError

SCORE_COLUMNS = ("label", "labels", "score", "similarity_score", "similarity", "rating", "value", "target", "stars")


def parse_score(value: Any, location: str) -> float | None:
    """Returns a label as a number; None for an empty label. Text files write it like `3.8`, `-1` or `1e-3`."""
    if value is None or value == "":
        return None
    try:
        if isinstance(value, bool) or (isinstance(value, str) and "_" in value):  # float() accepts True and 1_000
            raise ValueError
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    except OverflowError:  # JSON has integers of any length
        score = math.inf
    if not math.isfinite(score):
        raise DataError(
            f"{location}: the label {value!r} is not a finite number, which task.name=regression needs. Correct it, or "
            "use task.name=classification for names"
        )
    return score


def _converter(first: Values, origin: Origin) -> RowConverter:
    return labeled_converter(first, origin, label_type=pa.float64(), read_label=parse_score, usual_labels=SCORE_COLUMNS)


SCORED = RowFormat("scored", _converter)
