"""Bytes of HTTP/1.1 heads and of refusals: what both sides write."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Final

import msgspec

from control_plane.protocols import Headers

#: up to this size a body is copied behind its head, to be one buffer; above, the two are handed over side by side
JOIN_BYTES: Final = 65_536

#: what only the transport may say about its own connection and framing; given ones are dropped
FRAMING_HEADERS: Final = frozenset(
    (b"connection", b"content-length", b"keep-alive", b"proxy-connection", b"te", b"trailer", b"transfer-encoding", b"upgrade")
)

STATUS_LINES: Final = {status.value: b"HTTP/1.1 %d %b\r\n" % (status.value, status.phrase.encode("latin-1")) for status in HTTPStatus}

#: of a content-length; 64 bits have no more, so all that more digits could bring is zeros (and Python reads only 4,300 of them)
LENGTH_DIGITS: Final = 20

CONTINUE: Final = b"HTTP/1.1 100 Continue\r\n\r\n"

#: methods that are served, as the parser names them
METHODS: Final = {name.encode(): name for name in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")}


def status_line(status: int) -> bytes:
    return STATUS_LINES.get(status) or b"HTTP/1.1 %d \r\n" % status


def head_bytes(first_line: bytes, headers: Headers, dropped: frozenset[bytes] = FRAMING_HEADERS) -> bytes:
    """The first line (or lines) and the headers not in ``dropped``, each with its line end; the closing empty line is the caller's.

    Raises:
        ValueError: a name or value holds a line break, which would let whoever chose it write headers or answers of its own.
    """
    parts = [first_line]
    for name, value in headers:
        if name not in dropped:
            parts += (name, b": ", value, b"\r\n")
    head = b"".join(parts)
    lines = first_line.count(b"\n") + len(parts) // 4
    if head.count(b"\n") != lines or head.count(b"\r") != lines:
        raise ValueError(f"a line break inside a header: {head[:200]!r}")
    return head


def chunk_frame(data: bytes) -> bytes:
    """One chunk of a chunked body. ``data`` must not be empty (that would end the body)."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def header_value(headers: Sequence[tuple[bytes, bytes]], name: bytes) -> bytes | None:
    """The first value of a header; ``name`` in lower case."""
    for key, value in headers:
        if key == name:
            return value
    return None


def has_token(value: bytes, token: bytes) -> bool:
    """Whether a comma-separated header value names ``token`` (lower case)."""
    return any(part.strip().lower() == token for part in value.split(b","))


def refusal_body(status: int, code: str, message: str) -> bytes:
    """An error in OpenAI's shape."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": None, "code": code}})
