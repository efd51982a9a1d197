"""Work with a time limit."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest

from dtrain.distributed.bounded import await_with_timeout, call_with_timeout


def _await(work: Callable[[], Any], timeout_s: float, default: Any, **options: Any) -> Any:
    return asyncio.run(await_with_timeout(work, timeout_s, default, **options))


@pytest.mark.parametrize("call", [call_with_timeout, _await])
def test_the_result_is_returned_unless_the_work_fails_or_blocks(call: Callable[..., Any]) -> None:
    release = threading.Event()

    def fail() -> int:
        raise OSError("no")

    assert call(lambda: 1, 10.0, 0) == 1
    assert call(fail, 10.0, 0, ignore=(OSError,)) == 0
    assert call(release.wait, 0.05, 0) == 0
    release.set()
