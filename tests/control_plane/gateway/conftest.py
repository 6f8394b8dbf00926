"""A gateway over scripted engines, and a client that shows every byte: what the gateway's tests stand on.

The engines are servers of our own transport that note what they were sent and answer as a test says; the manager between is the real
one. Clients of other people's making have their own modules, over simulated engines.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest

from control_plane.gateway import Gateway, GatewaySettings
from control_plane.manager import ControlPlaneManager
from control_plane.transport import Exchange, HttpServer
from control_plane.types import ExecutionInstance

JSON = (b"content-type", b"application/json")
EVENTS = (b"content-type", b"text/event-stream; charset=utf-8")


def completion(exchange: Exchange) -> None:
    """The engine's answer unless a test gives another."""
    body = b'{"id":"chatcmpl-1","choices":[{"message":{"content":"hi"}}],"usage":{"prompt_tokens":3,"completion_tokens":2}}'
    exchange.respond(200, [JSON, (b"x-engine", b"yes")], body)


class Engine:
    """A server that says it is vLLM. ``seen``: the requests that came, ``left``: how many clients hung up."""

    def __init__(self, models: tuple[str, ...]) -> None:
        self.models = models
        self.seen: list[Exchange] = []
        self.left = 0
        self.answer: Callable[[Exchange], None] = completion
        self._server = HttpServer(self._handle)

    async def start(self, port: int = 0) -> None:
        await self._server.start("127.0.0.1", port)

    async def stop(self) -> None:
        await self._server.stop(0.0)

    @property
    def url(self) -> str:
        return self._server.url

    @property
    def body(self) -> bytes:
        """The body of the last request."""
        return self.seen[-1].body

    def header(self, name: bytes) -> bytes | None:
        """A header of the last request."""
        return self.seen[-1].header(name)

    def _handle(self, exchange: Exchange) -> None:
        if exchange.method == "GET" and exchange.path in ("/health", "/metrics"):
            exchange.respond(200, [], b"")
        elif exchange.method == "GET" and exchange.path == "/v1/models":
            cards = [{"id": name, "object": "model", "owned_by": "vllm", "max_model_len": 4096} for name in self.models]
            exchange.respond(200, [JSON], json.dumps({"object": "list", "data": cards}).encode())
        elif exchange.method == "GET" and not exchange.path.startswith("/v1/responses/"):
            exchange.respond(405, [], b"")
        else:
            self.seen.append(exchange)
            exchange.on_disconnect = self._on_left
            self.answer(exchange)

    def _on_left(self) -> None:
        self.left += 1


@dataclass(slots=True)
class Answer:
    """What came back, byte by byte."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def header(self, name: str) -> str | None:
        return next((value for key, value in self.headers if key == name), None)

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> dict[str, Any]:
        found: dict[str, Any] = self.json["error"]
        return found


class Connection:
    """One connection to the gateway: send what you like, read answers one by one."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, url: str) -> Connection:
        parts = urlsplit(url)
        return cls(*await asyncio.open_connection(parts.hostname, parts.port))

    def send(self, method: str, target: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> None:
        lines = {"host": "127.0.0.1", **(headers or {})}
        if body is not None:
            lines = {"content-type": "application/json", "content-length": str(len(body)), **lines}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value)
        self.writer.write(f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode() + (body or b""))

    async def head(self) -> Answer:
        """The head of the next answer, its body unread."""
        raw = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), 10)
        first, *lines = raw.decode("latin-1").split("\r\n")[:-2]
        headers = [(name.lower(), value) for name, _, value in (line.partition(": ") for line in lines)]
        return Answer(int(first.split()[1]), headers, b"")

    async def chunk(self) -> bytes:
        """The next chunk of a chunked body, b"" at its end."""
        size = int(await asyncio.wait_for(self.reader.readline(), 10), 16)
        data = await self.reader.readexactly(size)
        await self.reader.readexactly(2)
        return data

    async def answer(self, method: str = "POST") -> Answer:
        answer = await self.head()
        length = answer.header("content-length")
        if method == "HEAD" or answer.status == 204:
            return answer
        if length is not None:
            answer.body = await asyncio.wait_for(self.reader.readexactly(int(length)), 10)
        else:
            while data := await self.chunk():
                answer.body += data
        return answer

    async def close(self) -> None:
        self.writer.close()


