"""One request at the server and the way to answer it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from control_plane.protocols import Headers
from control_plane.transport.request_head import RequestHead
from control_plane.transport.wire import JOIN_BYTES, chunk_frame, head_bytes, header_value, status_line

if TYPE_CHECKING:
    from control_plane.transport.channel import Channel
    from control_plane.transport.pipeline import Pipeline

# how the body under way is framed
_UNSET: Final = 0
_CHUNKED: Final = 1
_LENGTH: Final = 2
_UNTIL_CLOSE: Final = 3
_NO_BODY: Final = 4
_OVER: Final = 5

Callback = Callable[[], object]


class Exchange:
    """A complete request, and its answer: :meth:`respond`, or :meth:`start`, :meth:`write` ..., :meth:`end`.

    Once the client has left (or :meth:`abort` was called) everything written is dropped silently. Set ``keep_alive`` to False before
    answering to close the connection behind the answer.

    Attributes:
        head: what came before the body; its fields can be read here, too.
        received_s: when the request was complete, in seconds of ``loop.time()``.
        on_disconnect: called once when the client leaves before the answer's end.
        on_pause: called when more is unsent than ``write_buffer_high_bytes``; ``on_resume`` when it has drained.
        started: an answer was begun. finished: it was ended, aborted, or the client left.
    """

    __slots__ = (
        "_channel",
        "_framing",
        "_head",
        "_left_bytes",
        "_pipeline",
        "body",
        "finished",
        "head",
        "keep_alive",
        "on_disconnect",
        "on_pause",
        "on_resume",
        "received_s",
        "started",
    )

    def __init__(self, pipeline: Pipeline, channel: Channel, head: RequestHead, body: bytes, received_s: float) -> None:
        self._pipeline = pipeline
        self._channel = channel
        self.head = head
        self.body = body
        self.keep_alive = head.keep_alive
        self.received_s = received_s
        self.on_disconnect: Callback | None = None
        self.on_pause: Callback | None = None
        self.on_resume: Callback | None = None
        self.started = False
        self.finished = False
        self._framing = _UNSET
        self._head = b""
        self._left_bytes = 0

    def __repr__(self) -> str:
        return f"<Exchange {self.method} {self.target!r}>"

    @property
    def method(self) -> str:
        return self.head.method

    @property
    def target(self) -> bytes:
        return self.head.target

    @property
    def path(self) -> str:
        return self.head.path

    @property
    def query(self) -> bytes:
        return self.head.query

    @property
    def headers(self) -> list[tuple[bytes, bytes]]:
        return self.head.headers

    @property
    def http10(self) -> bool:
        return self.head.http10

    @property
    def peer(self) -> str:
        """The client's IP address; empty where there is none (a Unix socket)."""
        return self._channel.peer

    @property
    def unsent(self) -> bool:
        """No byte of the answer is on its way yet."""
        return not self.started or self._head != b""

    @property
    def tls(self) -> bool:
        return self._channel.tls

    def header(self, name: bytes) -> bytes | None:
        """The first value of a header; ``name`` in lower case."""
        return header_value(self.headers, name)

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        """The whole answer at once. ``content-length`` and ``connection`` are added, framing headers among ``headers`` dropped.

        Raises:
            RuntimeError: an answer was begun before.
            ValueError: a line break in a header.
        """
        self._begin()
        head = head_bytes(status_line(status), headers)
        if status in (204, 304):
            body = b""
            head += self._persistence() + b"\r\n"
        else:
            head += b"%bcontent-length: %d\r\n\r\n" % (self._persistence(), len(body))
        self.started = True
        if self.finished:
            return
        if self.method == "HEAD":
            body = b""
        if len(body) <= JOIN_BYTES:
            self._channel.transport.write(head + body)
        else:
            self._channel.transport.writelines((head, body))
        self._finish()

    def start(self, status: int, headers: Headers, content_length: int | None = None) -> None:
        """Begin an answer whose body follows. The head goes out with the first :meth:`write`, or by :meth:`flush_head`.

        ``content_length`` None: chunked (until the connection's end for HTTP/1.0). Raises as :meth:`respond` does.
        """
        self.start_with(status, head_bytes(b"", headers), content_length)

    def start_with(self, status: int, lines: bytes, content_length: int | None = None) -> None:
        """:meth:`start` with the headers as they stand in a head, checked by whoever made them (no framing header among them)."""
        self._begin()
        framing, line = self._choose_framing(status, content_length)
        self.started = True
        if not self.finished:
            self._head = b"%b%b%b%b\r\n" % (status_line(status), lines, self._persistence(), line)
            self._framing = framing

    def flush_head(self) -> None:
        """Send the head now, ahead of the first byte of the body."""
        if self._head:
            self._channel.transport.write(self._head)
            self._head = b""

    def write(self, data: bytes) -> None:
        """Send a piece of the body. More than the announced length drops the connection and raises ValueError."""
        if self._framing == _CHUNKED and data:
            if len(data) > JOIN_BYTES:
                self._channel.transport.writelines((self._head, b"%x\r\n" % len(data), data, b"\r\n"))
                self._head = b""
                return
            frame = b"%x\r\n%b\r\n" % (len(data), data)
            if self._head:
                frame = self._head + frame
                self._head = b""
            self._channel.transport.write(frame)
        else:
            self._write_unframed(data)

    def write_frame(self, frame: bytes, data: bytes) -> None:
        """:meth:`write` of ``data``, which ``frame`` holds framed as one chunk."""
        if self._framing == _CHUNKED and not self._head:
            self._channel.transport.write(frame)
        else:
            self.write(data)

    def end(self, data: bytes = b"") -> None:
        """Finish the body, with a last piece of it. An answer shorter than announced drops the connection."""
        framing = self._framing
        if framing == _CHUNKED:
            last = chunk_frame(data) if data else b""
            self._channel.transport.write(b"%b%b0\r\n\r\n" % (self._head, last))
        elif framing == _UNSET:
            if not self.finished:
                raise RuntimeError("end() before start()")
            return
        elif framing == _OVER:
            return
        else:
            if data:
                self._write_unframed(data)
            if framing == _LENGTH and self._left_bytes:
                self.abort()
                return
            self.flush_head()
        self._finish()

    def abort(self) -> None:
        """Drop the connection: the answer cannot be completed, and the client must not take it for complete."""
        if not self.finished:
            self.detach()
            self._pipeline.aborted()

    def detach(self) -> None:
        """The transport's own: nothing written from now on reaches the connection."""
        self.finished = True
        self._framing = _OVER
        self._head = b""

    def _begin(self) -> None:
        if self.started:
            raise RuntimeError(f"{self!r} was answered before")

    def _persistence(self) -> bytes:
        if not self.keep_alive:
            return b"connection: close\r\n"
        return b"connection: keep-alive\r\n" if self.http10 else b""

    def _choose_framing(self, status: int, content_length: int | None) -> tuple[int, bytes]:
        if status in (204, 304):
            return _NO_BODY, b""
        if content_length is not None:
            self._left_bytes = content_length
            return (_NO_BODY if self.method == "HEAD" else _LENGTH), b"content-length: %d\r\n" % content_length
        if self.method == "HEAD":
            return _NO_BODY, b""
        if self.http10:
            self.keep_alive = False
            return _UNTIL_CLOSE, b""
        return _CHUNKED, b"transfer-encoding: chunked\r\n"

    def _write_unframed(self, data: bytes) -> None:
        framing = self._framing
        if framing == _UNSET and not self.finished:
            raise RuntimeError("write() before start()")
        if not data or framing not in (_LENGTH, _UNTIL_CLOSE):
            return
        if framing == _LENGTH:
            self._left_bytes -= len(data)
            if self._left_bytes < 0:
                self.abort()
                raise ValueError(f"{-self._left_bytes} bytes more than the announced content-length")
        if len(data) <= JOIN_BYTES:
            self._channel.transport.write(self._head + data if self._head else data)
        else:
            self._channel.transport.writelines((self._head, data))
        self._head = b""

    def _finish(self) -> None:
        self.finished = True
        self._framing = _OVER
        self._pipeline.finished(self.keep_alive)
