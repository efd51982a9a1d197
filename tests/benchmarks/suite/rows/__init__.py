"""The rows of the table: one module for one row, or for a group of rows that differ in one number."""

from __future__ import annotations

from collections.abc import Callable

from tests.benchmarks.suite.options import Options
from tests.benchmarks.suite.result import RowResult
from tests.benchmarks.suite.rows import training_steps

ROWS: dict[str, Callable[[Options], RowResult]] = {
    "loop_overhead": training_steps.loop_overhead,
    "padding": training_steps.padding,
    "two_ranks": training_steps.two_ranks,
}
"""Each row's function, in the order of the table."""
