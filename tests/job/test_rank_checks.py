"""The checks that compare all ranks before a command runs."""

from __future__ import annotations

import re

import pytest

from dtrain.distributed.process_info import this_process
from dtrain.distributed.rank_context import ONE_PROCESS
from dtrain.errors import TopologyError
from dtrain.job import rank_checks
from tests.support.contexts import placed


@pytest.mark.parametrize("lacks", [0, 1])
def test_a_package_that_one_node_lacks_is_named_whichever_node_it_is(
    monkeypatch: pytest.MonkeyPatch, lacks: int
) -> None:
    found = [{"torch": "2", "deepspeed": "0.19"} for _ in range(2)]
    del found[lacks]["deepspeed"]
    monkeypatch.setattr(rank_checks, "is_equal_on_all_ranks", lambda *_: False)
    monkeypatch.setattr(rank_checks, "gather_object", lambda *_: found)
    monkeypatch.setattr(rank_checks, "on_main", lambda work, _context: work())
    processes = [this_process(), this_process()]

    with pytest.raises(TopologyError) as refused:
        rank_checks.compare_software(placed(ONE_PROCESS, world_size=2), processes)

    assert re.search(rf"deepspeed: .*not set on rank {lacks} ", str(refused.value))
    assert "torch" not in str(refused.value)
