"""Limits on the time and memory of a chat template, which is a program that came with a tokenizer.

Jinja's sandbox keeps a template from files and from Python's internals, but not from an endless loop or from texts of
gigabytes.
"""

from __future__ import annotations

import ctypes
import os
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dtrain.errors import DataError

TIME_LIMIT_S = 10.0
"""Seconds that a template may take for one dialogue. Usual templates take less than a millisecond."""

MEMORY_LIMIT_BYTES = 1 << 30
"""Memory that a template may allocate for one dialogue."""

TEXT_LIMIT = 32 << 20
"""Characters that a template may write for one dialogue."""

_CURE = "Use another tokenizer, or correct its chat_template"


class TemplateLimitError(DataError):
    """A chat template exceeded a limit. Other dialogues are not tried."""


class _OutOfTime(BaseException):
    """Raised inside the template by the watcher. Not an Exception, so that no code of the template catches it."""


class _Watcher:
    """A thread that interrupts the thread that is rendering when its time is over. One for each process."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self._lock = threading.Lock()
        self._rendering: dict[int, float] = {}  # thread id -> deadline
        threading.Thread(target=self._watch, name="chat-template-limit", daemon=True).start()

    def begin(self, time_limit_s: float) -> None:
        with self._lock:
            self._rendering[threading.get_ident()] = time.monotonic() + time_limit_s

    def end(self) -> None:
        with self._lock:
            self._rendering.pop(threading.get_ident(), None)

    def _watch(self) -> None:
        while True:
            time.sleep(0.1)
            with self._lock:
                now = time.monotonic()
                for thread in [thread for thread, deadline in self._rendering.items() if now > deadline]:
                    del self._rendering[thread]
                    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(_OutOfTime))


_watcher: _Watcher | None = None


@contextmanager
def limited(*, time_limit_s: float | None = None) -> Iterator[None]:
    """Runs a template with the limits.

    Args:
        time_limit_s: seconds; None: TIME_LIMIT_S.

    Raises:
        TemplateLimitError: the block takes longer, or allocates more than MEMORY_LIMIT_BYTES.
    """
    global _watcher
    if _watcher is None or _watcher.pid != os.getpid():  # threads do not survive a fork
        _watcher = _Watcher()
    time_limit_s = TIME_LIMIT_S if time_limit_s is None else time_limit_s
    try:
        with _limited_memory():
            _watcher.begin(time_limit_s)
            try:
                yield
            finally:
                _watcher.end()
    except _OutOfTime:
        raise TemplateLimitError(
            f"the tokenizer's chat template ran for more than {time_limit_s:g} s for one dialogue. {_CURE}"
        ) from None
    except (MemoryError, OverflowError) as error:
        raise TemplateLimitError(
            f"the tokenizer's chat template asked for more than {MEMORY_LIMIT_BYTES >> 20} MiB for one dialogue. {_CURE}"
        ) from error


def check_length(text: str) -> str:
    """Returns a rendered text.

    Raises:
        TemplateLimitError: it has more than TEXT_LIMIT characters.
    """
    if len(text) > TEXT_LIMIT:
        raise TemplateLimitError(
            f"the tokenizer's chat template wrote {len(text)} characters for one dialogue, more than {TEXT_LIMIT}. {_CURE}"
        )
    return text


@contextmanager
def _limited_memory() -> Iterator[None]:
    """Limits the address space to its present size and MEMORY_LIMIT_BYTES. Without effect where /proc is missing."""
    size = _address_space_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = None if size is None else size + MEMORY_LIMIT_BYTES
    if limit is None or (soft != resource.RLIM_INFINITY and soft <= limit):
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _address_space_bytes() -> int | None:
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    except (OSError, ValueError, IndexError):
        return None
    return pages * resource.getpagesize()
