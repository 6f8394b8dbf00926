"""One connection of the server, as the event loop sees it: bytes, pauses, ends and time limits, and what is done about each.

Its parts: :class:`.channel.Channel`, the bytes' side, and :class:`.pipeline.Pipeline`, the requests. While one is answered, reading pauses.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from control_plane.transport.channel import Channel
from control_plane.transport.pipeline import Pipeline
from control_plane.transport.request_head import Refused
from control_plane.transport.request_reader import BETWEEN, IN_HEAD

if TYPE_CHECKING:
    from control_plane.transport.server import HttpServer


class ServerConnection(asyncio.Protocol):
    """Made by the server for each connection accepted."""

    __slots__ = ("_server", "channel", "pipeline")

    def __init__(self, server: HttpServer) -> None:
        self._server = server
        self.channel = Channel(server.limits, server.wheel, self._expired)
        self.pipeline = Pipeline(server, self.channel)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.channel.opened(cast(asyncio.Transport, transport))
        # one too many is told so, or cut off without a word
        if not self._server.admit(self) and self.channel.is_open:
            self.pipeline.refuse(Refused(503, "too_many_connections", "Too many open connections.", 1))

    def data_received(self, data: bytes) -> None:
        channel, pipeline = self.channel, self.pipeline
        if not channel.is_open:
            channel.discard(len(data))
            return
        reader = pipeline.reader
        try:
            reader.feed(data)
        except Refused as refused:
            pipeline.refuse(refused)
            return
        if pipeline.running is not None or pipeline.waiting:
            if pipeline.waiting or reader.phase != BETWEEN:
                channel.pause_reading()
        elif reader.phase != BETWEEN:
            channel.await_rest(reader.phase)

    def eof_received(self) -> bool:
        """True: the transport stays open for writing."""
        channel, pipeline = self.channel, self.pipeline
        pipeline.ends = True
        if not channel.is_open:
            return False
        exchange = pipeline.running
        if exchange is None and not (pipeline.waiting and channel.writing_paused):
            if pipeline.reader.phase != BETWEEN:
                pipeline.refuse(pipeline.reader.tell(Refused(400, "invalid_request", "The request ended early.")))
            return False
        pipeline.reader.stop()
        if exchange is None:
            return not channel.tls
        if channel.tls or exchange.http10 or not exchange.unsent:
            return False
        channel.begin_probing()
        return True

    def pause_writing(self) -> None:
        self.channel.pause_writing()
        exchange = self.pipeline.running
        if exchange is not None and exchange.on_pause is not None:
            exchange.on_pause()

    def resume_writing(self) -> None:
        self.channel.writing_paused = False
        exchange = self.pipeline.running
        if exchange is not None:
            self.channel.await_answer()
            if exchange.on_resume is not None:
                exchange.on_resume()
        elif self.channel.is_open:
            self.pipeline.advance()

    def connection_lost(self, exc: Exception | None) -> None:
        self.channel.lost()
        self.pipeline.lost()
        self._server.forget(self)

    def _expired(self) -> None:
        """What was awaited has not come in time."""
        channel, pipeline = self.channel, self.pipeline
        exchange, phase = pipeline.running, pipeline.reader.phase
        if not channel.is_open:
            channel.abort()
        elif channel.writing_paused:
            channel.check_progress()
        elif exchange is not None:
            if exchange.unsent:
                channel.probe()
        elif phase != BETWEEN:
            part = "headers" if phase == IN_HEAD else "body"
            pipeline.refuse(pipeline.reader.tell(Refused(408, "timeout", f"The request's {part} did not come in time.")))
        elif channel.transport.get_write_buffer_size():
            channel.abort()
        else:
            pipeline.close()
