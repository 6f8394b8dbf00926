"""The bytes' side of a server connection: its flow control, its time limits, and its end, so that the client can read why.

What the bytes mean is :mod:`.pipeline`'s to know, which says here what it waits for.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from control_plane.transport.deadline import NEVER_S, Deadline
from control_plane.transport.limits import ServerLimits
from control_plane.transport.request_reader import BETWEEN, IN_HEAD
from control_plane.transport.wheel import TimerWheel
from control_plane.transport.wire import CONTINUE

# how long it lives
_OPEN: Final = 0
#: nothing more is served; what has been written goes out, what comes is thrown away
_LINGERING: Final = 1
_CLOSING: Final = 2

#: what a refused client may still send before it is cut off
_LINGER_BYTES: Final = 4 * 1024 * 1024
#: how often a client that sent EOF is asked whether it still listens, and how long apart
_PROBES: Final = 3
_PROBE_S: Final = 0.15


class Channel:
    """One client's transport. ``expired`` is called when what is awaited has not come in time."""

    __slots__ = (
        "_deadline",
        "_keeps_time_of",
        "_limits",
        "_linger_bytes",
        "_probes",
        "_state",
        "_unsent_bytes",
        "_wheel",
        "peer",
        "reading_paused",
        "tls",
        "transport",
        "writing_paused",
    )

    transport: asyncio.Transport

    def __init__(self, limits: ServerLimits, wheel: TimerWheel, expired: Callable[[], object]) -> None:
        self._limits = limits
        self._wheel = wheel
        self._deadline = Deadline(wheel, expired)
        self._state = _OPEN
        self._keeps_time_of = BETWEEN
        self._unsent_bytes = 0
        self._linger_bytes = _LINGER_BYTES
        self._probes = 0
        self.reading_paused = False
        self.writing_paused = False
        self.peer = ""
        self.tls = False

    def opened(self, transport: asyncio.Transport) -> None:
        self.transport = transport
        peer = transport.get_extra_info("peername")
        self.peer = str(peer[0]) if isinstance(peer, tuple) else ""
        self.tls = transport.get_extra_info("sslcontext") is not None
        high = self._limits.write_buffer_high_bytes
        transport.set_write_buffer_limits(high=high, low=high // 4)
        self.await_request()

    @property
    def is_open(self) -> bool:
        """Requests are served."""
        return self._state == _OPEN

    @property
    def descriptor(self) -> int:
        """Its file descriptor; -1 where there is none."""
        found = self.transport.get_extra_info("socket")
        return -1 if found is None else int(found.fileno())

    def now_s(self) -> float:
        """Seconds of the loop's clock."""
        return self._wheel.now_s()

    # ---- what is awaited, and for how long

    def await_request(self) -> None:
        self._deadline.set(self.now_s() + self._limits.idle_timeout_s)

    def await_rest(self, phase: int) -> None:
        """A request has come in part. A head has its time as a whole, a body from read to read."""
        if phase != IN_HEAD:
            self._deadline.set(self.now_s() + self._limits.body_timeout_s)
        elif self._keeps_time_of != IN_HEAD:
            self._deadline.set(self.now_s() + self._limits.header_timeout_s)
        self._keeps_time_of = phase

    def await_answer(self) -> None:
        """Whoever answers keeps a time of its own."""
        self._keeps_time_of = BETWEEN
        self._deadline.due_s = NEVER_S

    def await_client(self) -> None:
        """It is to take what has been written."""
        self._deadline.set(self.now_s() + self._limits.write_timeout_s)

    # ---- flow control

    def pause_reading(self) -> None:
        if not self.reading_paused:
            self.reading_paused = True
            self.transport.pause_reading()

    def resume_reading(self) -> None:
        if self.reading_paused:
            self.reading_paused = False
            self.transport.resume_reading()

    def pause_writing(self) -> None:
        self.writing_paused = True
        self._unsent_bytes = self.transport.get_write_buffer_size()
        self.await_client()

    def check_progress(self) -> None:
        """Drop a client that has taken nothing since it was last looked at."""
        unsent_bytes = self.transport.get_write_buffer_size()
        if unsent_bytes >= self._unsent_bytes:
            self.transport.abort()
            return
        self._unsent_bytes = unsent_bytes
        self.await_client()

    # ---- the end

    def close(self) -> None:
        """Close behind what is written."""
        self._state = _CLOSING
        self.await_client()
        self.transport.close()

    def linger(self) -> None:
        """Close as :meth:`close` does, for a client that is still sending: a reset would take from it what it was told."""
        self._state = _LINGERING
        self._deadline.set(self.now_s() + self._limits.linger_s)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            # TLS lingers by itself: it reads on until the client has closed, too
            self.transport.close()
        self.resume_reading()

    def discard(self, size: int) -> None:
        """Bytes have come that nobody reads."""
        self._linger_bytes -= size
        if self._linger_bytes < 0 and self._state == _LINGERING:
            self.abort()

    def abort(self) -> None:
        self._state = _CLOSING
        self.transport.abort()

    def lost(self) -> None:
        self._state = _CLOSING
        self._deadline.close()

    # ---- a client that closed its sending side

    def begin_probing(self) -> None:
        self._probes = _PROBES
        self.probe()

    def probe(self) -> None:
        """Ask it whether it has gone altogether: then its side answers with a reset.

        An interim answer may come at any time before the final one, and a client skips it (RFC 9110 section 15.2).
        """
        if self._probes:
            self._probes -= 1
            self.transport.write(CONTINUE)
            self._deadline.set(self.now_s() + _PROBE_S)
