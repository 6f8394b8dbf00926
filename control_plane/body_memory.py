"""The bytes of all request bodies that are held at once, while they are read, wait and run: one sum, and its bound.

Whoever holds a body takes its bytes here and gives the same number back when it lets go: the server's connections while a request is not
complete or waits behind another one, the :class:`~control_plane.job.Job` from its acceptance on, the admin API for its calls. All of it
happens on one event loop, so that what was found to fit is taken before anybody else asks.
"""

from __future__ import annotations

from control_plane.errors import BodyMemoryFull
from control_plane.usable_memory import usable_memory_bytes

#: the bound where none is given, unless a quarter of the memory that this process may use is less
MAX_BYTES = 4 << 30


def default_max_bytes() -> int:
    usable_bytes = usable_memory_bytes()
    return MAX_BYTES if usable_bytes is None else max(1, min(MAX_BYTES, usable_bytes // 4))


class BodyMemory:
    """``held_bytes`` of at most ``max_bytes``. ``max_bytes`` None: see :func:`default_max_bytes`."""

    __slots__ = ("held_bytes", "max_bytes")

    def __init__(self, max_bytes: int | None = None) -> None:
        self.max_bytes = default_max_bytes() if max_bytes is None else max_bytes
        self.held_bytes = 0

    def fits(self, size: int) -> bool:
        return self.held_bytes + size <= self.max_bytes

    def full(self, size: int) -> BodyMemoryFull:
        """What to refuse ``size`` more bytes with."""
        return BodyMemoryFull(
            f"request bodies hold {self.held_bytes} bytes of memory; {size} more would pass the {self.max_bytes} that they may"
        )

    def take(self, size: int) -> None:
        """Count ``size`` bytes that fit."""
        self.held_bytes += size

    def give_back(self, size: int) -> None:
        self.held_bytes -= size
