"""What an evaluation sends: the values of all examples, in one gather, and what rank 0 made of them.

Both also carry whether a rank has to stop, so that the ranks need no further collective to leave together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dtrain.distributed.collectives import all_gather, all_reduce_max, broadcast_object, outcome_of, value_of
from dtrain.distributed.rank_context import RankContext
from dtrain.distributed.serialization import DTYPES, Json, bytes_to_object, object_to_bytes, tensor_to_bytes
from dtrain.errors import DtrainError

SHARED_BYTES = 8192
"""Results of rank 0 up to this size cross in the same all-reduce as the stop."""


class StopWanted(Exception):
    """Raised on every rank: one of them has to stop."""


def gather_for_metrics(
    values: Mapping[str, Tensor],
    example_index: Tensor,
    context: RankContext,
    *,
    num_examples: int,
    wants_stop: bool = False,
) -> dict[str, Tensor]:
    """Collective. Returns all ranks' per-example values, each example once, in data order, on every rank's host.

    All columns cross in one gather (two collectives: sizes, then bytes).

    Args:
        values: by name, one row per example of this rank: (rows, ...). Trailing shape and dtype are the same on all
            ranks. A rank without examples passes empty tensors of any shape, or nothing: shapes and dtypes come from
            ranks that have rows.
        example_index: (rows,) int64, each row's index in the split.
        num_examples: number of examples in the split.
        wants_stop: whether this rank has broken its part off.

    Returns:
        By name, (num_examples, ...) on the host.

    Raises:
        StopWanted: on all ranks; one of them has broken its part off.
        DtrainError: on all ranks; the indices are not 0 .. num_examples-1 once each, or the values do not fit.
    """
    rows = example_index.numel()
    report = {
        "rows": rows,
        "values": {name: [list(value.shape), str(value.dtype)] for name, value in values.items()},
        "wants_stop": wants_stop,
    }
    columns = [example_index.to(torch.int64).reshape(-1), *(values.values() if rows else ())]
    parts = [_unpack(part) for part in all_gather(_pack(report, columns), context)]
    reports = [report for report, _ in parts]
    if any(report["wants_stop"] for report in reports):
        raise StopWanted
    common = _common_kinds(reports)
    index = torch.cat([_read(content, [[[report["rows"]], "torch.int64"]])[0] for report, content in parts])
    _check_permutation(index, num_examples)
    if common is None:  # no rank has an example
        return {name: value.detach().cpu().clone() for name, value in values.items()}
    ranks = [_read(content[8 * r["rows"] :], list(r["values"].values())) for r, content in parts if r["rows"]]
    gathered = {}
    for name, column in zip(common, zip(*ranks, strict=True), strict=True):
        joined = torch.cat(column)
        gathered[name] = torch.empty_like(joined)
        gathered[name][index] = joined
    return gathered


def _pack(report: Json, columns: Sequence[Tensor]) -> Tensor:
    """Returns (bytes,) uint8: the size of the report, the report, the columns."""
    text = object_to_bytes(report)
    size = tensor_to_bytes(torch.tensor([text.numel()], dtype=torch.int64))
    return torch.cat([size, text, *map(tensor_to_bytes, columns)])


def _unpack(packed: Tensor) -> tuple[Json, Tensor]:
    """Returns the report and the bytes of the columns."""
    stop = 8 + int(packed[:8].clone().view(torch.int64))
    return bytes_to_object(packed[8:stop]), packed[stop:]


def _read(content: Tensor, kinds: Sequence[Json]) -> list[Tensor]:
    """Returns the columns of the given shapes and dtypes that the bytes begin with."""
    columns, start = [], 0
    for shape, name in kinds:
        dtype = next(dtype for dtype in DTYPES if str(dtype) == name)
        stop = start + torch.Size(shape).numel() * dtype.itemsize
        columns.append(content[start:stop].clone().view(dtype).reshape(shape))
        start = stop
    return columns


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


def _check_permutation(index: Tensor, num_examples: int) -> None:
    counts = torch.bincount(index[(index >= 0) & (index < num_examples)], minlength=num_examples)
    wrong = {
        "out of range": index[(index < 0) | (index >= num_examples)],
        "counted more than once": (counts > 1).nonzero().reshape(-1),
        "missing": (counts == 0).nonzero().reshape(-1),
    }
    problems = [
        f"{some.numel()} {problem} ({', '.join(map(str, some[:5].tolist()))}{', ...' if some.numel() > 5 else ''})"
        for problem, some in wrong.items()
        if some.numel()
    ]
    if problems:
        raise DtrainError(
            f"Evaluation must count each of the {num_examples} examples once. Wrong indices: {'; '.join(problems)}. "
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
