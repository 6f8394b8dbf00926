"""Headers of an answer that has come before, with a place for what somebody derives from them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


class KnownHeaders(list[tuple[bytes, bytes]]):
    """Headers that were parsed before. ``notes`` is for whoever derives something from them, once."""

    __slots__ = ("notes",)

    def __init__(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        super().__init__(headers)
        self.notes: Any = None
