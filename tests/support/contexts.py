"""Rank contexts with another place in the job, for tests that pretend to be on several nodes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dtrain.distributed.rank_context import RankContext


def placed(context: RankContext, **changes: Any) -> RankContext:
    """The same services under another topology: `placed(context, node_rank=1, num_nodes=2)`."""
    return replace(context, topology=replace(context.topology, **changes))
