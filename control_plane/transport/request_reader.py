"""Bytes to requests, for one connection of the server.

llhttp (in its strict mode) parses; :mod:`request_head` refuses what it lets through and a gateway must not. Every byte kept is
counted against a limit, and a body is held once. After a refusal nothing more is read as a request, so no byte can be taken for the
start of another one.
"""

from __future__ import annotations

from io import BytesIO
from typing import Any, Final, Protocol

import httptools

from control_plane.body_memory import BodyMemory
from control_plane.transport.heads import END, MAX_HEAD_BYTES, HeadMemory
from control_plane.transport.limits import ServerLimits
from control_plane.transport.request_head import Refused, RequestHead, check_framing, check_target, refused_by_parser, without_upgrade
from control_plane.transport.wire import METHODS

# what of a request has come
BETWEEN: Final = 0
IN_HEAD: Final = 1
IN_BODY: Final = 2

#: bodies announced at least this long go past the parser, which would copy them once more
BULK_BYTES: Final = 65_536


class Receiving:
    """What all connections of a server share: the bytes of unfinished bodies, the memory for bodies of which they are a part, and the
    heads that are known."""

    __slots__ = ("heads", "memory", "total_bytes")

    def __init__(self, memory: BodyMemory | None = None) -> None:
        self.total_bytes = 0
        self.memory = memory or BodyMemory()
        self.heads: HeadMemory[RequestHead] = HeadMemory()


class RequestTaker(Protocol):
    def take_request(self, head: RequestHead, body: bytes) -> None:
        """A request is complete."""

    def send_continue(self) -> None:
        """A client waits to be told that it may send its body."""


