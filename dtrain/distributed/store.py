"""The key-value store in which the ranks of a job meet, as the protocol that torch's stores have. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

MAX_LISTED = 8
"""How many ranks a message lists before "and n more"."""


class KeyValueStore(Protocol):
    """The methods of torch.distributed.Store that are used here."""

    def check(self, keys: list[str]) -> bool: ...

    def get(self, key: str) -> bytes: ...

    def set(self, key: str, value: str) -> None: ...

    def add(self, key: str, amount: int) -> int: ...

    def compare_set(self, key: str, expected_value: str, desired_value: str) -> bytes: ...


def read_json(store: KeyValueStore, key: str) -> dict[str, Any] | None:
    """Returns the object that a key holds as JSON; None without that key."""
    text = read_text(store, key)
    return json.loads(text) if text is not None else None


def read_text(store: KeyValueStore, key: str) -> str | None:
    """Returns the text that a key holds; None without that key."""
    return store.get(key).decode() if store.check([key]) else None


def format_list(names: Sequence[str]) -> str:
    """Returns the first names, and how many more there are."""
    more = f" and {len(names) - MAX_LISTED} more" if len(names) > MAX_LISTED else ""
    return ", ".join(names[:MAX_LISTED]) + more
