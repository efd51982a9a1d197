"""Reads rows of a memory-mapped split as numpy views of its Arrow buffers, without a Python object for each token.

A batch needs the tokens of a few rows. Here a row of a list column is a view of the memory map, and a column of a batch is
a sequence that becomes Python lists only where somebody asks for them. Padding (tasks/tensors.py) copies the views.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, chain
from typing import Any, overload

import datasets
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

READ_ROWS = 1000
"""Rows that are read at once."""

Array = npt.NDArray[Any]


class ListLike(Sequence[Any]):
    """A sequence that is joined and shown as a list is."""

    __slots__ = ()

    def __add__(self, other: Iterable[Any]) -> list[Any]:
        return [*self, *other]

    def __radd__(self, other: Iterable[Any]) -> list[Any]:
        return [*other, *self]

    def __repr__(self) -> str:
        return repr(list(self))


class ListColumn(ListLike):
    """Rows of a list column. It equals the list of Python lists that `datasets` returns, and reads like it.

    Attributes:
        parts: for each row a read-only array; None for a row that is null; a list for a row with a null in it, or of
            nested lists.
    """

    __slots__ = ("parts",)

    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return len(self.parts)

    @overload
    def __getitem__(self, index: int) -> Any: ...

    @overload
    def __getitem__(self, index: slice) -> list[Any]: ...

    def __getitem__(self, index: int | slice) -> Any:
        return [_plain(part) for part in self.parts[index]] if isinstance(index, slice) else _plain(self.parts[index])

    def __iter__(self) -> Iterator[Any]:
        return map(_plain, self.parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, (ListColumn, list)) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # as for a list


class LateColumn(ListLike):
    """A column that is read when it is used, such as the texts beside the tokens."""

    __slots__ = ("_load", "_values")

    def __init__(self, load: Callable[[], Sequence[Any]], length: int) -> None:
        self._load = load
        self._values: Sequence[Any] | range = range(length)  # until they are loaded

    def _loaded(self) -> Sequence[Any]:
        if isinstance(self._values, range):
            self._values = self._load()
        return self._values

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: Any) -> Any:
        return self._loaded()[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self._loaded())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # as for a list


def _plain(part: Any) -> Any:
    if isinstance(part, np.ndarray):
        return part.tolist()
    return [_plain(row) for row in part] if isinstance(part, list) else part


def flat_rows(column: Sequence[Any]) -> Sequence[Any]:
    """Returns the inner lists of a column of lists of lists, e.g. the choices of all rows."""
    if isinstance(column, ListColumn):
        return ListColumn(list(chain.from_iterable(column.parts)))
    return list(chain.from_iterable(column))


def row_arrays(column: Iterable[Any]) -> list[Array]:
    """Returns the rows of a column of numbers as arrays; those of a split's own columns must not be written to."""
    rows = column.parts if isinstance(column, ListColumn) else column
    return [row if isinstance(row, np.ndarray) else np.asarray(row or [], dtype=np.int64) for row in rows]


def column_values(rows: datasets.Dataset, name: str) -> Iterator[Any]:
    """Yields the values of a column, read in batches: iterating over the column itself reads row by row."""
    for batch in rows.select_columns([name]).iter(READ_ROWS):
        yield from batch[name]


def arrow_column(rows: datasets.Dataset, name: str) -> pa.ChunkedArray:
    """Returns a column as Arrow has it, without copying where the rows are consecutive."""
    return rows.with_format("arrow", columns=[name])[:][name]


def value_counts(rows: datasets.Dataset, name: str) -> Counter[Any]:
    """Returns how often each value of a column occurs, in the order of the first rows that have them."""
    counts = pc.value_counts(arrow_column(rows, name))
    return Counter(dict(zip(counts.field("values").to_pylist(), counts.field("counts").to_pylist(), strict=True)))


def selected_rows(rows: datasets.Dataset) -> npt.NDArray[np.int64] | None:
    """Returns which rows of its table a dataset shows; None for all of them.

    `select` and `shuffle` leave the table as it is, and list which of its rows are meant.
    """
    if rows._indices is None:
        return None
    selected: npt.NDArray[np.int64] = rows._indices.column(0).to_numpy().astype(np.int64)
    return selected


