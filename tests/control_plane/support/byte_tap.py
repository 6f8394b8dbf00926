"""A TCP pipe in front of a server that keeps what went through it: shows the very bytes that an engine was sent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from urllib.parse import urlsplit


class ByteTap:
    """``url`` leads to the server; ``sent`` holds the bytes of each connection towards it, in the order of the connections."""

    def __init__(self, url: str) -> None:
        self._address = urlsplit(url)
        self.url = ""
        self.sent: list[bytearray] = []

    def bodies(self, path: str) -> list[bytes]:
        """The bodies of all POST requests to ``path``, as they went over the wire."""
        found: list[bytes] = []
        for sent in self.sent:
            rest = bytes(sent)
            while rest:
                head, _, rest = rest.partition(b"\r\n\r\n")
                first, *lines = head.split(b"\r\n")
                headers = {name.lower(): value for name, _, value in (line.partition(b": ") for line in lines)}
                length = int(headers.get(b"content-length", 0))
                body, rest = rest[:length], rest[length:]
                if first.startswith(b"POST %b " % path.encode()):
                    found.append(body)
        return found

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection: both directions until either side ends."""
        sent = bytearray()
        self.sent.append(sent)
        there, away = await asyncio.open_connection(self._address.hostname, self._address.port)
        tasks = [asyncio.create_task(_pump(reader, away, sent)), asyncio.create_task(_pump(there, writer, None))]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            for side in (away, writer):
                side.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, kept: bytearray | None) -> None:
    with suppress(OSError):
        while data := await reader.read(65536):
            if kept is not None:
                kept += data
            writer.write(data)
            await writer.drain()


@asynccontextmanager
async def tapped(url: str) -> AsyncIterator[ByteTap]:
    """A tap in front of the server at ``url``."""
    tap = ByteTap(url)
    server = await asyncio.start_server(tap.serve, "127.0.0.1", 0)
    tap.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield tap
    finally:
        server.close()
