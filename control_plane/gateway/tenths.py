"""Milliseconds to one place, for the access log and the answer's headers: formatting a float costs several times as much."""

from __future__ import annotations

from typing import Final

_TENTH: Final = [f".{tenth}" for tenth in range(10)]


def to_tenths(ms: float) -> str:
    """Cut, not rounded."""
    tenths = int(ms * 10.0)
    return str(tenths // 10) + _TENTH[tenths % 10]
