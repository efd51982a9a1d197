"""The rows of the table: one module for one row, or for a group of rows that differ in one number."""

from __future__ import annotations

from collections.abc import Callable

from tests.benchmarks.suite.options import Options
from tests.benchmarks.suite.result import RowResult
from tests.benchmarks.suite.rows import (
    checkpoint,
    evaluation,
    frozen,
    memory,
    minilm_cola,
    start,
    tokenizing,
    training_steps,
)

ROWS: dict[str, Callable[[Options], RowResult]] = {
    "loop_overhead": training_steps.loop_overhead,
    "padding": training_steps.padding,
    "frozen": frozen.frozen,
    "frozen_10": frozen.frozen_10,
    "half_frozen": frozen.half_frozen,
    "evaluation": evaluation.evaluation,
    "memory": memory.memory,
    "checkpoint": checkpoint.checkpoint,
    "start": start.start,
    "tokenizing": tokenizing.tokenizing,
    "minilm_cola": minilm_cola.minilm_cola,
    "two_ranks": training_steps.two_ranks,
}
"""Each row's function, in the order of the table."""
