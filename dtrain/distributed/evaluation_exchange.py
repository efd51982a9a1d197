"""What an evaluation sends: the values of all examples to rank 0, and what rank 0 made of them to all.

Both also carry whether a rank has to stop, so that the ranks need no further collective to leave together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional
from torch import Tensor

from dtrain.distributed.collectives import (
    all_gather_numbers,
    all_reduce_max,
    broadcast_object,
    gather_bytes,
    outcome_of,
    value_of,
)
from dtrain.distributed.heartbeat import Phase
from dtrain.distributed.rank_context import RankContext
from dtrain.distributed.serialization import DTYPES, Json, bytes_to_object, object_to_bytes, tensor_to_bytes
from dtrain.errors import DtrainError

SHARED_BYTES = 8192
"""Results of rank 0 up to this size cross in the same all-reduce as the stop."""

MAX_GATHER_BYTES = 2**24
"""Rank 0 receives this many bytes at once, of all ranks together. More rows cross in several gathers."""

ALIGNMENT = 8
"""Each column begins at a multiple of this, so that it is read where it lies."""


class StopWanted(Exception):
    """Raised on every rank: one of them has to stop."""


def gather_for_metrics(
    values: Mapping[str, Tensor],
    example_index: Tensor,
    context: RankContext,
    *,
    num_examples: int,
    work: Callable[[dict[str, Tensor]], Json],
    wants_stop: Callable[[], bool] = lambda: False,
) -> Json:
    """Collective. Gives rank 0 all ranks' per-example values, each example once, in data order; returns what it makes of them.

    Three collectives: sizes, bytes, result; more if the bytes exceed MAX_GATHER_BYTES. Only rank 0 holds all values.

    Args:
        values: by name, one row per example of this rank: (rows, ...). Trailing shape and dtype are the same on all
            ranks. A rank without examples passes empty tensors of any shape, or nothing: shapes and dtypes come from
            ranks that have rows.
        example_index: (rows,) int64, each row's index in the split.
        num_examples: number of examples in the split.
        work: called on rank 0 with the values by name, (num_examples, ...) on the host.
        wants_stop: whether this rank has to stop; called before the gather and after the work.

    Returns:
        The result of `work` on every rank, through JSON.

    Raises:
        StopWanted: on all ranks; one of them has to stop.
        DtrainError: on all ranks; the indices are not 0 .. num_examples-1 once each, the values do not fit, or `work`
            has raised it.
    """
    rows = example_index.numel()
    report = {"rows": rows, "values": {name: [list(v.shape), str(v.dtype)] for name, v in values.items()}}
    columns = [example_index.to(torch.int64).reshape(-1), *(values.values() if rows else ())]
    packed = object_to_bytes(report)
    row_bytes = sum(column.element_size() * column[0].numel() for column in columns if len(column))
    sizes = all_gather_numbers([int(wants_stop()), rows, packed.numel(), row_bytes, len(columns)], context)
    if sizes[:, 0].any():
        raise StopWanted
    table = _GatheredTable(num_examples) if context.is_main else None
    chunk = max(1, MAX_GATHER_BYTES // max(1, int(sizes[:, 3].sum())))
    for begin in range(0, max(1, int(sizes[:, 1].max())), chunk):
        parts = [] if begin else [packed]
        parts += [tensor_to_bytes(column[begin : begin + chunk]) for column in columns]
        width = _width(sizes, begin=begin, chunk=chunk)
        received = gather_bytes(torch.cat([_align(part) for part in parts]), width, context)
        if table is not None and received is not None:
            table.add(received, begin=begin, chunk=chunk, report_sizes=sizes[:, 2].tolist())
    context.heartbeat.at(Phase.METRICS)  # a phase without a time limit
    return share_from_main(lambda: work(_complete(table, values)), context, wants_stop=wants_stop)


def _width(sizes: Tensor, *, begin: int, chunk: int) -> int:
    """Returns the number of bytes that hold every rank's rows of one gather, with the report in the first one."""
    rows = (sizes[:, 1] - begin).clamp(0, chunk)
    reports = 0 if begin else sizes[:, 2]
    return int((reports + rows * sizes[:, 3] + (1 + sizes[:, 4]) * ALIGNMENT).max())


