"""Time limits for work that may block: it runs in a daemon thread, which is abandoned when the time is over.

Where no thread can be started (a limit of the user or container), the work runs without a time limit: it says how a job
ends.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")
D = TypeVar("D")

POLL_S = 0.01


def call_with_timeout(
    work: Callable[[], T], timeout_s: float, default: D, *, ignore: tuple[type[Exception], ...] = ()
) -> T | D:
    """Returns the result of `work`, or `default` if it raises or takes longer than `timeout_s`.

    Args:
        ignore: expected exceptions. threading.excepthook prints all others.
    """
    thread, result = _start(work, default, ignore)
    if thread is not None:
        thread.join(timeout_s)
    return result[0]


async def await_with_timeout(
    work: Callable[[], T], timeout_s: float, default: D, *, ignore: tuple[type[Exception], ...] = ()
) -> T | D:
    """Does the same as `call_with_timeout` without blocking the event loop."""
    thread, result = _start(work, default, ignore)
    deadline = time.monotonic() + timeout_s
    while thread is not None and thread.is_alive() and time.monotonic() < deadline:
        await asyncio.sleep(POLL_S)
    return result[0]


def _start(
    work: Callable[[], T], default: D, ignore: tuple[type[Exception], ...]
) -> tuple[threading.Thread | None, list[T | D]]:
    result: list[T | D] = [default]

    def run() -> None:
        with suppress(*ignore):
            result[0] = work()

    thread = threading.Thread(target=run, daemon=True)
    try:
        thread.start()
    except RuntimeError:
        with suppress(Exception):
            run()
        return None, result
    return thread, result
