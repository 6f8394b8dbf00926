"""ASGI applications behind our own listener: one Exchange becomes one call of the application. For everything off the hot path."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote

from control_plane.gateway.replies import Header
from control_plane.transport import Exchange

Message = MutableMapping[str, Any]
Application = Callable[[Message, Callable[[], Awaitable[Message]], Callable[[Message], Awaitable[None]]], Awaitable[None]]
Crashed = Callable[[Exchange, BaseException], None]


class AsgiCall:
    """One request of the application: its ``receive`` and ``send``."""

    def __init__(self, exchange: Exchange, extra_headers: tuple[Header, ...]) -> None:
        self._exchange = exchange
        self._extra_headers = extra_headers
        self._received = False
        self._left = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._head: tuple[int, list[Header]] | None = None
        self.status = 0
        exchange.on_disconnect = self._on_disconnect
        exchange.on_pause = self._writable.clear
        exchange.on_resume = self._writable.set

    def _on_disconnect(self) -> None:
        self._left.set()
        self._writable.set()

    def scope(self) -> Message:
        exchange = self._exchange
        return {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": exchange.method,
            "scheme": "https" if exchange.tls else "http",
            "path": unquote(exchange.path),
            "raw_path": exchange.path.encode("latin-1"),
            "query_string": exchange.query,
            "root_path": "",
            "headers": exchange.headers,
            "client": (exchange.peer, 0) if exchange.peer else None,
            "server": None,
        }

    async def receive(self) -> Message:
        if not self._received:
            self._received = True
            return {"type": "http.request", "body": self._exchange.body, "more_body": False}
        await self._left.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self._head = (self.status, [*message.get("headers", ()), *self._extra_headers])
            return
        body, more = message.get("body", b""), message.get("more_body", False)
        exchange = self._exchange
        if self._head is not None:
            (status, headers), self._head = self._head, None
            if not more:
                exchange.respond(status, headers, body)
                return
            exchange.start(status, _without_length(headers), _length(headers))
        exchange.write(body)
        if not more:
            exchange.end()
        await self._writable.wait()


async def serve_asgi(application: Application, exchange: Exchange, crashed: Crashed, extra_headers: tuple[Header, ...] = ()) -> int:
    """Run ``application`` for one exchange; returns the status that it answered with, 0 when it did not answer.

    ``crashed`` is called when it raises or returns without an answer.
    """
    call = AsgiCall(exchange, extra_headers)
    try:
        await application(call.scope(), call.receive, call.send)
        if not exchange.finished:
            raise RuntimeError("the application returned before its answer was complete")
    except Exception as error:
        answered = exchange.started
        crashed(exchange, error)
        return call.status if answered else 0
    return call.status


def _length(headers: list[Header]) -> int | None:
    return next((int(value) for name, value in headers if name == b"content-length"), None)


def _without_length(headers: list[Header]) -> list[Header]:
    return [header for header in headers if header[0] != b"content-length"]
