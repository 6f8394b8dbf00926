"""The requests of one connection: one is answered at a time, and those that come behind it wait.

An answer is never mixed with another one: a refusal waits until what came before it is answered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from control_plane.transport.channel import Channel
from control_plane.transport.exchange import Exchange
from control_plane.transport.request_head import Refused, RequestHead
from control_plane.transport.request_reader import BETWEEN, RequestReader, no_memory
from control_plane.transport.wire import CONTINUE

if TYPE_CHECKING:
    from control_plane.transport.server import HttpServer


class Pipeline:
    """Takes the requests that ``reader`` makes of what comes, has the server's handler answer them, and goes on behind each answer.

    Attributes:
        running: the exchange under way. waiting: those behind it.
        ends: the client has closed its sending side, so nothing comes behind these.
    """

    __slots__ = ("_channel", "_owes_continue", "_refused", "_server", "ends", "reader", "running", "waiting")

    def __init__(self, server: HttpServer, channel: Channel) -> None:
        self._server = server
        self._channel = channel
        self.reader = RequestReader(self, server.limits, server.receiving)
        self.running: Exchange | None = None
        self.waiting: list[Exchange] = []
        #: what is to be answered behind all of them
        self._refused: Refused | None = None
        self._owes_continue = False
        self.ends = False

    # ---- the reader calls

    def take_request(self, head: RequestHead, body: bytes) -> None:
        exchange = Exchange(self, self._channel, head, body, self._channel.now_s())
        self._owes_continue = False
        if self.running is None and not self.waiting and not self._channel.writing_paused:
            self._run(exchange)
            return
        memory = self._server.receiving.memory
        if not memory.fits(len(body)):
            refused = no_memory(memory, len(body))
            refused.method, refused.target, refused.headers = head.method, head.target, head.headers
            raise refused
        memory.take(len(body))
        self.waiting.append(exchange)
        if len(self.waiting) >= self._server.limits.max_pipelined:
            exchange.keep_alive = False
            self.reader.stop()

    def send_continue(self) -> None:
        if self.running is None and not self.waiting:
            self._channel.transport.write(CONTINUE)
        else:
            self._owes_continue = True

    # ---- the exchange calls

    def finished(self, keep_alive: bool) -> None:
        """The answer is written; go on with what is next."""
        self._end_running()
        if keep_alive:
            self.advance()
        else:
            self.close()

    def aborted(self) -> None:
        self._end_running()
        self.reader.stop()
        self._channel.abort()

    # ---- the connection and the server call

    def advance(self) -> None:
        """Nothing runs: the next waiting request, else the waiting refusal, else read on."""
        if self._channel.writing_paused:
            self._channel.await_client()
        elif self.waiting:
            exchange = self.waiting.pop(0)
            self._server.receiving.memory.give_back(len(exchange.body))
            self._run(exchange)
        elif self._refused is not None:
            self.refuse(self._refused)
        elif self.ends:
            self.close()
        else:
            self._read_on()

    def refuse(self, refused: Refused) -> None:
        """Nothing more is read; answer so, and close."""
        self.reader.stop()
        if self.running is not None or self.waiting or self._channel.writing_paused:
            self._refused = refused
            self._channel.pause_reading()
            return
        self._channel.transport.write(self._server.refusal(refused))
        self._channel.linger()

    def close(self) -> None:
        """Close behind what is written."""
        sending = self._channel.reading_paused or bool(self.waiting) or self.reader.phase != BETWEEN
        self.reader.stop()
        self._drop_waiting()
        if sending:
            self._channel.linger()
        else:
            self._channel.close()

    def drain(self) -> None:
        """Close once what has come is answered; at once, when nothing has."""
        if self.running is not None:
            self.running.keep_alive = False
        elif self._channel.is_open and self.reader.phase == BETWEEN and not self.waiting:
            self.close()

    def lost(self) -> None:
        """The client is gone."""
        self.reader.close()
        self._drop_waiting()
        exchange = self.running
        if exchange is not None:
            self._end_running()
            exchange.detach()
            if exchange.on_disconnect is not None:
                self._server.guard(exchange.on_disconnect)

    # ---- own steps

    def _run(self, exchange: Exchange) -> None:
        self.running = exchange
        self._channel.await_answer()
        server = self._server
        server.open_exchanges += 1
        if server.draining:
            exchange.keep_alive = False
        try:
            server.handler(exchange)
        except Exception:
            server.handler_failed(exchange)

    def _drop_waiting(self) -> None:
        for exchange in self.waiting:
            self._server.receiving.memory.give_back(len(exchange.body))
        self.waiting.clear()

    def _end_running(self) -> None:
        self.running = None
        self._server.open_exchanges -= 1

    def _read_on(self) -> None:
        if self._owes_continue:
            self._owes_continue = False
            self._channel.transport.write(CONTINUE)
        self._channel.resume_reading()
        if self.reader.phase != BETWEEN:
            self._channel.await_rest(self.reader.phase)
        else:
            self._channel.await_request()