class ColumnRows:
    """A `datasets.Dataset` whose list columns are read as `ListColumn`. All other values are those of the dataset."""

    def __init__(self, rows: datasets.Dataset) -> None:
        self._rows = rows
        names = [name for name in rows.column_names if name in rows.format["columns"]]
        table: pa.Table = rows.data.table
        self._columns = {
            name: _Column(table.column(name)) for name in names if _is_numeric(table.schema.field(name).type)
        }
        others = [name for name in names if name not in self._columns]
        self._others = rows.select_columns(others) if others else None
        self._names = names
        self._selected = selected_rows(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, indices: list[int]) -> Mapping[str, Sequence[Any]]:
        """Returns the columns of these rows, in this order."""
        number = len(self._rows)
        if any(not -number <= index < number for index in indices):
            raise IndexError(f"an index is out of range for {number} rows: {indices}")
        places = [index if index >= 0 else index + number for index in indices]
        stored = places if self._selected is None else self._selected[places].tolist()
        loaded: dict[str, Sequence[Any]] = {}

        def late(name: str) -> LateColumn:
            def load() -> Sequence[Any]:
                if not loaded and self._others is not None:
                    loaded.update(self._others[places])
                return loaded[name]

            return LateColumn(load, len(places))

        return {name: self._columns[name].rows(stored) if name in self._columns else late(name) for name in self._names}

    def __reduce__(self) -> tuple[type[ColumnRows], tuple[datasets.Dataset]]:  # views of a memory map are not sent
        return ColumnRows, (self._rows,)


def fast_rows(rows: Any) -> Any:
    """Returns a split that reads the rows of a dataset faster; any other split, or a dataset with a format, as it is."""
    plain = isinstance(rows, datasets.Dataset) and rows.format["type"] is None
    return ColumnRows(rows) if plain else rows


def _is_numeric(kind: pa.DataType) -> bool:
    """Returns whether values of this type, or of lists of it, can be views of the buffers."""
    types = pa.types
    if types.is_list(kind) or types.is_large_list(kind):
        return _is_numeric(kind.value_type)
    return bool(types.is_integer(kind) or types.is_float32(kind) or types.is_float64(kind) or types.is_boolean(kind))


class _Column:
    """A column of numbers, or of lists of them, in any number of chunks. Each chunk is opened when it is first read."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        chunks = [chunk for chunk in column.chunks if len(chunk)]
        self._starts = [0, *accumulate(map(len, chunks))]
        self._chunks: list[pa.Array | None] = list(chunks)
        self._readers: list[Callable[[int], Any] | None] = [None] * len(chunks)
        self._is_list = not pa.types.is_primitive(column.type)

    def rows(self, indices: Iterable[int]) -> Sequence[Any]:
        values = []
        for index in indices:
            chunk = bisect_right(self._starts, index) - 1
            reader = self._readers[chunk]
            if reader is None:
                array, self._chunks[chunk] = self._chunks[chunk], None
                reader = self._readers[chunk] = _reader(array)
            values.append(reader(index - self._starts[chunk]))
        return ListColumn(values) if self._is_list else values


def _reader(array: pa.Array) -> Callable[[int], Any]:
    """Returns a function that returns a row of an array: a number, an array, a list of rows, or None."""
    if pa.types.is_primitive(array.type):
        if array.null_count or pa.types.is_boolean(array.type):
            return lambda row: array[row].as_py()
        numbers = memoryview(array.to_numpy())
        return lambda row: numbers[row]
    offsets = memoryview(array.offsets.to_numpy())
    valid = array.is_valid().to_numpy(zero_copy_only=False) if array.null_count else None
    inner = array.values
    if not pa.types.is_primitive(inner.type):
        read = _reader(inner)

        def nested(row: int) -> Any:
            if valid is not None and not valid[row]:
                return None
            return [read(place) for place in range(offsets[row], offsets[row + 1])]

        return nested
    if inner.null_count:
        return lambda row: array[row].as_py()
    if pa.types.is_boolean(inner.type):
        bits, first = np.frombuffer(inner.buffers()[1] or b"", np.uint8), inner.offset

        def flags(row: int) -> Any:
            if valid is not None and not valid[row]:
                return None
            start, stop = first + offsets[row], first + offsets[row + 1]
            unpacked = np.unpackbits(bits[start // 8 : -(-stop // 8)], bitorder="little")
            return unpacked[start % 8 : start % 8 + stop - start].view(np.bool_)

        return flags
    values = inner.to_numpy()

    def flat(row: int) -> Any:
        return None if valid is not None and not valid[row] else values[offsets[row] : offsets[row + 1]]

    return flat
