"""Many connections at once: idle, half sent, half read, and new ones without end. What is asked beside them is answered."""

from __future__ import annotations

import asyncio
import resource
from typing import Any
from urllib.parse import urlsplit

import pytest

from control_plane.gateway import GatewaySettings
from control_plane.gateway.descriptors import raise_descriptor_limit
from control_plane.transport import Exchange, ServerLimits

PATH = "/v1/completions"
HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\n"
MODELS = b"GET /v1/models HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"


@pytest.fixture
def many() -> int:
    """2,000 where the limit allows: both ends of each connection are in this process."""
    return min(2_000, (raise_descriptor_limit() - 500) // 2)


async def open_many(url: str, count: int) -> list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    address = urlsplit(url)
    opened: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
    while len(opened) < count:
        some = (asyncio.open_connection(address.hostname, address.port) for _ in range(min(200, count - len(opened))))
        opened += await asyncio.gather(*some)
    return opened


async def close_all(opened: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]) -> None:
    for _, writer in opened:
        writer.close()
    await asyncio.sleep(0.05)


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


async def test_idle_connections_disturb_nobody(make_stand: Any, many: int) -> None:
    stand = await make_stand()
    before = resident_bytes()
    idle = await open_many(stand.gateway.url, many)

    for _ in range(20):
        assert (await asyncio.wait_for(stand.ask("POST", PATH, {"model": "m"}), 2)).status == 200
    assert not any(reader.at_eof() for reader, _ in idle)
    assert resident_bytes() - before < many * 50_000  # both ends, the client's streams take most of it
    # and they are connections still
    reader, writer = idle[-1]
    writer.write(MODELS)
    assert (await asyncio.wait_for(reader.readline(), 2)).startswith(b"HTTP/1.1 200")

    await close_all(idle)


async def test_new_connections_without_end_are_all_served(make_stand: Any) -> None:
    stand = await make_stand()
    address = urlsplit(stand.gateway.url)

    async def visit() -> bytes:
        reader, writer = await asyncio.open_connection(address.hostname, address.port)
        writer.write(MODELS)
        answer = await reader.read()
        writer.close()
        return answer

    async def beside() -> list[int]:
        return [(await stand.ask("POST", PATH, {"model": "m"})).status for _ in range(20)]

    began = asyncio.get_running_loop().time()
    visits = asyncio.gather(*(visit() for _ in range(1_000)))
    statuses, answers = await asyncio.gather(beside(), visits)

    assert statuses == [200] * 20
    assert all(answer.startswith(b"HTTP/1.1 200") for answer in answers)
    assert asyncio.get_running_loop().time() - began < 10


HALF_SENT = {
    "request line": HEAD[:20],
    "headers": HEAD,
    "body": HEAD + b"content-length: 1000\r\n\r\n{",
    "chunk": HEAD + b"transfer-encoding: chunked\r\n\r\n5\r\nab",
}


@pytest.mark.parametrize("part", HALF_SENT)
async def test_half_sent_requests_are_told_and_closed(make_stand: Any, eventually: Any, part: str) -> None:
    limits = ServerLimits(header_timeout_s=0.6, body_timeout_s=0.6, linger_s=0.1)
    stand = await make_stand(gateway_options={"limits": limits})
    slow = await open_many(stand.gateway.url, 500)
    for _, writer in slow:
        writer.write(HALF_SENT[part])
    for _ in range(3):
        assert (await asyncio.wait_for(stand.ask("POST", PATH, {"model": "m"}), 2)).status == 200

    answers = await asyncio.wait_for(asyncio.gather(*(reader.read() for reader, _ in slow)), 10)

    assert {answer[9:12] for answer in answers} == {b"408"}
    await close_all(slow)
    await eventually(lambda: stand.gateway._server.connections == 0)
    assert stand.gateway._server.receiving.total_bytes == 0


async def test_a_dripped_head_wins_no_time(make_stand: Any) -> None:
    stand = await make_stand(gateway_options={"limits": ServerLimits(header_timeout_s=0.4, linger_s=0.1)})
    ((reader, writer),) = await open_many(stand.gateway.url, 1)

    async def drip() -> None:
        for byte in HEAD * 5:
            writer.write(bytes((byte,)))
            await asyncio.sleep(0.02)

    dripping = asyncio.create_task(drip())
    answer = await asyncio.wait_for(reader.read(), 3)
    dripping.cancel()

    assert answer.startswith(b"HTTP/1.1 408")
    await close_all([(reader, writer)])


async def test_clients_that_read_nothing_are_dropped_and_the_rest_goes_on(make_stand: Any, eventually: Any) -> None:
    """Each asks for 8 MB and takes none of it."""
    limits = ServerLimits(write_timeout_s=0.5)
    stand = await make_stand(gateway_options={"limits": limits}, settings=GatewaySettings(access_log=False))
    pieces = [b"x" * 65536] * 128

    def long_answer(exchange: Exchange) -> None:
        if b"long" not in exchange.body:
            exchange.respond(200, [], b"{}")
            return
        exchange.start(200, [(b"content-type", b"application/octet-stream")])
        for piece in pieces:
            exchange.write(piece)
        exchange.end()

    stand.engine.answer = long_answer
    before = resident_bytes()
    slow = await open_many(stand.gateway.url, 20)
    for _, writer in slow:
        writer.transport.pause_reading()
        body = b'{"model":"m","prompt":"long"}'
        writer.write(HEAD + b"content-length: %d\r\n\r\n" % len(body) + body)
    await eventually(lambda: stand.gateway.open_requests)

    # the engine of this test is in this process, and holds what the gateway does not take
    assert resident_bytes() - before < 20 * 8_400_000 + 80_000_000
    assert (await asyncio.wait_for(stand.ask("POST", PATH, {"model": "m"}), 5)).status == 200
    await eventually(lambda: stand.gateway.open_requests == 0, 10)
    await close_all(slow)