class _GatheredTable:
    """The values on rank 0, in data order.

    Attributes:
        columns: by name; empty before the first part of a rank with rows.
    """

    def __init__(self, num_examples: int) -> None:
        self.columns: dict[str, Tensor] = {}
        self._num_examples = num_examples
        self._counts = torch.zeros(num_examples, dtype=torch.int32)
        self._outside: list[int] = []
        self._reports: list[Json] = []
        self._problem: DtrainError | None = None

    def add(self, parts: Sequence[Tensor], *, begin: int, chunk: int, report_sizes: Sequence[int]) -> None:
        """Adds the rows begin .. begin+chunk-1 of each rank, from the bytes that the ranks have sent."""
        starts = [0] * len(parts)
        if not begin:
            self._reports = [bytes_to_object(part[:size]) for part, size in zip(parts, report_sizes, strict=True)]
            starts = [_aligned(size) for size in report_sizes]
            self._allocate()
        for part, start, report in zip(parts, starts, self._reports, strict=True):
            rows = min(chunk, report["rows"] - begin)
            if self._problem is None and rows > 0:
                self._add_rows(part, start, rows)

    def _allocate(self) -> None:
        try:
            common = _common_kinds(self._reports)
        except DtrainError as error:  # kept: the other ranks are still sending
            self._problem = error
            return
        for name, (shape, dtype) in (common or {}).items():
            self.columns[name] = torch.zeros([self._num_examples, *shape], dtype=_dtype(dtype))

    def _add_rows(self, part: Tensor, start: int, rows: int) -> None:
        index, start = _read(part, start, [rows], torch.int64)
        is_valid = (index >= 0) & (index < self._num_examples)
        if all_valid := bool(is_valid.all()):
            valid = index
        else:
            self._outside += index[~is_valid].tolist()
            valid = index[is_valid]
        self._counts.index_add_(0, valid, torch.ones(len(valid), dtype=torch.int32))
        for column in self.columns.values():
            values, start = _read(part, start, [rows, *column.shape[1:]], column.dtype)
            column[valid] = values if all_valid else values[is_valid]

    def check(self) -> None:
        """
        Raises:
            DtrainError: the indices are not 0 .. num_examples-1 once each, or the values do not fit.
        """
        if self._problem is not None:
            raise self._problem
        _check_counts(self._counts, self._outside)


def _complete(table: _GatheredTable | None, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the checked values on rank 0; its own, empty ones if no rank has an example."""
    assert table is not None, "rank 0 only"
    table.check()
    return table.columns or {name: value.detach().cpu().clone() for name, value in values.items()}


def _align(data: Tensor) -> Tensor:
    """Returns the bytes, filled up to a multiple of ALIGNMENT."""
    return torch.nn.functional.pad(data, (0, _aligned(data.numel()) - data.numel()))


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _dtype(name: str) -> torch.dtype:
    return next(dtype for dtype in DTYPES if str(dtype) == name)


def _read(part: Tensor, start: int, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, int]:
    """Returns the column that begins there, without a copy, and where the next one begins."""
    size = torch.Size(shape).numel() * dtype.itemsize
    return part[start : start + size].view(dtype).reshape(shape), start + _aligned(size)


def _common_kinds(reports: Sequence[Json]) -> dict[str, Json] | None:
    """Returns trailing shape and dtype of each value by name, equal on all ranks with rows; None if no rank has any."""
    common: dict[str, Json] | None = None
    for rank, report in enumerate(reports):
        if not report["rows"]:
            continue
        short = [name for name, (shape, _) in report["values"].items() if shape[:1] != [report["rows"]]]
        if short:
            raise DtrainError(
                f"Evaluation: rank {rank} has {report['rows']} example indices, but not as many rows of {short[0]}."
            )
        kinds = {name: [shape[1:], dtype] for name, (shape, dtype) in report["values"].items()}
        if common is not None and kinds != common:
            raise DtrainError(
                f"Evaluation: the ranks disagree about the values to gather: {common} against {kinds} on rank {rank}."
            )
        common = kinds
    return common


def _check_counts(counts: Tensor, outside: Sequence[int]) -> None:
    """
    Args:
        counts: (num_examples,) how often each example was counted.
        outside: indices of no example.
    """
    wrong = {
        "out of range": outside,
        "counted more than once": (counts > 1).nonzero().reshape(-1).tolist(),
        "missing": (counts == 0).nonzero().reshape(-1).tolist(),
    }
    problems = [
        f"{len(some)} {problem} ({', '.join(map(str, some[:5]))}{', ...' if len(some) > 5 else ''})"
        for problem, some in wrong.items()
        if some
    ]
    if problems:
        raise DtrainError(
            f"Evaluation must count each of the {len(counts)} examples once. Wrong indices: {'; '.join(problems)}. "
            "Each batch's example_index must come from the split's own order."
        )


def share_from_main(work: Callable[[], Json], context: RankContext, *, wants_stop: Callable[[], bool]) -> Json:
    """Collective. Runs `work` on rank 0; returns its result on every rank, through JSON, in one all-reduce if it is small.

    Args:
        wants_stop: whether this rank has to stop; called after the work.

    Raises:
        StopWanted: on all ranks, where one of them has to stop.
        DtrainError: what `work` raised, on all ranks.
    """
    outcome = outcome_of(work) if context.is_main else None
    sent = torch.zeros(SHARED_BYTES + 9, dtype=torch.uint8)
    sent[0] = int(wants_stop())
    if context.is_main:
        text = object_to_bytes(outcome)
        sent[1:9] = tensor_to_bytes(torch.tensor([text.numel()], dtype=torch.int64))
        if text.numel() <= SHARED_BYTES:
            sent[9 : 9 + text.numel()] = text
    received = all_reduce_max(sent, context)  # the others send zeros
    if received[0]:
        raise StopWanted
    size = int(received[1:9].clone().view(torch.int64))
    if size > SHARED_BYTES:
        return value_of(broadcast_object(outcome, context), context)
    return value_of(bytes_to_object(received[9 : 9 + size]), context)
