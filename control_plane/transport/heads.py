"""Heads that were parsed before: clients and engines send nearly the same ones again and again.

A head is remembered by its very bytes once llhttp and our own checks have accepted it, and again by its bytes without the digits of its
``content-length``, which are all that differs from request to request of most clients. So a known head costs a slice and a look-up, and
no byte gets past the parser that it has not accepted in the same place.
"""

from __future__ import annotations

from typing import Final, Generic, Protocol, TypeVar

END: Final = b"\r\n\r\n"
#: longer heads are parsed each time
MAX_HEAD_BYTES: Final = 4096
#: heads kept by each memory, and so at most MAX_HEADS * MAX_HEAD_BYTES bytes twice; a full one begins anew
MAX_HEADS: Final = 512
_LENGTH: Final = b"ontent-length: "
_LENGTH_CAPITAL: Final = b"ontent-Length: "
_MAX_DIGITS: Final = 15


class Head(Protocol):
    """A parsed head with a body of known length behind it."""

    content_length: int


H = TypeVar("H", bound=Head)


class HeadMemory(Generic[H]):
    """``known``: parsed heads by their bytes (without the closing empty line). Only :meth:`remember` adds to it."""

    __slots__ = ("_shapes", "known")

    def __init__(self) -> None:
        self.known: dict[bytes, H] = {}
        self._shapes: dict[bytes, H] = {}

    def remember(self, raw: bytes, head: H) -> None:
        """``raw`` was parsed, from its first byte to its last, into ``head``."""
        if len(raw) > MAX_HEAD_BYTES or not _plain_lines(raw):
            return
        if len(self.known) >= MAX_HEADS:
            self.known.clear()
        self.known[raw] = head
        found = cut_length(raw)
        if found is not None and found[1] == head.content_length:
            if len(self._shapes) >= MAX_HEADS:
                self._shapes.clear()
            self._shapes[found[0]] = head

    def like(self, raw: bytes) -> tuple[H, int] | None:
        """A head that differs from ``raw`` at most in its length, and the length that ``raw`` tells."""
        found = cut_length(raw)
        if found is None:
            return None
        head = self._shapes.get(found[0])
        return None if head is None else (head, found[1])


def cut_length(raw: bytes) -> tuple[bytes, int] | None:
    """(the head without the digits of its first ``content-length`` line, their value). None where there is no such plain line.

    The cut can be undone: it stands behind the first such name in the result (in lower case, else with a capital), so different heads do
    not become the same.
    """
    at = raw.find(_LENGTH)
    if at < 0:
        at = raw.find(_LENGTH_CAPITAL)
    if at < 3 or raw[at - 3 : at - 1] != b"\r\n" or raw[at - 1] not in b"cC":
        return None
    start = at + len(_LENGTH)
    end = raw.find(b"\r\n", start)
    digits = raw[start:] if end < 0 else raw[start:end]
    if not digits.isdigit() or len(digits) > _MAX_DIGITS:
        return None
    return raw[:start] + raw[start + len(digits) :], int(digits)


def _plain_lines(raw: bytes) -> bool:
    """Every line ends in CRLF and no other CR or LF is in it: then the first empty line is where any parser ends the head."""
    ends = raw.count(b"\r\n")
    return raw.count(b"\n") == ends and raw.count(b"\r") == ends and not raw.startswith(b"\r\n")