class RequestReader:
    """Feed it what comes; it calls ``taker.take_request`` for every complete request.

    ``phase`` says how far the next one has come; ``stopped``: whatever comes is no request any more.
    """

    __slots__ = (
        "_barren_bytes",
        "_body",
        "_bulk_left_bytes",
        "_head",
        "_head_bytes",
        "_headers",
        "_held_bytes",
        "_length",
        "_limits",
        "_method",
        "_more",
        "_parser",
        "_raw_head",
        "_received_bytes",
        "_receiving",
        "_taker",
        "_target",
        "_upgrading",
        "phase",
        "stopped",
    )

    def __init__(self, taker: RequestTaker, limits: ServerLimits, receiving: Receiving) -> None:
        self._taker = taker
        self._limits = limits
        self._receiving = receiving
        self._parser: Any = httptools.HttpRequestParser(self)
        self.phase = BETWEEN
        self.stopped = False
        self._method = ""
        self._target = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._head: RequestHead | None = None
        #: the bytes of the head that is being parsed, where it came whole and alone
        self._raw_head = b""
        self._upgrading = False
        self._length = 0
        #: the body: its first piece, or all of them
        self._body = b""
        self._more: BytesIO | None = None
        self._received_bytes = 0
        #: of those, what is counted as held
        self._held_bytes = 0
        self._bulk_left_bytes = 0
        #: fed since the head's start, and since the body last grew
        self._head_bytes = 0
        self._barren_bytes = 0

    def feed(self, data: bytes) -> None:
        """Read on. Raises Refused; from then on the reader is stopped."""
        if self.stopped:
            return
        if self.phase == BETWEEN and self._take_known(data):
            return
        try:
            if self._bulk_left_bytes:
                data = self._take_bulk(data)
            if self.phase == BETWEEN:
                self._head_bytes = 0
            if self.phase != IN_BODY and len(data) + self._head_bytes > self._limits.max_header_bytes:
                data = self._feed_long_head(data)
            if data:
                self._feed(data)
        except httptools.HttpParserError as error:
            if self._was_stopped():
                return
            if isinstance(error, httptools.HttpParserCallbackError) and error.__context__ is not None:
                # what a callback of ours raised
                raise self._stop_for(error.__context__) from None
            raise self._stop_for(refused_by_parser(str(error))) from None
        except Refused as refused:
            self._stop_for(refused)
            raise

    def _take_known(self, data: bytes) -> bool:
        """One whole request whose head was parsed before. False: ``data`` is anything else."""
        end = data.find(END, 0, MAX_HEAD_BYTES)
        if end <= 0:
            self._raw_head = b""
            return False
        raw = self._raw_head = data[:end]
        heads = self._receiving.heads
        head = heads.known.get(raw)
        if head is None and (found := heads.like(raw)) is not None:
            head = found[0].with_length(found[1])
            if head.content_length > self._limits.max_body_bytes:
                return False
            heads.remember(raw, head)
        if head is None or len(data) - end - 4 != head.content_length:
            return False
        if not head.keep_alive:
            self.stopped = True
        self._taker.take_request(head, data[end + 4 :])
        return True

    def tell(self, refused: Refused) -> Refused:
        """The same, knowing what has been read of the request that it refuses."""
        if self.phase == BETWEEN:
            return refused
        refused.target = self._target
        refused.headers = self._headers
        if self._target:
            refused.method = METHODS.get(self._parser.get_method(), "")
        return refused

    def _stop_for(self, error: BaseException) -> BaseException:
        if isinstance(error, Refused):
            self.tell(error)
        self.stop()
        return error

    def _was_stopped(self) -> bool:
        """Asked behind a call: to a type checker, and so to the compiler, ``stopped`` is still what it was before it."""
        return self.stopped

    def stop(self) -> None:
        """No more requests: drop what is unfinished."""
        self.stopped = True
        self.phase = BETWEEN
        self._bulk_left_bytes = 0
        self._headers = []
        self._forget_body()

    def close(self) -> None:
        """The connection is gone. (Parser and reader hold each other, so one lets go.)"""
        self.stop()
        self._parser = None

    # ---- feeding

    def _feed(self, data: bytes) -> None:
        upgrade_at = None
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            upgrade_at = upgrade.args[0]
        if upgrade_at is not None:
            self._continue_without_upgrade(data[upgrade_at:])
            return
        phase = self.phase
        if phase == IN_HEAD:
            # of a head that began behind another request, in the same read, this read's part is not counted
            self._head_bytes = 0 if self._head_bytes < 0 else self._head_bytes + len(data)
        elif phase == IN_BODY:
            self._hold()
            if self._length >= BULK_BYTES:
                self._bulk_left_bytes = self._length - self._received_bytes
            elif self._length < 0:
                self._bound_overhead(len(data))

    def _feed_long_head(self, data: bytes) -> bytes:
        """Where this might be more than a head's limit: feed as much as the limit allows, and return the rest."""
        room_bytes = self._limits.max_header_bytes - self._head_bytes
        self._feed(data[:room_bytes])
        if self.phase == IN_HEAD and self._head_bytes >= self._limits.max_header_bytes:
            raise Refused(431, "invalid_request", f"Request line and headers are more than {self._limits.max_header_bytes} bytes.")
        rest = data[room_bytes:]
        return self._take_bulk(rest) if self._bulk_left_bytes else rest

    def _take_bulk(self, data: bytes) -> bytes:
        """Bytes of a long body of known length; returns what comes behind it."""
        left_bytes = self._bulk_left_bytes
        piece = data if len(data) <= left_bytes else data[:left_bytes]
        self._bulk_left_bytes = left_bytes - len(piece)
        self._append(piece)
        if not self._bulk_left_bytes:
            # the old parser still waits for this body
            self._parser = httptools.HttpRequestParser(self)
            self._complete()
        else:
            self._hold()
        return data[left_bytes:]

    def _bound_overhead(self, fed_bytes: int) -> None:
        """Chunk extensions and trailers: reads that do not make the body longer."""
        if self._barren_bytes < 0:
            self._barren_bytes = 0
            return
        self._barren_bytes += fed_bytes
        if self._barren_bytes > self._limits.max_header_bytes:
            raise Refused(431, "invalid_request", "Too many bytes of trailers or chunk extensions.")

    def _continue_without_upgrade(self, rest: bytes) -> None:
        self._upgrading = False
        self._raw_head = b""
        head = without_upgrade(self._method, self._target, self._headers, self._head is not None and self._head.http10)
        self._parser = httptools.HttpRequestParser(self)
        self._feed(head)
        if rest and not self.stopped:
            self._feed(rest)

    # ---- the parser calls

    def on_message_begin(self) -> None:
        if self.stopped:
            raise Refused(400, "invalid_request", "Nothing is read any more.")
        self.phase = IN_HEAD
        self._target = b""
        self._headers = []

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        # llhttp strips the blanks before a value and leaves those behind it. Trailers are dropped.
        if self.phase == IN_HEAD:
            self._headers.append((name.lower(), value.rstrip()))

    def on_headers_complete(self) -> None:
        parser = self._parser
        method = METHODS.get(parser.get_method())
        if method is None:
            raise Refused(501, "invalid_request", "This method is not served here.")
        headers = self._headers
        if len(headers) > self._limits.max_headers:
            raise Refused(431, "invalid_request", f"More than {self._limits.max_headers} headers.")
        check_target(method, self._target)
        framing = check_framing(headers, parser.should_keep_alive(), parser.get_http_version)
        self._method = method
        self._length, keep_alive, http10, asks_upgrade, expects_continue = framing
        if self._length > self._limits.max_body_bytes:
            raise self._body_too_large()
        self._upgrading = asks_upgrade and parser.should_upgrade()
        self._head = RequestHead(method, self._target, headers, keep_alive, http10, self._length)
        self.phase = IN_BODY
        if self._raw_head and self._length >= 0 and not (asks_upgrade or expects_continue):
            self._receiving.heads.remember(self._raw_head, self._head)
        self._raw_head = b""
        if expects_continue and not self._upgrading:
            self._taker.send_continue()

    def on_body(self, data: bytes) -> None:
        self._barren_bytes = -1  # this read is none of them
        if self._received_bytes:
            self._append(data)
        else:
            self._body = data
            self._received_bytes = len(data)
            if len(data) > self._limits.max_body_bytes:
                raise self._body_too_large()

    def on_message_complete(self) -> None:
        if not self._upgrading:
            self._complete()

    # ---- the body

    def _append(self, data: bytes) -> None:
        more = self._more
        if more is None:
            more = self._more = BytesIO()
            more.write(self._body)
            self._body = b""
        self._received_bytes += len(data)
        if self._received_bytes > self._limits.max_body_bytes:
            raise self._body_too_large()
        more.write(data)

    def _hold(self) -> None:
        """Count what has come of a body that is not complete. One that comes in a single read never gets here."""
        size = self._received_bytes - self._held_bytes
        receiving = self._receiving
        if receiving.total_bytes + size > self._limits.max_receiving_bytes:
            raise Refused(503, "too_many_connections", "Too many bytes are being received at once.", 1)
        if not receiving.memory.fits(size):
            raise no_memory(receiving.memory, size)
        self._held_bytes = self._received_bytes
        receiving.total_bytes += size
        receiving.memory.take(size)

    def _complete(self) -> None:
        body = self._body
        if self._received_bytes:
            if self._more is not None:
                # the buffer's own bytes: not copied, as nothing else holds them
                body = self._more.getvalue()
            self._forget_body()
        head, self._head = self._head, None
        assert head is not None
        # the parser holds on to this object until the next head: let it not hold on to the request as well
        self._headers = []
        self.phase = BETWEEN
        self._head_bytes = -1
        if not head.keep_alive:
            self.stopped = True
        self._taker.take_request(head, body)

    def _forget_body(self) -> None:
        self._receiving.total_bytes -= self._held_bytes
        self._receiving.memory.give_back(self._held_bytes)
        self._held_bytes = 0
        self._more = None
        self._body = b""
        self._received_bytes = 0
        self._barren_bytes = 0

    def _body_too_large(self) -> Refused:
        return Refused(413, "payload_too_large", f"The request body is longer than {self._limits.max_body_bytes} bytes.")


def no_memory(memory: BodyMemory, size: int) -> Refused:
    """For a request whose ``size`` bytes do not fit."""
    full = memory.full(size)
    return Refused(full.http_status, full.code, full.message, 1)
