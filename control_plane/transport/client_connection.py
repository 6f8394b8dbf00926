"""One connection to an engine: sends one request at a time and feeds its answer to a receiver.

Whatever is not exactly one well-formed answer per request (garbage, a body shorter or longer than announced, bytes nobody asked for)
fails the call or at least ends the connection, so that no answer is ever taken for another request's.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import httptools

from control_plane.errors import InstanceFailed
from control_plane.transport.heads import END, MAX_HEAD_BYTES
from control_plane.transport.known_headers import KnownHeaders
from control_plane.transport.wheel import NEVER_S, Deadline
from control_plane.transport.wire import JOIN_BYTES, LENGTH_DIGITS

if TYPE_CHECKING:
    from control_plane.transport.client import ClientCall, HttpClient

log = logging.getLogger(__name__)

# how far the answer has come
_AWAITED: Final = 0
_IN_HEAD: Final = 1
_IN_BODY: Final = 2
_COMPLETE: Final = 3

#: a chunk's size line of the usual kind is no longer
_SIZE_LINE_BYTES: Final = 10
_KEEP_ALIVE_TIMEOUT: Final = re.compile(rb"(?:^|[,;\s])timeout\s*=\s*(\d{1,9})", re.IGNORECASE)
#: an announced keep-alive is left unused this long before its end, for bytes that cross on the way
_KEEPALIVE_MARGIN_S: Final = 1.0


class Receiver(Protocol):
    """Where one answer goes: ``on_head`` once, ``on_body`` any number of times, then ``on_complete``; ``on_error`` ends it at any point.

    One that has ``on_frame(frame, data)`` too gets there what would come to ``on_body`` as ``data``, when it is one whole chunk of a
    chunked body: ``frame`` is the same with its framing, in the one spelling that we write ourselves.
    """

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """The final status and headers (names in lower case). Interim answers (1xx) are not reported."""

    def on_body(self, data: bytes) -> None:
        """Bytes of the body, unframed, never empty."""

    def on_complete(self) -> None: ...
    def on_error(self, error: InstanceFailed) -> None: ...


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


class _Deaf:
    """Receives for calls that are over."""

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None: ...
    def on_body(self, data: bytes) -> None: ...
    def on_complete(self) -> None: ...
    def on_error(self, error: InstanceFailed) -> None: ...


_DEAF: Final = _Deaf()


def _no_frame(frame: bytes, data: bytes) -> None:
    """The receiver has no use for frames."""


class ClientConnection(asyncio.Protocol):
    """Owned by an :class:`~control_plane.transport.client.HttpClient`; idle while it has no call."""

    __slots__ = (
        "_at_chunk",
        "_barren_bytes",
        "_call",
        "_chunk_done",
        "_chunk_s",
        "_client",
        "_deadline",
        "_grew",
        "_head_bytes",
        "_headers",
        "_interim",
        "_on_frame",
        "_parser",
        "_progress",
        "_raw_head",
        "_receiver",
        "_reusable",
        "_time",
        "_until_close",
        "expires_s",
        "keepalive_s",
        "reused",
        "transport",
    )

    transport: asyncio.Transport

    def __init__(self, client: HttpClient) -> None:
        self._client = client
        self._time = client.loop.time
        self._deadline = Deadline(client.wheel, self._expired)
        self._parser: Any = httptools.HttpResponseParser(self)
        self._call: ClientCall | None = None
        self._receiver: Receiver = _DEAF
        self._headers: list[tuple[bytes, bytes]] = []
        self._progress = _AWAITED
        self._reusable = True
        self._until_close = False
        self._interim = False
        self._grew = False
        self._head_bytes = 0
        self._barren_bytes = 0
        self._chunk_s = NEVER_S
        #: of a chunked body: the last chunk the parser saw is complete; and so what comes next begins one
        self._chunk_done = False
        self._at_chunk = False
        #: takes whole chunks as they came, where the receiver has a use for that
        self._on_frame: Callable[[bytes, bytes], None] = _no_frame
        #: the bytes of the head that is being parsed, where they came whole and alone
        self._raw_head = b""
        self.keepalive_s = client.limits.keepalive_s
        #: when it is idle: until when it may be used again
        self.expires_s = 0.0
        #: it has carried an answer before
        self.reused = False

    # ---- the client calls

    def run(self, call: ClientCall) -> None:
        """Send the call's request. The connection must be idle."""
        self._call = call
        self._receiver = call.receiver
        self._on_frame = getattr(call.receiver, "on_frame", _no_frame)
        self._at_chunk = self._chunk_done = False
        self._progress = _AWAITED
        self._reusable = True
        self._head_bytes = self._barren_bytes = 0
        call.connection = self
        limits = call.limits
        self._chunk_s = NEVER_S if limits.chunk_timeout_s is None else limits.chunk_timeout_s
        if call.paused:
            self.transport.pause_reading()
        self.set_limit()
        head, body = call.head, call.body
        if len(body) <= JOIN_BYTES:
            self.transport.write(head + body)
        else:
            self.transport.writelines((head, body))

    def set_limit(self) -> None:
        """The time limit for what is awaited now; a paused call has only its total one."""
        call = self._call
        if call is None:
            return
        limit_s = call.limits.first_byte_timeout_s if self._progress == _AWAITED else self._chunk_s
        due_s = call.total_due_s
        if limit_s is not None and not call.paused:
            due_s = min(due_s, self._time() + limit_s)
        self._deadline.set(due_s)

    def drop(self) -> None:
        """Close at once, whatever is under way; the receiver hears nothing more."""
        self._call = None
        self._receiver = _DEAF
        self._on_frame = _no_frame
        self._at_chunk = False
        self._deadline.due_s = NEVER_S
        self.transport.abort()

    def abandon(self) -> None:
        """The client closes: fail the call under way."""
        call = self._call
        self.drop()
        if call is not None:
            call.fail("the client is closed", sent=self._progress != _AWAITED)

    # ---- the loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._client.opened(self)

    def data_received(self, data: bytes) -> None:
        call = self._call
        if self._progress != _IN_BODY or call is None:
            if self._progress != _AWAITED or not self._receive_known(data):
                self._receive_head(data)
            return
        due_s = self._time() + self._chunk_s
        self._deadline.due_s = due_s if due_s < call.total_due_s else call.total_due_s
        if self._at_chunk and data[-2:] == b"\r\n":
            # one whole chunk, and nothing else, where the parser expects one: it need not see it
            end = data.find(b"\r\n", 0, _SIZE_LINE_BYTES)
            size = len(data) - end - 4
            if size > 0 and data[:end] == b"%x" % size:
                try:
                    self._on_frame(data, data[end + 2 : -2])
                except Exception as error:
                    self._receiver_failed(error)
                return
        self._grew = False
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._broken(error)
            return
        if self._progress == _COMPLETE:
            self._release()
            return
        self._at_chunk = self._chunk_done and self._on_frame is not _no_frame and data[-2:] == b"\r\n"
        if not self._grew:
            self._bound_overhead(len(data))

    def _receive_known(self, data: bytes) -> bool:
        """One whole answer whose head was parsed before. False: ``data`` is anything else."""
        call = self._call
        end = data.find(END, 0, MAX_HEAD_BYTES)
        if end <= 0 or call is None or call.is_head:
            self._raw_head = b""
            return False
        raw = self._raw_head = data[:end]
        heads = self._client.heads
        head = heads.known.get(raw)
        if head is None and (found := heads.like(raw)) is not None:
            head = found[0].with_length(found[1])
            heads.remember(raw, head)
        if head is None or len(data) - end - 4 != head.content_length:
            return False
        self._progress = _COMPLETE
        self.keepalive_s = head.keepalive_s
        receiver = self._receiver
        try:
            receiver.on_head(head.status, head.headers)
            if self._call is call and head.content_length:
                receiver.on_body(data[end + 4 :])
        except Exception as error:
            self._receiver_failed(error)
        if self._call is call:
            self._release()
        return True

    def eof_received(self) -> bool:
        self._client.unpool(self)
        if self._call is not None:
            self._ended("the engine closed the connection")
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._client.forget(self)
        if self._call is not None:
            if exc is None:
                self._ended("the engine closed the connection")
            else:
                self._fail(f"the connection broke: {exc}")
        self._deadline.close()
        # the parser and this object hold each other
        self._parser = None

    # ---- the parser calls

    def on_message_begin(self) -> None:
        if self._progress == _COMPLETE:
            raise _Surplus
        self._headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        # trailers are dropped
        if self._progress == _IN_HEAD:
            self._headers.append((name.lower(), value.rstrip()))

    def on_headers_complete(self) -> None:
        call = self._call
        if call is None:
            return
        parser = self._parser
        status = parser.get_status_code()
        if status < 200:
            if status < 100 or status == 101:
                raise _Garbage(f"status {status}")
            self._interim = True
            self._raw_head = b""
            return
        headers, self._headers = self._headers, []
        framed = self._read_framing(headers)
        if not parser.should_keep_alive():
            self._reusable = False
            if parser.get_http_version() not in ("1.1", "1.0"):
                raise _Garbage("not HTTP/1.1 or 1.0")
        bodiless = status in (204, 304) or call.is_head
        if self._raw_head and not bodiless:
            self._remember_head(status, headers)
        self._until_close = not framed and not bodiless
        self._progress = _IN_BODY
        call.let_go_of_request()
        self._receiver.on_head(status, headers)
        if call.is_head and self._call is not None:
            # the parser would wait for the body that the headers describe
            self._progress = _COMPLETE
            self._reusable = False
            self._receiver = _DEAF

    def on_chunk_header(self) -> None:
        self._chunk_done = False

    def on_chunk_complete(self) -> None:
        self._chunk_done = True

    def on_body(self, data: bytes) -> None:
        self._grew = True
        self._receiver.on_body(data)

    def on_message_complete(self) -> None:
        if self._interim:
            self._interim = False
            self.set_limit()
        else:
            self._progress = _COMPLETE

    # ---- own steps

    def _read_framing(self, headers: list[tuple[bytes, bytes]]) -> bool:
        """Whether the head tells the body's length or that it is chunked; takes note of what it says about the connection."""
        framed = False
        for name, value in headers:
            if name == b"content-length":
                framed = True
                if len(value) > LENGTH_DIGITS:
                    raise _Garbage("a content-length of too many digits")
            elif name == b"transfer-encoding":
                framed = True
                if value.lower() != b"chunked":
                    raise _Garbage("a transfer-encoding other than chunked")
            elif name == b"keep-alive":
                announced = _KEEP_ALIVE_TIMEOUT.search(value)
                if announced is not None:
                    seconds = int(announced[1])
                    self.keepalive_s = max(seconds - _KEEPALIVE_MARGIN_S, seconds / 2)
        return framed

    def _remember_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Where what comes behind such a head is plain: a body of known length, and then the next answer."""
        lengths = [value for name, value in headers if name == b"content-length"]
        if len(lengths) == 1 and self._reusable and not any(name == b"transfer-encoding" for name, _ in headers):
            self._client.heads.remember(self._raw_head, AnswerHead(status, headers, self.keepalive_s, int(lengths[0])))
        self._raw_head = b""

    def _receive_head(self, data: bytes) -> None:
        if self._call is None:
            # nobody asked: a late answer, or an error before closing (408); nothing after it can be trusted
            self._client.unpool(self)
            self.drop()
            return
        room_bytes = self._call.limits.max_header_bytes - self._head_bytes
        rest = b""
        if len(data) > room_bytes:
            data, rest = data[:room_bytes], data[room_bytes:]
        was_in_head = self._progress == _IN_HEAD
        if self._progress == _AWAITED:
            self._progress = _IN_HEAD
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._broken(error)
            return
        if self._progress == _COMPLETE:
            self._reusable = self._reusable and not rest
            self._release()
            return
        self._at_chunk = self._chunk_done and self._on_frame is not _no_frame and not rest and data[-2:] == b"\r\n"
        self._head_bytes += len(data)
        if not (was_in_head and self._progress == _IN_HEAD):
            # a head has its time as a whole: none may drip for ever
            self.set_limit()
        if self._progress == _IN_HEAD and self._head_bytes >= self._call_limit_bytes():
            self._fail("the head of its answer is too large")
        elif rest and self._call is not None:
            self.data_received(rest)

    def _call_limit_bytes(self) -> float:
        return NEVER_S if self._call is None else self._call.limits.max_header_bytes

    def _bound_overhead(self, fed_bytes: int) -> None:
        """Chunk extensions and trailers: bytes that nobody receives must have an end."""
        self._barren_bytes += fed_bytes
        if self._barren_bytes > self._call_limit_bytes():
            self._fail("too many bytes of trailers or chunk extensions")

    def _broken(self, error: httptools.HttpParserError) -> None:
        if self._progress == _COMPLETE:
            # more than was asked for came behind a complete answer
            self._reusable = False
            self._release()
            return
        cause = error.__context__ if isinstance(error, httptools.HttpParserCallbackError) else None
        if isinstance(cause, _Garbage):
            self._fail(f"it answered with something that is not HTTP: {cause}")
        elif cause is not None:
            self._receiver_failed(cause)
        else:
            self._fail(f"it answered with something that is not HTTP: {error}")

    def _receiver_failed(self, error: BaseException) -> None:
        log.error("a receiver failed", exc_info=error)
        self._fail("its answer could not be handled")

    def _ended(self, reason: str) -> None:
        if self._until_close and self._progress == _IN_BODY:
            self._reusable = False
            self._release()
        else:
            self._fail(f"{reason} {'in the middle of its answer' if self._progress else 'without an answer'}")

    def _release(self) -> None:
        """The answer is complete: the connection is free before the receiver hears of it, who may want it for the next request."""
        call, self._call = self._call, None
        self._receiver = _DEAF
        self._on_frame = _no_frame
        self._at_chunk = False
        self._deadline.due_s = NEVER_S
        if call is None:
            return
        if call.paused:
            self.transport.resume_reading()
        self.reused = True
        # a request not sent to its end (the answer came early) leaves the connection in the middle of it
        if self._reusable and not self.transport.get_write_buffer_size():
            self._client.pool(self)
        else:
            self.transport.abort()
        call.ended()
        try:
            call.receiver.on_complete()
        except Exception as error:
            # whoever waits behind it must hear of an end
            log.error("a receiver failed", exc_info=error)
            call.receiver.on_error(InstanceFailed(f"{self._client.base_url}: its answer could not be handled", sent=True))

    def _fail(self, reason: str, *, timed_out: bool = False) -> None:
        call = self._call
        self.drop()
        if call is None:
            return
        sent = self._progress != _AWAITED
        if self.reused and not sent and not timed_out and call.may_retry():
            self._client.reopen(call)
            return
        call.fail(reason, timed_out=timed_out, sent=sent)

    def _expired(self) -> None:
        call = self._call
        if call is None:
            return
        if self._time() >= call.total_due_s:
            reason = f"no complete answer within {call.limits.total_timeout_s:g} s"
        elif self._progress == _AWAITED:
            reason = f"no answer within {call.limits.first_byte_timeout_s:g} s"
        else:
            reason = f"its answer stood still for {self._chunk_s:g} s"
        self._fail(reason, timed_out=True)


class _Garbage(Exception):
    """An answer that llhttp accepts and we do not."""


class _Surplus(Exception):
    """Bytes behind the end of an answer."""
