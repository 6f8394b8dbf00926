"""What a request's head may say: the checks that llhttp, though strict, leaves to its caller."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

from control_plane.transport.wire import LENGTH_DIGITS, has_token

_HOST: Final = re.compile(rb"(?:[A-Za-z0-9._~!$&'()*+;=%:-]*|\[[0-9A-Fa-f:.]+\](?::\d*)?)")


class Refused(Exception):
    """A request that is not handed on: the answer it gets, in OpenAI's error shape, before its connection is closed.

    ``method``, ``target`` and ``headers`` hold what of it had been read.
    """

    def __init__(self, status: int, code: str, message: str, retry_after_s: int | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.retry_after_s = retry_after_s
        self.method = ""
        self.target = b""
        self.headers: Sequence[tuple[bytes, bytes]] = ()


class RequestHead:
    """What a request's head says, checked. Shared between requests with the same one, so nothing of it may be changed.

    Attributes:
        method: upper case.
        target: as it came; ``path``: its path, not unquoted; ``query``: what follows the question mark.
        headers: names in lower case, values without surrounding blanks, in the order they came.
        content_length: -1 for a chunked body.
        notes: whatever the handler derives from such a head, once; the same for heads that differ in their length only.
    """

    __slots__ = ("content_length", "headers", "http10", "keep_alive", "method", "notes", "path", "query", "target")

    def __init__(
        self, method: str, target: bytes, headers: list[tuple[bytes, bytes]], keep_alive: bool, http10: bool, content_length: int
    ) -> None:
        self.method = method
        self.target = target
        path, _, self.query = (target if target[0] == 47 else origin_form(target)).partition(b"?")
        self.path = path.decode("latin-1")
        self.headers = headers
        self.keep_alive = keep_alive
        self.http10 = http10
        self.content_length = content_length
        self.notes: Notes = Notes()

    def with_length(self, content_length: int) -> RequestHead:
        """The same head announcing another body."""
        length = b"%d" % content_length
        headers = [(name, length if name == b"content-length" else value) for name, value in self.headers]
        head = RequestHead(self.method, self.target, headers, self.keep_alive, self.http10, content_length)
        head.notes = self.notes
        return head


class Notes:
    """A handler's own finding about a head; None: not looked at yet."""

    __slots__ = ("found",)

    def __init__(self) -> None:
        self.found: Any = None


class Framing(NamedTuple):
    """What a head says about the body behind it and about its connection. ``content_length`` -1: chunked."""

    content_length: int
    keep_alive: bool
    http10: bool
    upgrade: bool
    expects_continue: bool


def invalid(message: str) -> Refused:
    return Refused(400, "invalid_request", message)


def check_framing(headers: list[tuple[bytes, bytes]], keep_alive: bool, version: Callable[[], str]) -> Framing:
    """Read the headers that decide how many bytes belong to this request (RFC 9112 sections 3.2, 6 and 9.3).

    ``keep_alive`` is the parser's view; ``version`` is asked only where the headers do not settle it. llhttp has made sure that
    ``content-length`` comes once, is a number, and not beside ``transfer-encoding``.

    Raises:
        Refused: 400, 417, 501 or 505.
    """
    host = expect = encoding = connection = None
    length = 0
    upgrade = False
    for name, value in headers:
        if name == b"host":
            if host is not None:
                raise invalid("More than one Host header.")
            host = value
        elif name == b"content-length":
            if len(value) > LENGTH_DIGITS:
                raise invalid("The Content-Length has too many digits.")
            length = int(value)
        elif name == b"connection":
            connection = value
        elif name == b"transfer-encoding":
            if encoding is not None:
                raise invalid("More than one Transfer-Encoding header.")
            encoding = value
        elif name == b"expect":
            expect = value
        elif name == b"upgrade":
            upgrade = True
    # without a Connection header only HTTP/1.1 keeps its connection
    http10 = (connection is not None or not keep_alive) and is_http10(version())
    if host is None:
        if not http10:
            raise invalid("An HTTP/1.1 request needs a Host header.")
    elif _HOST.fullmatch(host) is None:
        raise invalid("The Host header is not a host.")
    if encoding is not None:
        length = check_encoding(encoding, http10)
    if expect is not None and expect.lower() != b"100-continue":
        raise Refused(417, "invalid_request", "Only `Expect: 100-continue` is understood.")
    return Framing(length, keep_alive, http10, upgrade, expect is not None and not http10 and length != 0)


def is_http10(version: str) -> bool:
    """False for 1.1, True for 1.0; any other version is refused with 505."""
    if version not in ("1.1", "1.0"):
        raise Refused(505, "invalid_request", "Only HTTP/1.1 and HTTP/1.0 are spoken here.")
    return version == "1.0"


def check_encoding(encoding: bytes, http10: bool) -> int:
    """-1 for a chunked body; any other encoding is refused."""
    if http10:
        raise invalid("Transfer-Encoding in an HTTP/1.0 request.")
    if encoding.lower() != b"chunked":
        raise Refused(501, "invalid_request", "The only Transfer-Encoding understood is chunked.")
    return -1


def check_target(method: str, target: bytes) -> None:
    """Refuse targets that are neither a path nor an absolute http URL (nor ``OPTIONS *``), and fragments."""
    if b"#" in target:
        raise invalid("A fragment in the request target.")
    if target[0] == 47:
        return
    if target == b"*":
        if method != "OPTIONS":
            raise invalid("The request target `*` is for OPTIONS only.")
        return
    scheme, separator, rest = target.partition(b"://")
    if not separator or scheme.lower() not in (b"http", b"https") or rest[:1] in (b"", b"/", b"?"):
        raise invalid("The request target is neither a path nor an http URL.")


def refused_by_parser(reason: str) -> Refused:
    """llhttp's sentence as an answer."""
    if reason == "Invalid HTTP version" or reason.startswith("Pause on PRI"):
        return Refused(505, "invalid_request", "Only HTTP/1.1 and HTTP/1.0 are spoken here.")
    return invalid(f"Malformed HTTP request: {reason}.")


def without_upgrade(method: str, target: bytes, headers: list[tuple[bytes, bytes]], http10: bool) -> bytes:
    """The same head as if no change of protocol had been asked for: it is to be served as plain HTTP."""
    lines = [b"%b %b HTTP/1.%d\r\n" % (method.encode(), target, 0 if http10 else 1)]
    for name, value in headers:
        if name == b"connection":
            value = b"close" if has_token(value, b"close") else b"keep-alive"
        if name != b"upgrade":
            lines.append(b"%b: %b\r\n" % (name, value))
    return b"".join(lines) + b"\r\n"


def path_of(target: bytes) -> str:
    """The path in a request target of any form, whole or not."""
    return (target if target[:1] == b"/" else origin_form(target)).partition(b"?")[0].decode("latin-1")


def origin_form(target: bytes) -> bytes:
    """The path and query of an absolute-form target (``http://host/path?query``); ``*`` stays what it is."""
    _, scheme, rest = target.partition(b"://")
    if not scheme:
        return target
    cut = min((at for at in (rest.find(b"/"), rest.find(b"?")) if at >= 0), default=len(rest))
    rest = rest[cut:]
    return rest if rest[:1] == b"/" else b"/" + rest
