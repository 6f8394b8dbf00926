"""The HTTP/1.1 server: listens, counts its connections, and calls one function for every complete request."""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl as tls
from collections.abc import Callable
from typing import Any, Final

from control_plane.body_memory import BodyMemory
from control_plane.protocols import Headers
from control_plane.transport.connection import ServerConnection
from control_plane.transport.exchange import Exchange
from control_plane.transport.limits import ServerLimits
from control_plane.transport.request_head import Refused
from control_plane.transport.request_reader import Receiving
from control_plane.transport.wheel import TimerWheel
from control_plane.transport.wire import head_bytes, refusal_body, status_line

log = logging.getLogger(__name__)

Handler = Callable[[Exchange], object]
"""Called, in the loop's thread, once the whole body has come. It answers then or later."""

Refuse = Callable[[Refused], tuple[Headers, bytes]]
"""Told of every request refused before the handler; headers and body of its answer."""

#: connections above the limit that are told so at the same time; more are cut off without a word
_MOST_REFUSED: Final = 64
_STOP_POLL_S: Final = 0.02


class HttpServer:
    """Serves ``handler`` on one address. All of it runs on the loop that :meth:`start` is called in."""

    def __init__(
        self,
        handler: Handler,
        *,
        limits: ServerLimits | None = None,
        ssl: tls.SSLContext | None = None,
        refuse: Refuse | None = None,
        wheel: TimerWheel | None = None,
        memory: BodyMemory | None = None,
    ) -> None:
        """``refuse`` None: refusals have OpenAI's shape. ``wheel`` and ``memory`` (for bodies) None: one of its own."""
        self.limits = limits or ServerLimits()
        self.receiving = Receiving(memory)
        self.open_exchanges = 0
        #: connections refused because descriptors were short
        self.turned_away = 0
        self.draining = False
        self.loop: asyncio.AbstractEventLoop
        self.wheel: TimerWheel
        self._given_wheel = wheel
        self.handler = handler
        self._ssl = ssl
        self._refuse = refuse
        self._connections: set[ServerConnection] = set()
        self._listener: asyncio.Server | None = None
        self._host = ""
        self._port = 0

    @property
    def connections(self) -> int:
        """Open connections."""
        return len(self._connections)

    @property
    def port(self) -> int:
        return self._port

    @property
    def url(self) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{'https' if self._ssl else 'http'}://{host}:{self._port}"

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Listen; port 0 takes a free one. Raises OSError when the address cannot be had."""
        self.loop = asyncio.get_running_loop()
        self.wheel = self._given_wheel or TimerWheel(self.loop)
        self.draining = False
        handshake_s = self.limits.header_timeout_s if self._ssl else None
        try:
            self._listener = await self.loop.create_server(
                lambda: ServerConnection(self), host, port, ssl=self._ssl, backlog=self.limits.backlog, ssl_handshake_timeout=handshake_s
            )
        except socket.gaierror as error:
            raise OSError(f"cannot listen on {host!r}: {error.strerror}") from None
        self._host = host
        listener: Any = self._listener  # its ``sockets`` are a tuple as typed, and a list under uvloop
        self._port = listener.sockets[0].getsockname()[1]

    async def stop(self, grace_s: float = 5.0) -> None:
        """Stop listening, let what runs end for up to ``grace_s`` seconds, then cut off the rest."""
        self.draining = True
        if self._listener is not None:
            self._listener.close()
            self._listener = None
            await self._drain(grace_s)
        if self._given_wheel is None and hasattr(self, "wheel"):
            self.wheel.close()

    async def _drain(self, grace_s: float) -> None:
        end_s = self.loop.time() + grace_s
        for connection in list(self._connections):
            connection.pipeline.drain()
        while self._connections and self.loop.time() < end_s:
            await asyncio.sleep(_STOP_POLL_S)
        for connection in list(self._connections):
            connection.channel.abort()
        while self._connections:
            await asyncio.sleep(0)

    # ---- its connections call

    def admit(self, connection: ServerConnection) -> bool:
        """Count a new connection. False: it is one too many."""
        self._connections.add(connection)
        most, highest = self.limits.max_connections, self.limits.max_descriptor
        over = over_descriptors = 0
        if most is not None:
            over = len(self._connections) - most
        if highest is not None:
            over_descriptors = connection.channel.descriptor - highest + 1
        if over <= 0 and over_descriptors <= 0:
            return True
        self.turned_away += over_descriptors > 0
        if over > _MOST_REFUSED or over_descriptors > min(_MOST_REFUSED, (highest or 0) // 16):
            connection.channel.abort()
        return False

    def forget(self, connection: ServerConnection) -> None:
        self._connections.discard(connection)

    def refusal(self, refused: Refused) -> bytes:
        """The whole answer to a request that is not handed on."""
        status = refused.status
        headers: Headers = ((b"content-type", b"application/json"),)
        if refused.retry_after_s is not None:
            headers = (*headers, (b"retry-after", b"%d" % refused.retry_after_s))
        body = refusal_body(status, refused.code, refused.message)
        if self._refuse is not None:
            try:
                headers, body = self._refuse(refused)
            except Exception:
                log.exception("the answer to a refused request could not be made")
        return head_bytes(status_line(status), headers) + b"connection: close\r\ncontent-length: %d\r\n\r\n" % len(body) + body

    def handler_failed(self, exchange: Exchange) -> None:
        """What the handler raised becomes a 500, or an answer cut off when one was begun."""
        log.exception("the handler failed on %r", exchange)
        if exchange.started:
            exchange.abort()
            return
        exchange.keep_alive = False
        exchange.respond(500, ((b"content-type", b"application/json"),), refusal_body(500, "internal_error", "Internal server error."))

    def guard(self, callback: Callable[[], object]) -> None:
        """Call a handler's callback; the connection goes on whatever it raises."""
        try:
            callback()
        except Exception:
            log.exception("a callback of an exchange failed")
