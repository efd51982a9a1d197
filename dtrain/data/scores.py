"""Rows with a number to predict: a text or a pair of texts, and how much (a rating, a similarity, a price)."""

from __future__ import annotations

import math
from typing import Any

import pyarrow as pa

from dtrain.data.readers import Values
from dtrain.data.tables import Layout, Origin, Shape, labelled_layout
from dtrain.errors import DataError

SCORE_COLUMNS = ("label", "labels", "score", "similarity_score", "similarity", "rating", "value", "target", "stars")


def score_of(value: Any, place: str) -> float | None:
    """A label as a number; None where there is none. Files of text spell it as in `3.8`, `-1` or `1e-3`."""
    if value is None or value == "":
        return None
    try:
        if isinstance(value, bool) or (isinstance(value, str) and "_" in value):  # float() would take True and 1_000
            raise ValueError
        score = float(value)
    except (TypeError, ValueError):
        score = math.nan
    except OverflowError:  # JSON has integers of any length
        score = math.inf
    if not math.isfinite(score):
        raise DataError(
            f"{place}: the label {value!r} is no finite number, and task.name=regression learns one per row. Correct "
            "it, or learn names with task.name=classification"
        )
    return score


def _layout(first: Values, origin: Origin) -> Layout:
    return labelled_layout(first, origin, label_type=pa.float64(), read_label=score_of, usual_labels=SCORE_COLUMNS)


SCORED = Shape("scored", _layout)
