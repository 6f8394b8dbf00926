"""The floor that the gateway is measured against: an HTTP relay in plain Python with no features at all.

    python benchmarks/bare_relay.py --port 8080 --engine http://127.0.0.1:9001 --engine http://127.0.0.1:9002

uvloop, one httptools protocol on each side, the body decoded as JSON, the engine with the fewest requests in flight, kept connections.
No queue, no limits, no timeouts, no retries, no health checks, no metrics, no ids, no logs: whatever goes wrong closes the connection.
"""

from __future__ import annotations

import argparse
import asyncio
from typing import Any, cast
from urllib.parse import urlsplit

import httptools
import msgspec
import uvloop

_decode = msgspec.json.Decoder().decode


class Engine:
    """One engine: its idle connections and how many requests it has."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self.host, self.port = parts.hostname or "127.0.0.1", parts.port or 80
        self.in_flight = 0
        self.idle: list[EngineSide] = []

    async def open(self, client: ClientSide, head: bytes) -> None:
        loop = asyncio.get_running_loop()
        _, side = await loop.create_connection(lambda: EngineSide(self), self.host, self.port)
        side.send(client, head)


class EngineSide(asyncio.Protocol):
    """A connection to an engine; its answer goes to one client."""

    transport: asyncio.Transport

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.client: ClientSide | None = None
        self.parser: Any = httptools.HttpResponseParser(self)
        self.headers: list[bytes] = []
        self.chunked = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def send(self, client: ClientSide, request: bytes) -> None:
        self.client = client
        client.upstream = self
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def connection_lost(self, exc: Exception | None) -> None:
        if self in self.engine.idle:
            self.engine.idle.remove(self)
        if self.client is not None:
            self.engine.in_flight -= 1
            self.client.transport.abort()

    def on_message_begin(self) -> None:
        self.headers = []
        self.chunked = False

    def on_header(self, name: bytes, value: bytes) -> None:
        lower = name.lower()
        if lower == b"transfer-encoding":
            self.chunked = True
        if lower != b"connection":
            self.headers.append(b"%b: %b\r\n" % (name, value))

    def on_headers_complete(self) -> None:
        head = b"HTTP/1.1 %d OK\r\n%b\r\n" % (self.parser.get_status_code(), b"".join(self.headers))
        if self.client is not None:
            self.client.pending = head

    def on_body(self, body: bytes) -> None:
        client = self.client
        if client is None:
            return
        piece = b"%x\r\n%b\r\n" % (len(body), body) if self.chunked else body
        client.transport.write(client.pending + piece)
        client.pending = b""

    def on_message_complete(self) -> None:
        client, self.client = self.client, None
        if client is None:
            return
        if self.chunked or client.pending:
            client.transport.write(client.pending + (b"0\r\n\r\n" if self.chunked else b""))
            client.pending = b""
        client.upstream = None
        self.engine.in_flight -= 1
        self.engine.idle.append(self)


class ClientSide(asyncio.Protocol):
    """A client's connection: one request at a time."""

    transport: asyncio.Transport

    def __init__(self, engines: list[Engine]) -> None:
        self.engines = engines
        self.parser: Any = httptools.HttpRequestParser(self)
        self.url = b""
        self.headers: list[bytes] = []
        self.body: list[bytes] = []
        self.pending = b""
        self.upstream: EngineSide | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self.upstream is not None:
            self.upstream.transport.abort()

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def on_message_begin(self) -> None:
        self.url = b""
        self.headers = []
        self.body = []

    def on_url(self, url: bytes) -> None:
        self.url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() not in (b"host", b"connection"):
            self.headers.append(b"%b: %b\r\n" % (name, value))

    def on_body(self, body: bytes) -> None:
        self.body.append(body)

    def on_message_complete(self) -> None:
        body = b"".join(self.body)
        if body:
            _decode(body)["model"]
        engine = min(self.engines, key=lambda one: one.in_flight)
        engine.in_flight += 1
        method = self.parser.get_method()
        request = b"%b %b HTTP/1.1\r\nhost: engine\r\n%b\r\n%b" % (method, self.url, b"".join(self.headers), body)
        if engine.idle:
            engine.idle.pop().send(self, request)
        else:
            task = asyncio.get_running_loop().create_task(engine.open(self, request))
            self.opening = task


async def serve(port: int, engines: list[Engine]) -> None:
    server = await asyncio.get_running_loop().create_server(lambda: ClientSide(engines), "127.0.0.1", port, backlog=4096)
    print(f"listening on http://127.0.0.1:{port}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    arguments.add_argument("--port", type=int, default=8080)
    arguments.add_argument("--engine", action="append", required=True)
    given = arguments.parse_args()
    uvloop.run(serve(given.port, [Engine(url) for url in given.engine]))
