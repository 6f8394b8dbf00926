"""The answer on its way to one client: an engine's head, bytes and errors become those of an HTTP exchange.

``chunk`` is the exchange's own ``write``, so that a streamed chunk passes no frame of ours. The sink lets go of the exchange (and of
the body in it) at the end, because finished requests are remembered for a while.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Protocol

from control_plane.errors import ControlPlaneError, InstanceFailed, NoInstanceAvailable, OutOfDescriptors
from control_plane.gateway.endpoints import Endpoint
from control_plane.gateway.replies import EVENT_STREAM, Header, error_answer, error_event, header_text, id_headers
from control_plane.gateway.responses import ResponseHomes, response_id_in
from control_plane.gateway.tenths import to_tenths
from control_plane.job import Job
from control_plane.manager import describe_decision
from control_plane.protocols import Call, EngineOutcome, Headers
from control_plane.transport import Exchange, KnownHeaders
from control_plane.transport.wire import head_bytes

#: headers of an engine that do not go on: hop by hop, framing (ours), or set by us
NOT_RELAYED = frozenset(
    (
        b"connection",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
        b"content-length",
        b"x-request-id",
        b"x-instance-id",
        b"x-queue-ms",
        b"x-decision",
    )
)
KEEP_ALIVE_COMMENT = b": waiting\n\n"
#: pieces of an answer that are searched for the response's id
_SEARCHED_PIECES = 16


class Desk(Protocol):
    """Who handed the sink out and hears how its answer ended."""

    def ended(self, sink: ClientSink, status: int, code: str) -> None:
        """Once, before the sink lets go of its job; ``code`` is "" when it went well."""

    def client_left(self, job: Job) -> None:
        """Nobody waits for ``job`` any more."""


class ClientSink:
    """Implements :class:`~control_plane.protocols.Sink` over one Exchange. ``job`` is set by whoever hands it to the manager."""

    __slots__ = (
        "_begun",
        "_desk",
        "_events",
        "chunk",
        "endpoint",
        "exchange",
        "explain",
        "extra_headers",
        "frame",
        "gone",
        "job",
        "request_id",
        "stream",
    )

    def __init__(
        self,
        exchange: Exchange,
        endpoint: Endpoint,
        request_id: str,
        desk: Desk,
        *,
        stream: bool = False,
        explain: bool = False,
        extra_headers: tuple[Header, ...] = (),
    ) -> None:
        self.exchange: Exchange | None = exchange
        self.endpoint = endpoint
        self.request_id = request_id
        self.stream = stream
        self.explain = explain
        self.extra_headers = extra_headers
        self.job: Job | None = None
        #: what is said when the one instance that this request can go to cannot be reached; None: any will do
        self.gone: ControlPlaneError | None = None
        self._desk = desk
        #: the engine has answered
        self._begun = False
        #: what has begun is an event stream, so that an error can be told inside it
        self._events = False
        self.chunk: Callable[[bytes], None] = exchange.write
        self.frame: Callable[[bytes, bytes], None] | None = exchange.write_frame
        exchange.on_disconnect = self.client_left

    # ---- from the engine

    def started(self, status: int, headers: Headers, call: Call) -> None:
        exchange = self.exchange
        if exchange is None:
            return
        self._begun = True
        if not exchange.started:
            lines, length = _relayed(headers)
            self._events = self.stream and length is None
            exchange.start_with(status, lines + self._own_lines(), length)
        exchange.on_pause = call.pause
        exchange.on_resume = call.resume

    def tokens(self, n: int, first_s: float, last_s: float) -> None:
        """Counted on the way here; nothing to do."""

    def finished(self, outcome: EngineOutcome) -> None:
        exchange = self.exchange
        if exchange is not None:
            exchange.end()
            self._end(200, "")

    def failed(self, error: ControlPlaneError) -> None:
        exchange = self.exchange
        if exchange is None:
            return
        if self.gone is not None and _unreachable(error):
            error = self.gone
        anthropic = self.endpoint.anthropic
        if not exchange.started:
            status, headers, body = error_answer(error, anthropic=anthropic)
            exchange.respond(status, headers + self._own_headers(), body)
        else:
            status = error.http_status
            if self._events:
                exchange.end(error_event(error, anthropic=anthropic))
            else:
                exchange.abort()
        self._end(status, error.code)

    # ---- from the client's side

    def keep_waiting(self) -> bool:
        """Tell a client whose stream waits in the queue that we are here; commits status 200. False: no need to call again."""
        exchange, job = self.exchange, self.job
        if exchange is None or job is None or self._begun:
            return False
        if not exchange.started:
            if not job.queued:
                return True
            self._events = True
            exchange.start(200, [EVENT_STREAM, *self._own_headers()])
        exchange.write(KEEP_ALIVE_COMMENT)
        return True

    def client_left(self) -> None:
        """The client hung up: nothing is written any more."""
        job = self.job
        if self.exchange is not None:
            self._end(499, "cancelled")
        if job is not None:
            self._desk.client_left(job)

    # ---- inside

    def _own_lines(self) -> bytes:
        """The same as :meth:`_own_headers`, as they stand in a head; made at once where they are the usual ones."""
        job = self.job
        if job is None or job.instance is None or self.explain or self.extra_headers or self.endpoint.anthropic:
            return head_bytes(b"", self._own_headers())
        # the id is visible ASCII, as the relay has seen to
        return b"x-request-id: %b\r\nx-instance-id: %b\r\nx-queue-ms: %b\r\n" % (
            self.request_id.encode(),
            header_text(job.instance.instance_id),
            _queue_ms(job),
        )

    def _own_headers(self) -> list[Header]:
        headers = id_headers(self.request_id, anthropic=self.endpoint.anthropic)
        job = self.job
        if job is not None and (instance := job.instance) is not None:
            headers.append((b"x-instance-id", header_text(instance.instance_id)))
            headers.append((b"x-queue-ms", _queue_ms(job)))
            if self.explain and job.decision is not None:
                headers.append((b"x-decision", json.dumps(describe_decision(job.decision), separators=(",", ":")).encode()))
        if self.extra_headers:
            headers += self.extra_headers
        return headers

    def _end(self, status: int, code: str) -> None:
        self._desk.ended(self, status, code)
        self.let_go()

    def let_go(self) -> None:
        """Write nothing from now on, and hold nothing."""
        exchange, self.exchange = self.exchange, None
        self.chunk = _drop
        self.frame = None
        self.job = None
        if exchange is not None:
            exchange.on_disconnect = exchange.on_pause = exchange.on_resume = None


class ResponsesSink(ClientSink):
    """The sink of ``POST /v1/responses``: remembers which instance made the response."""

    __slots__ = ("_homes", "_pieces_left", "_write")

    def remember_in(self, homes: ResponseHomes) -> None:
        """Watch the answer for its id. To be called before the engine is asked."""
        self._homes = homes
        self._pieces_left = _SEARCHED_PIECES
        self._write = self.chunk
        self.chunk = self._watch
        self.frame = None

    def let_go(self) -> None:
        super().let_go()
        self._write = _drop

    def _watch(self, data: bytes) -> None:
        if self._pieces_left and self.exchange is not None:
            self._pieces_left -= 1
            response_id = response_id_in(data[:65536])
            job = self.job
            if response_id is not None and job is not None and job.instance is not None:
                self._homes.remember(response_id, job.instance.instance_id)
                self._pieces_left = 0
        self._write(data)


def _queue_ms(job: Job) -> bytes:
    return to_tenths((job.scheduled_s - job.arrival_s) * 1000.0).encode()


def _unreachable(error: ControlPlaneError) -> bool:
    if isinstance(error, OutOfDescriptors):
        return False
    return isinstance(error, NoInstanceAvailable) or (isinstance(error, InstanceFailed) and not error.connected)


def _relayed(headers: Headers) -> tuple[bytes, int | None]:
    """The headers of an engine's answer that go on, as they stand in a head, and its content length."""
    if isinstance(headers, KnownHeaders):
        found: tuple[bytes, int | None] | None = headers.notes
        if found is None:
            found = headers.notes = _relayed(list(headers))
        return found
    length = None
    events = False
    kept = []
    for header in headers:
        if header[0] not in NOT_RELAYED:
            kept.append(header)
            events = events or (header[0] == b"content-type" and header[1].startswith(b"text/event-stream"))
        elif header[0] == b"content-length":
            length = int(header[1])
    # of events some are hidden and a last one is completed: they have no length that is known before
    return head_bytes(b"", kept), None if events else length


def _drop(data: bytes) -> None:
    """Where chunks go after the end."""
