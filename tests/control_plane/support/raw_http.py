"""HTTP as it is on the wire: what came, when it began, and whether it was complete. For answers that break in the middle."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit


@dataclass(slots=True)
class RawAnswer:
    """Filled while it comes in; ``task`` ends with the connection."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    #: the server ended it as HTTP demands, rather than hanging up
    complete: bool = False
    task: asyncio.Task[None] | None = None

    @property
    def instance(self) -> str:
        return self.headers.get("x-instance-id", "")

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def events(self) -> list[str]:
        """The data of its server-sent events."""
        return [line.removeprefix("data: ") for line in self.body.decode().split("\n") if line.startswith("data: ")]

    async def done(self) -> RawAnswer:
        assert self.task is not None
        await self.task
        return self


def post(url: str, path: str, body: bytes | dict[str, Any]) -> RawAnswer:
    """Send a request over a connection of its own; the answer fills as it comes."""
    answer = RawAnswer()
    raw = body if isinstance(body, bytes) else json.dumps(body).encode()
    answer.task = asyncio.get_running_loop().create_task(_exchange(answer, url, path, raw))
    return answer


async def _exchange(answer: RawAnswer, url: str, path: str, body: bytes) -> None:
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        head = f"POST {path} HTTP/1.1\r\nhost: test\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await _read(answer, reader)
        answer.complete = True
    except asyncio.IncompleteReadError as cut:
        answer.body += cut.partial
    finally:
        writer.close()


async def _read(answer: RawAnswer, reader: asyncio.StreamReader) -> None:
    first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")[:-2]
    answer.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    answer.status = int(first.split()[1])
    length = answer.headers.get("content-length")
    if length is not None:
        answer.body = await reader.readexactly(int(length))
        return
    while size := int(await reader.readuntil(b"\r\n"), 16):
        answer.body += await reader.readexactly(size)
        await reader.readexactly(2)
    await reader.readexactly(2)
