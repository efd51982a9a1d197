"""How many tokens the rows of a split have, read from the offsets of Arrow lists: the tokens themselves are not read.

A forward pass computes every row of a micro-batch at the width of the longest. So rows of like length belong together, and
a micro-batch costs (rows x width) tokens, padding included. Models that skip padding compute less; the padded number
is still what is counted here, so that the list of micro-batches depends on config and data alone (law 3).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch

from dtrain.data.columns import selected_rows
from dtrain.errors import DataError

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class RowLengths:
    """The lengths of all rows of a split, as they are in a batch before padding.

    Attributes:
        sequences: (rows,) sequences that a batch has of each row: 1, or its windows or choices.
        widths: by name of a batch's tensor: (rows,) tokens of the row's longest sequence in it.
        tokens: (rows,) real tokens of all sequences of a row.
        is_promised: whether the task promises that batches have these widths, so that another width is an error.
        source: where the rows are, for messages.
        generated: tokens that may be generated for each sequence besides.
    """

    sequences: Counts
    widths: Mapping[str, Counts]
    tokens: Counts
    is_promised: bool = True
    source: str = "the rows in memory"
    generated: int = 0

    @cached_property
    def width(self) -> Counts:
        """(rows,) tokens of a row's longest sequence, the target of a decoder included. Rows are sorted by it."""
        total: Counts = np.sum(list(self.widths.values()), axis=0)
        return total

    def order(self, indices: Sequence[int]) -> list[int]:
        """Returns the indices sorted by width, the shortest first. Rows of one width keep their order."""
        array = np.asarray(indices, dtype=np.int64)
        ordered: list[int] = array[np.argsort(self.width[array], kind="stable")].tolist()
        return ordered

    def cost(self, indices: Sequence[int]) -> int:
        """Returns the tokens that a forward pass of these rows computes, padding and generated ones included."""
        array = np.asarray(indices, dtype=np.int64)
        width = sum(int(width[array].max()) for width in self.widths.values()) + self.generated
        return int(self.sequences[array].sum()) * width

    def fill(self, micro_batches: Sequence[Sequence[int]]) -> float:
        """Returns the share of real tokens among all that these micro-batches compute."""
        real = sum(int(self.tokens[np.asarray(indices)].sum()) for indices in micro_batches)
        return real / max(sum(map(self.cost, micro_batches)), 1)

    def check(self, tensors: Mapping[str, Any], indices: Sequence[int]) -> None:
        """Compares a batch with the lengths of its rows.

        Raises:
            DataError: the batch has another number of tokens, so that these lengths are of other rows.
        """
        if not self.is_promised:
            return
        array = np.asarray(indices, dtype=np.int64)
        rows = int(self.sequences[array].sum())
        for name, widths in self.widths.items():
            tensor = tensors.get(name)
            promised = rows * int(widths[array].max())
            if isinstance(tensor, torch.Tensor) and tensor.numel() != promised:
                shown = ", ".join(map(str, list(indices)[:5])) + (", ..." if len(indices) > 5 else "")
                raise DataError(
                    f"A batch of the rows {shown} has {tensor.numel()} tokens in {name}, but by the table of lengths it has "
                    f"{promised}: the lengths are those of other rows than the batch ({self.source}). If this is a folder "
                    "of data.cache_dir, delete it: it is built again. A task of your own whose collate changes lengths "
                    "needs its own row_lengths (docs/new-task.md)."
                )


def token_lengths(
    rows: Any,
    column: str = "input_ids",
    *,
    tensor: str | None = None,
    length: int | None = None,
    minimum: int = 0,
    left_out: int | Counts = 0,
    is_promised: bool = True,
) -> RowLengths | None:
    """Returns the lengths of a column of token lists, or of lists of such lists (windows, choices).

    Args:
        column: the column in the rows.
        tensor: the tensor of a batch that holds it; None: it has the column's name.
        length: width that every sequence is padded to; None: that of the longest in its batch.
        minimum: least width of a sequence in a batch.
        left_out: tokens of a row, or of each row, that are no inputs.

    Returns:
        None for rows that are no Arrow table, or whose column is missing or holds no lists.
    """
    values = _column(rows, column)
    if values is None:
        return None
    if pa.types.is_null(values.type):
        outer, inner = np.zeros(len(values), dtype=np.int64), None
    elif _is_list(values.type):
        outer = _list_lengths(values)
        inner = _flat(values) if _is_list(values.type.value_type) else None
    else:
        return None
    sequences, width, tokens = np.ones_like(outer), outer, outer
    if inner is not None:
        sequences, width, tokens = outer, *_longest_and_sum(_list_lengths(inner), outer)
    take = selected_rows(rows)
    if take is not None:
        sequences, width, tokens = sequences[take], width[take], tokens[take]
    width, tokens = np.maximum(width - left_out, minimum), np.maximum(tokens - left_out, 0)
    if length is not None:
        width = np.full_like(width, length)
    return RowLengths(sequences, {tensor or column: width}, tokens, is_promised, _source(rows))


def list_lengths(rows: Any, column: str) -> Counts | None:
    """Returns how many items the lists of a column have; None where there is no such column."""
    values = _column(rows, column)
    if values is None or not _is_list(values.type):
        return None
    take, found = selected_rows(rows), _list_lengths(values)
    return found if take is None else found[take]


def _column(rows: Any, name: str) -> pa.ChunkedArray | None:
    if not isinstance(rows, datasets.Dataset) or name not in rows.column_names:
        return None
    values: pa.ChunkedArray = rows.data.column(name)
    return values


def _is_list(arrow_type: pa.DataType) -> bool:
    return bool(pa.types.is_list(arrow_type) or pa.types.is_large_list(arrow_type))


def _list_lengths(values: pa.ChunkedArray) -> Counts:
    """Returns (lists,) the length of each list; 0 for a missing one."""
    found: Counts = pc.fill_null(pc.list_value_length(values), 0).to_numpy().astype(np.int64)
    return found


def _flat(values: pa.ChunkedArray) -> pa.ChunkedArray:
    """Returns the inner lists of lists, one after another."""
    return pa.chunked_array([chunk.flatten() for chunk in values.chunks], values.type.value_type)


def _longest_and_sum(inner: Counts, outer: Counts) -> tuple[Counts, Counts]:
    """Returns the largest and the sum of each row's part of `inner`, which has outer[row] values."""
    longest, total = np.zeros_like(outer), np.zeros_like(outer)
    filled = outer > 0  # reduceat has no empty parts
    starts = (np.cumsum(outer) - outer)[filled]
    if len(starts):
        longest[filled] = np.maximum.reduceat(inner, starts)
        total[filled] = np.add.reduceat(inner, starts)
    return longest, total


def _source(rows: datasets.Dataset) -> str:
    files = rows.cache_files
    return str(Path(files[0]["filename"]).parent) if files else "the rows in memory"
