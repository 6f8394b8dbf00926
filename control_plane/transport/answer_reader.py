"""Bytes to answers, for one connection to an engine.

llhttp (in its strict mode) parses; :mod:`answer_head` refuses what it lets through and a proxy must not. Two kinds of answer are so
common that they go past the parser, to the same effect: a whole one whose head has come before, and a chunk that is whole and alone.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Final

import httptools

from control_plane.transport.answer_head import AnswerHead, Garbage, check_framing, plain_length
from control_plane.transport.heads import END, MAX_HEAD_BYTES, HeadMemory
from control_plane.transport.receiver import DEAF, Receiver, no_frame

log = logging.getLogger(__name__)

# how far the answer has come
AWAITED: Final = 0
IN_HEAD: Final = 1
IN_BODY: Final = 2
COMPLETE: Final = 3

#: a chunk's size line of the usual kind is no longer
_SIZE_LINE_BYTES: Final = 10
_NO_LIMIT: Final = 1 << 60


class Unreadable(Exception):
    """The answer cannot go on; says why. Nothing that comes behind it can be trusted."""


class _Surplus(Exception):
    """Bytes behind the end of an answer."""


class AnswerReader:
    """Told of a request by :meth:`begin`, fed what comes; calls ``on_head``, ``on_body`` and ``on_frame`` of its receiver.

    Attributes:
        phase: how far the answer has come.
        moved: set when the phase changes, or an interim answer ends: what is awaited then is another thing.
        reusable: once it is complete, another request may be sent.
        until_close: the body's end is the connection's.
        keepalive_s: how long the engine keeps an idle connection.
    """

    __slots__ = (
        "_at_chunk",
        "_barren_bytes",
        "_chunk_done",
        "_grew",
        "_head_bytes",
        "_headers",
        "_heads",
        "_interim",
        "_is_head",
        "_max_header_bytes",
        "_on_frame",
        "_parser",
        "_raw_head",
        "_receiver",
        "keepalive_s",
        "moved",
        "phase",
        "reusable",
        "until_close",
    )

    def __init__(self, heads: HeadMemory[AnswerHead], keepalive_s: float) -> None:
        self._heads = heads
        self._parser: Any = httptools.HttpResponseParser(self)
        self._receiver: Receiver = DEAF
        #: takes whole chunks as they came, where the receiver has a use for that
        self._on_frame: Callable[[bytes, bytes], None] = no_frame
        self._is_head = False
        self._max_header_bytes = _NO_LIMIT
        self._headers: list[tuple[bytes, bytes]] = []
        #: the bytes of the head that is being parsed, where they came whole and alone
        self._raw_head = b""
        self._interim = False
        self._grew = False
        #: fed since the request was sent, of heads; and since the body began, of what is not its own
        self._head_bytes = 0
        self._barren_bytes = 0
        #: of a chunked body: the last chunk the parser saw is complete; and so what comes next begins one
        self._chunk_done = False
        self._at_chunk = False
        self.phase = AWAITED
        self.moved = False
        self.reusable = True
        self.until_close = False
        self.keepalive_s = keepalive_s

    def begin(self, receiver: Receiver, is_head: bool, max_header_bytes: int) -> None:
        """A request is being sent."""
        self._receiver = receiver
        self._on_frame = getattr(receiver, "on_frame", no_frame)
        self._is_head = is_head
        self._max_header_bytes = max_header_bytes
        self._at_chunk = self._chunk_done = False
        self._head_bytes = self._barren_bytes = 0
        self.phase = AWAITED
        self.reusable = True

    def silence(self) -> None:
        """The call is over: its receiver hears nothing more."""
        self._receiver = DEAF
        self._on_frame = no_frame
        self._at_chunk = False
        self._max_header_bytes = _NO_LIMIT

    def close(self) -> None:
        """The connection is gone. (Parser and reader hold each other, so one lets go.)"""
        self._parser = None

    # ---- feeding; each raises Unreadable

    def feed_known(self, data: bytes) -> bool:
        """One whole answer whose head was parsed before. False: ``data`` is anything else, and to be fed on."""
        end = data.find(END, 0, MAX_HEAD_BYTES)
        if end <= 0 or self._is_head:
            self._raw_head = b""
            return False
        raw = self._raw_head = data[:end]
        heads = self._heads
        head = heads.known.get(raw)
        if head is None and (found := heads.like(raw)) is not None:
            head = found[0].with_length(found[1])
            heads.remember(raw, head)
        if head is None or len(data) - end - 4 != head.content_length:
            return False
        self.phase = COMPLETE
        self.keepalive_s = head.keepalive_s
        receiver = self._receiver
        try:
            receiver.on_head(head.status, head.headers)
            if head.content_length and self._receiver is receiver:
                receiver.on_body(data[end + 4 :])
        except Exception as error:
            raise _receiver_failed(error) from None
        return True

    def feed_head(self, data: bytes) -> bytes:
        """As much as the bound of a head allows; returns the rest."""
        room_bytes = self._max_header_bytes - self._head_bytes
        rest = b""
        if len(data) > room_bytes:
            data, rest = data[:room_bytes], data[room_bytes:]
        self.moved = False
        if self.phase == AWAITED:
            self.phase = IN_HEAD
            self.moved = True
        self._feed(data)
        if self.phase == COMPLETE:
            self.reusable = self.reusable and not rest
            return b""
        self._at_chunk = self._chunk_done and self._on_frame is not no_frame and not rest and data[-2:] == b"\r\n"
        self._head_bytes += len(data)
        if self.phase == IN_HEAD and self._head_bytes >= self._max_header_bytes:
            raise Unreadable("the head of its answer is too large")
        return rest

    def feed_body(self, data: bytes) -> None:
        if self._at_chunk and data[-2:] == b"\r\n":
            # one whole chunk, and nothing else, where the parser expects one: it need not see it
            end = data.find(b"\r\n", 0, _SIZE_LINE_BYTES)
            size = len(data) - end - 4
            if size > 0 and data[:end] == b"%x" % size:
                try:
                    self._on_frame(data, data[end + 2 : -2])
                except Exception as error:
                    raise _receiver_failed(error) from None
                return
        self._grew = False
        self._feed(data)
        if self.phase != COMPLETE:
            self._at_chunk = self._chunk_done and self._on_frame is not no_frame and data[-2:] == b"\r\n"
            if not self._grew:
                self._bound_overhead(len(data))

    def _feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            if self.phase == COMPLETE:
                # more than was asked for came behind a complete answer
                self.reusable = False
                return
            cause = error.__context__ if isinstance(error, httptools.HttpParserCallbackError) else None
            if cause is not None and not isinstance(cause, Garbage):
                raise _receiver_failed(cause) from None
            raise Unreadable(f"it answered with something that is not HTTP: {error if cause is None else cause}") from None

    def _bound_overhead(self, fed_bytes: int) -> None:
        """Chunk extensions and trailers: bytes that nobody receives must have an end."""
        self._barren_bytes += fed_bytes
        if self._barren_bytes > self._max_header_bytes:
            raise Unreadable("too many bytes of trailers or chunk extensions")

    # ---- the parser calls

    def on_message_begin(self) -> None:
        if self.phase == COMPLETE:
            raise _Surplus
        self._headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        # trailers are dropped
        if self.phase == IN_HEAD:
            self._headers.append((name.lower(), value.rstrip()))

    def on_headers_complete(self) -> None:
        receiver = self._receiver
        if receiver is DEAF:
            return
        parser = self._parser
        status = parser.get_status_code()
        if status < 200:
            if status < 100 or status == 101:
                raise Garbage(f"status {status}")
            self._interim = True
            self._raw_head = b""
            return
        headers, self._headers = self._headers, []
        framing = check_framing(headers)
        if framing.keepalive_s is not None:
            self.keepalive_s = framing.keepalive_s
        if not parser.should_keep_alive():
            self.reusable = False
            if parser.get_http_version() not in ("1.1", "1.0"):
                raise Garbage("not HTTP/1.1 or 1.0")
        bodiless = status in (204, 304) or self._is_head
        if self._raw_head and not bodiless:
            self._remember_head(status, headers)
        self.until_close = not framing.framed and not bodiless
        self.phase = IN_BODY
        self.moved = True
        receiver.on_head(status, headers)
        if self._is_head and self._receiver is receiver:
            # the parser would wait for the body that the headers describe
            self.phase = COMPLETE
            self.reusable = False
            self._receiver = DEAF

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
            self.moved = True
        else:
            self.phase = COMPLETE

    def _remember_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        """Where what comes behind such a head is plain: a body of known length, and then the next answer."""
        length = plain_length(headers)
        if length >= 0 and self.reusable:
            self._heads.remember(self._raw_head, AnswerHead(status, headers, self.keepalive_s, length))
        self._raw_head = b""


def _receiver_failed(error: BaseException) -> Unreadable:
    log.error("a receiver failed", exc_info=error)
    return Unreadable("its answer could not be handled")
