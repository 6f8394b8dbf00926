"""Milliseconds to one place, for the access log and the answer's headers: formatting a float costs several times as much."""

from __future__ import annotations


def to_tenths(ms: float) -> str:
    """Cut, not rounded."""
    tenths = int(ms * 10.0)
    return f"{tenths // 10}.{tenths % 10}"
