"""The bounds of both sides of the transport, with their defaults. Nothing here is unbounded without saying so."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerLimits:
    """What a client may ask of a :class:`~control_plane.transport.server.HttpServer`."""

    max_header_bytes: int = 65_536
    """Request line and headers together; more is answered with 431."""

    max_headers: int = 200
    """Header lines; more is answered with 431."""

    max_body_bytes: int = 64 * 1024 * 1024
    """One request body; more is answered with 413."""

    max_receiving_bytes: int = 1024 * 1024 * 1024
    """Bytes of unfinished bodies, all connections together; a body that would pass it is answered with 503."""

    max_pipelined: int = 16
    """Requests that may wait behind the running one of their connection; the last one's answer closes the connection."""

    header_timeout_s: float = 10.0
    """From a head's first byte to its end; then 408. Also the limit of a TLS handshake."""

    body_timeout_s: float = 60.0
    """Between two reads of a body; then 408."""

    idle_timeout_s: float = 75.0
    """Without a request, from connecting or the last answer's end; then the connection is closed."""

    write_timeout_s: float = 60.0
    """A client that takes none of what is waiting for it for this long is dropped."""

    linger_s: float = 1.0
    """After a refusal: how long a client that still sends is listened to, so that it can read why."""

    write_buffer_high_bytes: int = 262_144
    """Unsent bytes at which ``on_pause`` is called; ``on_resume`` at a quarter of it."""

    max_connections: int | None = None
    """Open connections; the next one is answered with 503 and closed. None: as many as file descriptors allow."""

    max_descriptor: int | None = None
    """A connection whose file descriptor is this or higher is refused likewise: descriptors are given out lowest first, so that many are in
    use, whatever for, and the rest is needed for engines and files. None: until there are none."""

    backlog: int = 2_048
    """Connections that the kernel may hold until they are accepted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClientLimits:
    """How long an :class:`~control_plane.transport.client.HttpClient` waits, and what it keeps. None: without a limit."""

    connect_timeout_s: float | None = 2.0
    """Name, TCP and TLS together."""

    first_byte_timeout_s: float | None = None
    """From the request's writing to the first byte of its answer."""

    chunk_timeout_s: float | None = 60.0
    """Between two reads of an answer that has begun, and for all of its head. A paused call does not count."""

    total_timeout_s: float | None = None
    """From ``send`` to the answer's end, connecting included."""

    keepalive_s: float = 4.0
    """An idle connection is dropped after it (vLLM closes them after 5), unless the engine announces another time."""

    max_idle: int = 256
    """Idle connections kept; more are closed when their answer ends."""

    max_header_bytes: int = 65_536
    """Status line and headers (or trailers) of one answer, interim answers included."""
