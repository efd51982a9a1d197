"""The records of an evaluation on every rank, for tests that compare what each rank measured with one process."""

from __future__ import annotations

from typing import Any

from dtrain.distributed.collectives import broadcast_object
from dtrain.distributed.rank_context import RankContext
from dtrain.training.evaluation import SplitResult


def records_of(result: SplitResult, context: RankContext) -> list[dict[str, Any]]:
    """Collective. Returns the records that rank 0 has made; the other ranks must have made none."""
    assert context.is_main or not result.records, "records of all examples on a rank that writes none"
    records: list[dict[str, Any]] = broadcast_object([dict(record) for record in result.records], context)
    return records
