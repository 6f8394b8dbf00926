"""What the tests of the transport stand on: both event loops, raw sockets to send any bytes, and servers that answer any bytes."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any

import uvloop

from control_plane.errors import InstanceFailed
from control_plane.transport import Exchange, HttpClient, HttpServer, ServerLimits

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
CLOSE = b"Connection: close\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def run(loop: str, scenario: Coroutine[Any, Any, None]) -> None:
    """Run one scenario to its end on the named kind of loop."""
    with asyncio.Runner(loop_factory=LOOPS[loop]) as runner:
        runner.run(asyncio.wait_for(scenario, 20))


def posted(*lines: bytes, body: bytes = b"abc", version: bytes = b"1.1", target: bytes = b"/") -> bytes:
    return b"POST %b HTTP/%b\r\nHost: a\r\n%b\r\n%b" % (target, version, b"".join(line + b"\r\n" for line in lines), body)


def statuses(answer: bytes) -> list[int]:
    """The status codes of the answers in a byte stream."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


async def until(condition: Callable[[], object], timeout_s: float = 5.0) -> None:
    """Wait for something to become true."""
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.005)


def echo(exchange: Exchange) -> None:
    """Answers with method, target and body."""
    exchange.respond(200, ((b"x-test", b"1"),), b"%b %b %b" % (exchange.method.encode(), exchange.target, exchange.body))


class Kept:
    """A handler that keeps what it gets, for the test to answer."""

    def __init__(self) -> None:
        self.exchanges: list[Exchange] = []
        self.left: list[Exchange] = []

    def __call__(self, exchange: Exchange) -> None:
        self.exchanges.append(exchange)
        exchange.on_disconnect = lambda: self.left.append(exchange)


@contextlib.asynccontextmanager
async def serving(handler: Callable[[Exchange], object], limits: ServerLimits | None = None, **options: Any) -> AsyncIterator[HttpServer]:
    server = HttpServer(handler, limits=limits, **options)
    await server.start()
    try:
        yield server
    finally:
        await server.stop(0.0)
        assert server.connections == 0
        assert server.open_exchanges == 0
        assert server.receiving.total_bytes == 0
        assert server.receiving.memory.held_bytes == 0


@contextlib.asynccontextmanager
async def raw_socket(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


async def ask(port: int, *pieces: bytes, half_close: bool = False, pause_s: float = 0.0) -> bytes:
    """Send pieces of bytes and read until the server closes."""
    async with raw_socket(port) as (reader, writer):
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            if pause_s:
                await asyncio.sleep(pause_s)
        if half_close:
            writer.write_eof()
        return await asyncio.wait_for(reader.read(), 5)


@contextlib.asynccontextmanager
async def scripted(script: Script) -> AsyncIterator[str]:
    """A server that runs ``script`` on every connection; gives its URL."""
    tasks: set[asyncio.Task[None]] = set()

    async def run_script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await script(reader, writer)
        except (OSError, EOFError, asyncio.CancelledError):
            pass
        finally:
            tasks.discard(task)
            writer.close()

    server = await asyncio.start_server(run_script, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.sleep(0)


async def read_request(reader: asyncio.StreamReader) -> bytes:
    """One request with a body of known length, head and body."""
    head = await reader.readuntil(b"\r\n\r\n")
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            return head + await reader.readexactly(int(line.partition(b":")[2]))
    return head


class Answer:
    """A receiver that gathers everything; ``over`` is set once."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self.chunks: list[bytes] = []
        self.error: InstanceFailed | None = None
        self.ends = 0
        self.over = asyncio.Event()

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        assert self.status == 0
        self.status = status
        self.headers = headers

    def on_body(self, data: bytes) -> None:
        assert data
        assert not self.ends
        self.chunks.append(data)

    def on_complete(self) -> None:
        self._end()

    def on_error(self, error: InstanceFailed) -> None:
        self.error = error
        self._end()

    def _end(self) -> None:
        self.ends += 1
        assert self.ends == 1
        self.over.set()

    async def wait(self, timeout_s: float = 5.0) -> Answer:
        await asyncio.wait_for(self.over.wait(), timeout_s)
        return self


@contextlib.asynccontextmanager
async def client_of(url: str, **options: Any) -> AsyncIterator[HttpClient]:
    client = HttpClient(url, **options)
    try:
        yield client
    finally:
        await client.close()
        assert (client.idle, client.active) == (0, 0)


def post(client: HttpClient, path: str = "/x", body: bytes = b"{}", **options: Any) -> Answer:
    answer = Answer()
    answer.call = client.send("POST", path, (), body, answer, **options)  # type: ignore[attr-defined]
    return answer


def saying(answer: bytes, *, then_close: bool = True, requests: list[bytes] | None = None) -> Script:
    """Answer every request with the same bytes."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            request = await read_request(reader)
            if requests is not None:
                requests.append(request)
            writer.write(answer)
            await writer.drain()
            if then_close:
                return

    return script
