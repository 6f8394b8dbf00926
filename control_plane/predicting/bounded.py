"""Tables that drop their oldest entry when they are full."""

from __future__ import annotations

from typing import TypeVar

_K = TypeVar("_K")
_V = TypeVar("_V")


def insert(table: dict[_K, _V], key: _K, value: _V, limit: int) -> _V:
    """Put, dropping the oldest entry of a full table."""
    if key not in table and len(table) >= limit:
        del table[next(iter(table))]
    table[key] = value
    return value
