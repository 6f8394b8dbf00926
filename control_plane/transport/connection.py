"""One connection of the server: runs one exchange at a time, keeps its time limits, and ends it so that the client can read why.

Requests that come behind a running one wait, and reading pauses. An answer is never mixed with another one: a refusal waits until
what came before it is answered.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, cast

from control_plane.transport.exchange import Exchange
from control_plane.transport.request_head import Refused, RequestHead
from control_plane.transport.request_reader import BETWEEN, IN_HEAD, RequestReader, no_memory
from control_plane.transport.wheel import NEVER_S, Deadline
from control_plane.transport.wire import CONTINUE

if TYPE_CHECKING:
    from control_plane.transport.server import HttpServer

# where the connection stands
_OPEN: Final = 0
#: nothing more is served; what has been written goes out, what comes is thrown away
_LINGERING: Final = 1
_CLOSING: Final = 2

#: what a refused client may still send before it is cut off
_LINGER_BYTES: Final = 4 * 1024 * 1024
#: how often a client that sent EOF is asked whether it still listens, and how long apart
_PROBES: Final = 3
_PROBE_S: Final = 0.15


class ServerConnection(asyncio.Protocol):
    """Made by the server for each connection accepted."""

    __slots__ = (
        "_deadline",
        "_eof",
        "_exchange",
        "_keeps_time_of",
        "_limits",
        "_linger_bytes",
        "_owes_continue",
        "_paused_reading",
        "_paused_writing",
        "_pending",
        "_probes",
        "_reader",
        "_refused",
        "_server",
        "_state",
        "_time",
        "_unsent_bytes",
        "peer",
        "tls",
        "transport",
    )

    transport: asyncio.Transport

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self._limits = server.limits
        self._time = server.loop.time
        self._deadline = Deadline(server.wheel, self._expired)
        self._reader = RequestReader(self, server.limits, server.receiving)
        self._exchange: Exchange | None = None
        self._pending: list[Exchange] = []
        self._refused: Refused | None = None
        self._state = _OPEN
        self._keeps_time_of = BETWEEN
        self._eof = False
        self._owes_continue = False
        self._paused_reading = False
        self._paused_writing = False
        self._unsent_bytes = 0
        self._linger_bytes = _LINGER_BYTES
        self._probes = 0
        self.peer = ""
        self.tls = False

    # ---- the loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        peer = transport.get_extra_info("peername")
        self.peer = str(peer[0]) if isinstance(peer, tuple) else ""
        self.tls = transport.get_extra_info("sslcontext") is not None
        high = self._limits.write_buffer_high_bytes
        self.transport.set_write_buffer_limits(high=high, low=high // 4)
        self._deadline.set(self._time() + self._limits.idle_timeout_s)
        if self._server.admit(self):
            return
        if self.transport.is_closing():  # cut off without a word
            self._state = _CLOSING
        else:
            self._refuse(Refused(503, "too_many_connections", "Too many open connections.", 1))

    def data_received(self, data: bytes) -> None:
        if self._state != _OPEN:
            self._discard(len(data))
            return
        reader = self._reader
        try:
            reader.feed(data)
        except Refused as refused:
            self._refuse(refused)
            return
        if self._exchange is not None or self._pending:
            if self._pending or reader.phase != BETWEEN:
                self._pause_reading()
        elif reader.phase != BETWEEN:
            self._await_rest()

    def eof_received(self) -> bool:
        self._eof = True
        if self._state != _OPEN:
            return False
        exchange = self._exchange
        if exchange is None and not (self._pending and self._paused_writing):
            if self._reader.phase != BETWEEN:
                self._refuse(self._reader.tell(Refused(400, "invalid_request", "The request ended early.")))
            return False
        self._reader.stop()
        if exchange is None:
            return not self.tls
        if self.tls or exchange.http10 or not exchange.unsent:
            return False
        self._probes = _PROBES
        self._probe()
        return True

    def pause_writing(self) -> None:
        self._paused_writing = True
        self._unsent_bytes = self.transport.get_write_buffer_size()
        self._deadline.set(self._time() + self._limits.write_timeout_s)
        exchange = self._exchange
        if exchange is not None and exchange.on_pause is not None:
            exchange.on_pause()

    def resume_writing(self) -> None:
        self._paused_writing = False
        exchange = self._exchange
        if exchange is not None:
            self._deadline.due_s = NEVER_S
            if exchange.on_resume is not None:
                exchange.on_resume()
        elif self._state == _OPEN:
            self._advance()

    def connection_lost(self, exc: Exception | None) -> None:
        self._state = _CLOSING
        self._deadline.close()
        self._reader.close()
        self._drop_pending()
        exchange = self._exchange
        if exchange is not None:
            self._end_exchange()
            exchange.detach()
            if exchange.on_disconnect is not None:
                self._server.guard(exchange.on_disconnect)
        self._server.forget(self)

    # ---- the reader calls

    def take_request(self, head: RequestHead, body: bytes) -> None:
        exchange = Exchange(self, head, body, self._time())
        self._owes_continue = False
        if self._exchange is None and not self._pending and not self._paused_writing:
            self._run(exchange)
            return
        memory = self._server.receiving.memory
        if not memory.fits(len(body)):
            refused = no_memory(memory, len(body))
            refused.method, refused.target, refused.headers = head.method, head.target, head.headers
            raise refused
        memory.take(len(body))
        self._pending.append(exchange)
        if len(self._pending) >= self._limits.max_pipelined:
            exchange.keep_alive = False
            self._reader.stop()

    def send_continue(self) -> None:
        if self._exchange is None and not self._pending:
            self.transport.write(CONTINUE)
        else:
            self._owes_continue = True

    # ---- the exchange calls

    def exchange_finished(self, keep_alive: bool) -> None:
        """The answer is written; go on with what is next."""
        self._end_exchange()
        if not keep_alive:
            self._close()
        elif self._pending or self._paused_reading or self._paused_writing or self._refused is not None or self._eof:
            self._advance()
        else:
            self._deadline.set(self._time() + self._limits.idle_timeout_s)

    def exchange_aborted(self) -> None:
        self._end_exchange()
        self._state = _CLOSING
        self._reader.stop()
        self.transport.abort()

    # ---- the server calls

    @property
    def exchange(self) -> Exchange | None:
        return self._exchange

    def drain(self) -> None:
        """Close once what has come is answered; at once, when nothing has."""
        if self._exchange is not None:
            self._exchange.keep_alive = False
        elif self._state == _OPEN and self._reader.phase == BETWEEN and not self._pending:
            self._close()

    def abort(self) -> None:
        self.transport.abort()

    @property
    def descriptor(self) -> int:
        """Its file descriptor; -1 where there is none."""
        found = self.transport.get_extra_info("socket")
        return -1 if found is None else int(found.fileno())

    # ---- own steps

    def _run(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._keeps_time_of = BETWEEN
        self._deadline.due_s = NEVER_S
        server = self._server
        server.open_exchanges += 1
        if server.draining:
            exchange.keep_alive = False
        try:
            server.handler(exchange)
        except Exception:
            server.handler_failed(exchange)

    def _end_exchange(self) -> None:
        self._exchange = None
        self._server.open_exchanges -= 1

    def _advance(self) -> None:
        """Nothing runs: the next waiting request, else the waiting refusal, else read on."""
        if self._paused_writing:
            self._deadline.set(self._time() + self._limits.write_timeout_s)
        elif self._pending:
            exchange = self._pending.pop(0)
            self._server.receiving.memory.give_back(len(exchange.body))
            self._run(exchange)
        elif self._refused is not None:
            self._refuse(self._refused)
        elif self._eof:
            self._close()
        else:
            self._read_on()

    def _read_on(self) -> None:
        if self._owes_continue:
            self._owes_continue = False
            self.transport.write(CONTINUE)
        if self._paused_reading:
            self._paused_reading = False
            self.transport.resume_reading()
        if self._reader.phase != BETWEEN:
            self._await_rest()
        else:
            self._deadline.set(self._time() + self._limits.idle_timeout_s)

    def _pause_reading(self) -> None:
        if not self._paused_reading:
            self._paused_reading = True
            self.transport.pause_reading()

    def _await_rest(self) -> None:
        """A request has come in part. A head has its time as a whole, a body from read to read."""
        phase = self._reader.phase
        if phase == IN_HEAD:
            if self._keeps_time_of != IN_HEAD:
                self._deadline.set(self._time() + self._limits.header_timeout_s)
        else:
            self._deadline.set(self._time() + self._limits.body_timeout_s)
        self._keeps_time_of = phase

    def _refuse(self, refused: Refused) -> None:
        self._reader.stop()
        if self._exchange is not None or self._pending or self._paused_writing:
            self._refused = refused
            self._pause_reading()
            return
        self.transport.write(self._server.refusal(refused))
        self._linger()

    def _close(self) -> None:
        """Close behind what is written. A client that is still sending would lose the answer to a reset: linger for it."""
        if self._paused_reading or self._pending or self._reader.phase != BETWEEN:
            self._linger()
            return
        self._reader.stop()
        self._state = _CLOSING
        self._deadline.set(self._time() + self._limits.write_timeout_s)
        self.transport.close()

    def _linger(self) -> None:
        self._reader.stop()
        self._drop_pending()
        self._state = _LINGERING
        self._deadline.set(self._time() + self._limits.linger_s)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        else:
            # TLS lingers by itself: it reads on until the client has closed, too
            self.transport.close()
        if self._paused_reading:
            self._paused_reading = False
            self.transport.resume_reading()

    def _drop_pending(self) -> None:
        for exchange in self._pending:
            self._server.receiving.memory.give_back(len(exchange.body))
        self._pending.clear()

    def _discard(self, size: int) -> None:
        self._linger_bytes -= size
        if self._linger_bytes < 0 and self._state == _LINGERING:
            self._state = _CLOSING
            self.transport.abort()

    def _probe(self) -> None:
        """Ask a client that closed its sending side whether it has gone altogether: then its side answers with a reset.

        An interim answer may come at any time before the final one, and a client skips it (RFC 9110 section 15.2).
        """
        if self._probes:
            self._probes -= 1
            self.transport.write(CONTINUE)
            self._deadline.set(self._time() + _PROBE_S)

    def _expired(self) -> None:
        if self._state != _OPEN:
            self.transport.abort()
        elif self._paused_writing:
            self._check_progress()
        elif self._exchange is not None:
            if self._exchange.unsent:
                self._probe()
        elif self._reader.phase != BETWEEN:
            part = "headers" if self._reader.phase == IN_HEAD else "body"
            self._refuse(self._reader.tell(Refused(408, "timeout", f"The request's {part} did not come in time.")))
        elif self.transport.get_write_buffer_size():
            self.transport.abort()
        else:
            self._close()

    def _check_progress(self) -> None:
        unsent_bytes = self.transport.get_write_buffer_size()
        if unsent_bytes >= self._unsent_bytes:
            self.transport.abort()
            return
        self._unsent_bytes = unsent_bytes
        self._deadline.set(self._time() + self._limits.write_timeout_s)
