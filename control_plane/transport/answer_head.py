"""What an answer's head may say of its body and its connection: the checks that llhttp, though strict, leaves to its caller."""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from control_plane.transport.known_headers import KnownHeaders
from control_plane.transport.wire import LENGTH_DIGITS

_KEEP_ALIVE_TIMEOUT: Final = re.compile(rb"(?:^|[,;\s])timeout\s*=\s*(\d{1,9})", re.IGNORECASE)
#: an announced keep-alive is left unused this long before its end, for bytes that cross on the way
_KEEPALIVE_MARGIN_S: Final = 1.0


class Garbage(Exception):
    """An answer that llhttp accepts and we do not."""


class AnswerHead:
    """The head of an answer with a body of known length behind it, on a connection that is kept. Shared: not to be changed."""

    __slots__ = ("content_length", "headers", "keepalive_s", "status")

    def __init__(self, status: int, headers: list[tuple[bytes, bytes]], keepalive_s: float, content_length: int) -> None:
        self.status = status
        self.headers = KnownHeaders(headers)
        self.keepalive_s = keepalive_s
        self.content_length = content_length

    def with_length(self, content_length: int) -> AnswerHead:
        """The same head announcing another body."""
        length = b"%d" % content_length
        headers = [(name, length if name == b"content-length" else value) for name, value in self.headers]
        return AnswerHead(self.status, headers, self.keepalive_s, content_length)


class AnswerFraming(NamedTuple):
    """``framed``: the head tells where the body ends, and not only by the connection's end. ``keepalive_s`` None: nothing is said."""

    framed: bool
    keepalive_s: float | None


def check_framing(headers: list[tuple[bytes, bytes]]) -> AnswerFraming:
    """Read the headers that decide how many bytes belong to this answer (RFC 9112 section 6), and for how long its connection is kept.

    Raises:
        Garbage: they say what nobody may say, or what is not understood here.
    """
    framed = False
    keepalive_s = None
    for name, value in headers:
        if name == b"content-length":
            framed = True
            if len(value) > LENGTH_DIGITS:
                raise Garbage("a content-length of too many digits")
        elif name == b"transfer-encoding":
            framed = True
            if value.lower() != b"chunked":
                raise Garbage("a transfer-encoding other than chunked")
        elif name == b"keep-alive":
            announced = _KEEP_ALIVE_TIMEOUT.search(value)
            if announced is not None:
                seconds = int(announced[1])
                keepalive_s = max(seconds - _KEEPALIVE_MARGIN_S, seconds / 2)
    return AnswerFraming(framed, keepalive_s)


def plain_length(headers: list[tuple[bytes, bytes]]) -> int:
    """The body's length where nothing but one ``content-length`` tells it, else -1."""
    length = -1
    for name, value in headers:
        if name == b"transfer-encoding" or (name == b"content-length" and length >= 0):
            return -1
        if name == b"content-length":
            length = int(value)
    return length
