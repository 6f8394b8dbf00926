"""A connect that is cancelled in the moment between its success and its first use leaves nothing behind."""

from __future__ import annotations

import asyncio

import uvloop

from control_plane.errors import InstanceFailed
from control_plane.transport import HttpClient, HttpServer


class Deaf:
    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None: ...
    def on_body(self, data: bytes) -> None: ...
    def on_complete(self) -> None: ...
    def on_error(self, error: InstanceFailed) -> None: ...


async def cancel_after(turns: int) -> None:
    """Cancel a call that many turns of the loop after it was sent, then close the client."""
    server = HttpServer(lambda exchange: exchange.respond(200, [], b""))
    await server.start("127.0.0.1", 0)
    client = HttpClient(server.url)
    call = client.send("GET", "/", [], b"", Deaf())
    for _ in range(turns):
        await asyncio.sleep(0)
    call.cancel()
    async with asyncio.timeout(5):
        await client.close()
    await server.stop(0)


def test_close_ends_whenever_the_connect_was_cancelled() -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for turns in range(25):
            runner.run(cancel_after(turns))