@dataclass(slots=True)
class Stand:
    """A running gateway, its manager and its engines."""

    gateway: Gateway
    manager: ControlPlaneManager
    engines: list[Engine] = field(default_factory=list)

    @property
    def engine(self) -> Engine:
        return self.engines[0]

    async def ask(
        self, method: str, target: str, body: bytes | dict[str, Any] | None = None, *, url: str | None = None, **headers: str
    ) -> Answer:
        """One request on a connection of its own. ``_`` in a header's name stands for ``-``."""
        connection = await Connection.open(url or self.gateway.url)
        try:
            raw = json.dumps(body).encode() if isinstance(body, dict) else body
            connection.send(method, target, raw, {name.replace("_", "-"): value for name, value in headers.items()})
            return await connection.answer(method)
        finally:
            await connection.close()

    async def chat(self, **fields: Any) -> Answer:
        return await self.ask("POST", "/v1/chat/completions", {"model": "m", "messages": [], **fields})


MakeStand = Callable[..., Awaitable[Stand]]


@pytest.fixture
async def make_stand() -> AsyncIterator[MakeStand]:
    """``await make_stand(engines=2, models=("m",), settings=..., admin_port=..., **manager_options)``."""
    async with AsyncExitStack() as stack:

        async def make(
            engines: int = 1,
            models: tuple[str, ...] = ("m",),
            settings: GatewaySettings | None = None,
            admin_port: int | None = None,
            gateway_options: dict[str, Any] | None = None,
            **manager_options: Any,
        ) -> Stand:
            manager = ControlPlaneManager(**manager_options)
            stack.push_async_callback(holds_no_body, manager)  # runs last
            gateway = Gateway(manager, settings or GatewaySettings(access_log=False), **(gateway_options or {}))
            stand = Stand(gateway, manager)
            for index in range(engines):
                engine = Engine(models)
                await engine.start()
                stack.push_async_callback(engine.stop)
                stand.engines.append(engine)
                instance = ExecutionInstance(f"e{index}", url=engine.url, model_name=models[0], served_models=list(models))
                manager.register_instance(instance)
            await manager.start()
            stack.push_async_callback(manager.stop, 0.0)
            await gateway.start("127.0.0.1", 0, "127.0.0.1" if admin_port is not None else None, admin_port)
            stack.push_async_callback(gateway.stop, 0.0)
            return stand

        yield make


async def holds_no_body(manager: ControlPlaneManager) -> None:
    """However a test's requests ended, their bytes have been given back."""
    await eventually(lambda: manager.body_memory.held_bytes == 0)


@pytest.fixture
async def stand(make_stand: MakeStand) -> Stand:
    """A gateway over one engine that serves the model ``m``."""
    return await make_stand()


async def eventually(true: Callable[[], object], seconds: float = 5.0) -> None:
    """Wait until ``true()`` is; fails after ``seconds``."""
    for _ in range(int(seconds / 0.01)):
        if true():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come true in time")


@pytest.fixture(name="eventually")
def eventually_fixture() -> Callable[..., Awaitable[None]]:
    return eventually


@pytest.fixture
async def open_connection() -> AsyncIterator[Callable[[str], Awaitable[Connection]]]:
    """``await open_connection(url)``; closed at the test's end."""
    opened: list[Connection] = []

    async def open_one(url: str) -> Connection:
        opened.append(await Connection.open(url))
        return opened[-1]

    yield open_one
    for connection in opened:
        await connection.close()
