"""A limit on the time of a tokenizer's regular expressions, which came with it and may take forever for some texts.

The library stops a single match after ten million retries and panics. Below that, each character of a text may take a
tenth of a second. A running match cannot be interrupted, so it runs in a thread of its own, which is abandoned.
"""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedTokenizerBase

from dtrain.errors import DataError

TIME_LIMIT_S = 30.0
"""Seconds that a call may take, and more for long texts."""

MIN_CHARACTERS_PER_S = 20_000
"""Usual tokenizers read millions."""

ROW_LIMIT_S = 3.0
"""How long a row is tried again to find the one to name."""

_CURE = "Use another tokenizer (model.tokenizer), or correct the pattern in its tokenizer.json"


@contextmanager
def limited_time(tokenizer: PreTrainedTokenizerBase | None, *, time_limit_s: float = TIME_LIMIT_S) -> Iterator[None]:
    """Limits the time of the tokenizer's calls, if it has regular expressions of its own.

    Raises:
        DataError: a call takes longer, or the library gives up. Names tokenizer, pattern and text.
    """
    backend: Any = getattr(tokenizer, "_tokenizer", None)
    patterns = find_patterns(backend) if hasattr(backend, "to_str") else []
    if not patterns:
        yield
        return
    limited = _LimitedBackend(backend, patterns, time_limit_s)
    tokenizer._tokenizer = limited  # type: ignore[union-attr]
    try:
        yield
    finally:
        tokenizer._tokenizer = backend  # type: ignore[union-attr]
        limited.close()


def find_patterns(backend: Any) -> list[str]:
    """Returns the regular expressions in a tokenizer of the library."""
    found: list[str] = []

    def search(value: Any) -> None:
        if isinstance(value, dict):
            found.extend(str(value["Regex"]) for key in value if key == "Regex")
        for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            search(inner)

    parts = json.loads(backend.to_str())
    search([parts.get(name) for name in ("normalizer", "pre_tokenizer")])
    return found


class _LimitedBackend:
    """Stands for the library's tokenizer; what encodes many texts has a time limit."""

    def __init__(self, backend: Any, patterns: Sequence[str], time_limit_s: float) -> None:
        object.__setattr__(self, "_own", (backend, patterns, time_limit_s, [_Worker()]))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._own[0], name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._own[0], name, value)

    def __reduce__(self) -> tuple[Any, ...]:
        return _same, (self._own[0],)

    def close(self) -> None:
        self._own[3][0].close()

    def encode_batch(self, rows: Sequence[Any], *args: Any, **more: Any) -> Any:
        return self._encode("encode_batch", rows, *args, **more)

    def encode_batch_fast(self, rows: Sequence[Any], *args: Any, **more: Any) -> Any:
        return self._encode("encode_batch_fast", rows, *args, **more)

    def _encode(self, method: str, rows: Sequence[Any], *args: Any, **more: Any) -> Any:
        backend, patterns, limit_s, workers = self._own
        limit_s += sum(map(_length, rows)) / MIN_CHARACTERS_PER_S

        def encode(some: Sequence[Any], seconds: float) -> Any:
            if workers[0].is_stuck:
                workers[0] = _Worker()
            return workers[0].run(lambda: getattr(backend, method)(some, *args, **more), seconds)

        begin = time.monotonic()
        try:
            return encode(rows, limit_s)
        except TimeoutError:
            problem = f"did not come to an end in {limit_s:.0f} s"
        except BaseException as error:
            if type(error).__name__ != "PanicException":
                raise
            problem = f"gave up ({error})"
        row = _find_row(rows, encode, time.monotonic() - begin)
        raise DataError(
            f"The tokenizer {problem} with a batch of {len(rows)} texts{row}. It splits texts by "
            f"{' and '.join(map(repr, patterns[:3]))}, which takes exponential time for some texts. {_CURE}."
        )


def _find_row(rows: Sequence[Any], encode: Callable[[Sequence[Any], float], Any], limit_s: float) -> str:
    """Returns which text it is, if that shows within the time that the batch took."""
    until = time.monotonic() + max(limit_s, ROW_LIMIT_S)
    for row in rows:
        try:
            encode([row], ROW_LIMIT_S)
        except BaseException as error:  # noqa: BLE001 - the library's panic is no Exception
            if not isinstance(error, TimeoutError) and type(error).__name__ != "PanicException":
                return ""
            return f"; one of them is {str(row)[:80]!r}"
        if time.monotonic() > until:
            break
    return ""


class _Worker:
    """A thread that makes one call after the other."""

    def __init__(self) -> None:
        self.is_stuck = False
        self._calls: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="tokenizer", daemon=True).start()

    def run(self, call: Callable[[], Any], seconds: float) -> Any:
        """Returns the result of `call`.

        Raises:
            TimeoutError: it takes longer; the worker is of no use any more.
        """
        self._calls.put(call)
        try:
            result, error = self._results.get(timeout=seconds)
        except queue.Empty:
            self.is_stuck = True
            raise TimeoutError from None
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        self._calls.put(None)

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            try:
                self._results.put((call(), None))
            except BaseException as error:  # noqa: BLE001 - goes to the caller; a panic is no Exception
                self._results.put((None, error))


def _length(row: Any) -> int:
    return len(row) if isinstance(row, str) else sum(map(_length, row)) if isinstance(row, tuple | list) else 0


def _same(backend: Any) -> Any:
    return backend
