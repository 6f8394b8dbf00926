"""A server that answers probes as vLLM does and every POST with whatever bytes a test says, on sockets of its own."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from transport_rig import read_request

Script = Callable[[asyncio.StreamReader, asyncio.StreamWriter, bytes], Awaitable[None]]
"""Answers one request (its head and body are given); the connection goes on behind it unless the script closed it."""


def ok(body: bytes = b'{"choices":[{"text":"ok"}]}', *lines: bytes) -> bytes:
    head = b"".join(line + b"\r\n" for line in (b"HTTP/1.1 200 OK", b"content-type: application/json", *lines))
    return head + b"content-length: %d\r\n\r\n" % len(body) + body


class RawEngine:
    """``posts``: the number of the connection that each POST came on, and its bytes. ``script`` answers them."""

    def __init__(self, model: str = "m", *, keeps: bool = True) -> None:
        self.url = ""
        self.model = model
        #: keep connections open behind a probe
        self.keeps = keeps
        self.posts: list[tuple[int, bytes]] = []
        self.connections = 0
        self.open = 0
        self.script: Script | None = None

    def says(self, *pieces: bytes, close: bool = False, pause_s: float = 0.0) -> None:
        """Answer every POST with these bytes."""

        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
            for piece in pieces:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(pause_s)
            if close:
                writer.close()

        self.script = script

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        number = self.connections
        try:
            while not writer.is_closing():
                request = await read_request(reader)
                if request.startswith(b"GET "):
                    self._answer_probe(writer, request)
                    continue
                self.posts.append((number, request))
                if self.script is None:
                    writer.write(ok())
                else:
                    await self.script(reader, writer, request)
        except (OSError, EOFError):
            pass
        finally:
            self.open -= 1
            writer.close()

    def _answer_probe(self, writer: asyncio.StreamWriter, request: bytes) -> None:
        path = request.split(b" ")[1]
        lines = () if self.keeps else (b"connection: close",)
        if path == b"/v1/models":
            writer.write(ok(json.dumps({"object": "list", "data": [{"id": self.model, "object": "model"}]}).encode(), *lines))
        elif path in (b"/health", b"/metrics"):
            writer.write(ok(b"", *lines))
        else:
            writer.write(b"HTTP/1.1 405 No\r\ncontent-length: 0\r\n%b\r\n" % b"".join(line + b"\r\n" for line in lines))
        if not self.keeps:
            writer.close()


@asynccontextmanager
async def raw_engine(**options: object) -> AsyncIterator[RawEngine]:
    engine = RawEngine(**options)  # type: ignore[arg-type]
    tasks: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        with suppress(asyncio.CancelledError):
            await engine.serve(reader, writer)

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    engine.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield engine
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.sleep(0)
