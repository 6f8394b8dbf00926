"""All request bodies together, being read, waiting and running, have one bound; however a request ends, its bytes are given back.

Behind every test here, as behind all of the gateway's, ``make_stand`` sees that nothing is held any more.
"""

from __future__ import annotations

import asyncio
import contextlib
from random import Random
from typing import Any
from urllib.parse import urlsplit

import pytest

from control_plane.gateway import GatewaySettings
from control_plane.gateway.metrics_page import make_exporter
from control_plane.transport import Exchange, ServerLimits
from control_plane.types import ExecutionInstance

PATH = "/v1/completions"
EVENT = b'data: {"choices":[{"index":0,"text":"o"}]}\n\n'
LIMITS = ServerLimits(linger_s=0.1)
ASKED = b'{"model":"m","prompt":"'
STREAMED = b'{"model":"m","stream":true,"prompt":"'


def sized(size: int, start: bytes = ASKED) -> bytes:
    """A body of so many bytes."""
    return start + b"x" * (size - len(start) - 2) + b'"}'


def head(size: int) -> bytes:
    return b"POST /v1/completions HTTP/1.1\r\nhost: a\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n" % size


def held(stand: Any) -> int:
    return int(stand.manager.body_memory.held_bytes)


def keeps(stand: Any) -> list[Exchange]:
    """The engine answers nothing by itself; what it was asked."""
    stand.engine.answer = lambda exchange: None
    seen: list[Exchange] = stand.engine.seen
    return seen


def answers(exchange: Exchange) -> None:
    exchange.respond(200, [(b"content-type", b"application/json")], b'{"choices":[]}')


@pytest.mark.parametrize("stream", [False, True])
async def test_over_the_bound_newcomers_are_refused_and_the_accepted_undisturbed(make_stand: Any, eventually: Any, stream: bool) -> None:
    stand = await make_stand(max_body_memory_bytes=1_000_000, gateway_options={"limits": LIMITS})
    seen = keeps(stand)
    start = STREAMED if stream else ASKED
    running = [asyncio.create_task(stand.ask("POST", PATH, sized(450_000, start))) for _ in range(2)]
    await eventually(lambda: len(seen) == 2)
    assert 900_000 <= held(stand) <= 901_000

    for size in (101_000, 500_000):  # whole in one read or in several
        refused = await stand.ask("POST", PATH, sized(size, start))
        assert (refused.status, refused.error["code"], refused.header("retry-after")) == (503, "body_memory_full", "1")
    assert len(seen) == 2

    for exchange in seen:
        if stream:
            exchange.start(200, [(b"content-type", b"text/event-stream")])
            exchange.write(EVENT)
            exchange.end(b"data: [DONE]\n\n")
        else:
            answers(exchange)
    assert [answer.status for answer in await asyncio.gather(*running)] == [200, 200]
    assert held(stand) == 0
    stand.engine.answer = answers
    assert (await stand.ask("POST", PATH, sized(500_000))).status == 200
    assert stand.gateway.relay.refused["body_memory_full"] == 2


async def test_a_half_sent_body_is_refused_and_its_connection_closed(make_stand: Any, eventually: Any, open_connection: Any) -> None:
    stand = await make_stand(max_body_memory_bytes=1_000_000, gateway_options={"limits": LIMITS})
    first, second = await open_connection(stand.gateway.url), await open_connection(stand.gateway.url)
    body = sized(900_000)
    first.writer.write(head(len(body)) + body[:700_000])
    await eventually(lambda: held(stand) == 700_000)

    second.writer.write(head(len(body)) + body[:500_000])
    refused = await second.answer()
    assert (refused.status, refused.error["code"], refused.header("retry-after")) == (503, "body_memory_full", "1")
    assert refused.header("connection") == "close"
    assert await asyncio.wait_for(second.reader.read(), 5) == b""
    assert held(stand) == 700_000

    # the one that came first is undisturbed, and so is a small one
    assert (await stand.ask("POST", PATH, {"model": "m"})).status == 200
    first.writer.write(body[700_000:])
    assert (await first.answer()).status == 200
    assert held(stand) == 0


async def test_small_requests_are_refused_too_where_nothing_fits(make_stand: Any, eventually: Any, open_connection: Any) -> None:
    stand = await make_stand(max_body_memory_bytes=100_000)
    half = await open_connection(stand.gateway.url)
    half.writer.write(head(100_000) + b"x" * 99_990)
    await eventually(lambda: held(stand) == 99_990)

    refused = await stand.ask("POST", PATH, {"model": "m"})

    assert (refused.status, refused.error["code"]) == (503, "body_memory_full")
    assert (await stand.ask("GET", "/v1/models")).status == 200, "what has no body needs no memory"


async def test_what_alone_is_more_than_all_may_hold_is_too_large(make_stand: Any) -> None:
    stand = await make_stand(max_body_memory_bytes=10_000, gateway_options={"limits": LIMITS})

    refused = await stand.ask("POST", PATH, sized(10_001))

    assert (refused.status, refused.error["code"]) == (413, "payload_too_large")


# ---- given back


async def test_a_completed_and_a_failed_request_give_back(make_stand: Any) -> None:
    stand = await make_stand(max_attempts=1)
    assert (await stand.ask("POST", PATH, sized(300_000))).status == 200
    assert held(stand) == 0
    stand.engine.answer = Exchange.abort
    assert (await stand.ask("POST", PATH, sized(300_000))).status == 502
    assert held(stand) == 0
    stand.engine.answer = lambda exchange: exchange.respond(400, [], b"{}")
    assert (await stand.ask("POST", PATH, sized(300_000))).status == 400
    assert held(stand) == 0


async def test_a_request_run_elsewhere_has_its_body_still(make_stand: Any) -> None:
    stand = await make_stand(engines=2)
    bodies = []

    def die_first(exchange: Exchange) -> None:
        bodies.append(exchange.body)
        exchange.abort() if len(bodies) == 1 else answers(exchange)

    for engine in stand.engines:
        engine.answer = die_first
    body = sized(300_000)
    assert (await stand.ask("POST", PATH, body)).status == 200
    assert bodies == [body, body]
    assert held(stand) == 0


@pytest.mark.parametrize(
    "body", [sized(300_000, b'{"model":"none","prompt":"'), sized(300_000)[:-1], sized(300_000, b'{"model":"m","priority":"z","prompt":"')]
)
async def test_a_refused_request_gives_back(stand: Any, body: bytes) -> None:
    assert (await stand.ask("POST", PATH, body)).status in (400, 404)
    assert held(stand) == 0


async def test_a_client_that_leaves_gives_back_wherever_its_request_is(make_stand: Any, eventually: Any, open_connection: Any) -> None:
    stand = await make_stand(queue_max_requests=1)
    stand.manager.get_instances()[0].max_concurrent_requests = 1
    seen = keeps(stand)
    running, queued, half = [await open_connection(stand.gateway.url) for _ in range(3)]
    body = sized(300_000)
    running.writer.write(head(len(body)) + body)
    await eventually(lambda: len(seen) == 1)
    queued.writer.write(head(len(body)) + body)
    await eventually(lambda: stand.manager.queued_requests == 1)
    half.writer.write(head(len(body)) + body[:200_000])
    await eventually(lambda: held(stand) == 800_000)
    assert (await stand.ask("POST", PATH, body)).error["code"] == "queue_full"
    assert held(stand) == 800_000

    await half.close()
    await eventually(lambda: held(stand) == 600_000)
    await queued.close()
    await eventually(lambda: held(stand) == 300_000)
    await running.close()
    await eventually(lambda: held(stand) == 0)


async def test_a_body_that_does_not_come_in_time_gives_back(make_stand: Any, eventually: Any, open_connection: Any) -> None:
    stand = await make_stand(gateway_options={"limits": ServerLimits(body_timeout_s=0.3, linger_s=0.1)})
    half = await open_connection(stand.gateway.url)
    half.writer.write(head(300_000) + b"x" * 200_000)
    await eventually(lambda: held(stand) == 200_000)
    assert (await half.answer()).status == 408
    assert held(stand) == 0


async def test_admin_calls_are_counted(make_stand: Any) -> None:
    stand = await make_stand(max_body_memory_bytes=500_000, admin_port=0, gateway_options={"limits": LIMITS})
    url, address = stand.gateway.admin_url, "/control/v1/scheduling-policy"
    answer = await stand.ask("PUT", address, sized(300_000, b'{"scheduling_policy":"'), url=url)
    assert answer.status == 400
    assert held(stand) == 0
    stand.manager.body_memory.take(400_000)
    refused = await stand.ask("PUT", address, sized(100_001, b'{"scheduling_policy":"'), url=url)
    stand.manager.body_memory.give_back(400_000)
    assert (refused.status, refused.error["code"]) == (503, "body_memory_full")


async def test_a_stop_gives_back(make_stand: Any, eventually: Any, open_connection: Any) -> None:
    stand = await make_stand()
    seen = keeps(stand)
    running, half = await open_connection(stand.gateway.url), await open_connection(stand.gateway.url)
    running.writer.write(head(300_000) + sized(300_000))
    half.writer.write(head(300_000) + b"x" * 200_000)
    await eventually(lambda: seen and held(stand) == 500_000)
    await stand.gateway.stop(0.0)
    assert held(stand) == 0


# ---- when a stream begins


@pytest.mark.parametrize(("size", "kept"), [(300_000, 0), (10_000, 10_000)])
async def test_a_long_body_is_let_go_of_when_its_stream_begins(
    make_stand: Any, eventually: Any, open_connection: Any, size: int, kept: int
) -> None:
    stand = await make_stand(settings=GatewaySettings(access_log=False, ask_usage=False))
    seen = keeps(stand)
    client = await open_connection(stand.gateway.url)
    body = sized(size, STREAMED)
    client.writer.write(head(size) + body)
    await eventually(lambda: seen)
    assert held(stand) == size
    seen[0].start(200, [(b"content-type", b"text/event-stream")])
    seen[0].write(EVENT)
    await client.head()
    assert await client.chunk() == EVENT
    assert held(stand) == kept
    (job,) = stand.manager.lifecycle.records.live()
    assert len(job.wire.body) == kept
    seen[0].end(b"data: [DONE]\n\n")
    assert await client.chunk()
    assert await client.chunk() == b""
    assert held(stand) == 0


async def test_what_an_engine_answers_unread_is_held_on(make_stand: Any, eventually: Any, open_connection: Any) -> None:
    """Bytes that the kernel does not take yet are in our memory, whatever the engine says meanwhile."""
    release = asyncio.Event()

    async def answer_at_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, EOFError):
            request = await reader.readuntil(b"\r\n\r\n")
            if request.startswith(b"POST"):
                writer.transport.pause_reading()  # type: ignore[attr-defined]
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")
                writer.write(b"%x\r\n%b\r\n" % (len(EVENT), EVENT))
                await release.wait()
            else:
                writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n")
            writer.close()

    engine = await asyncio.start_server(answer_at_once, "127.0.0.1", 0)
    stand = await make_stand(engines=0, settings=GatewaySettings(access_log=False, ask_usage=False))
    port = engine.sockets[0].getsockname()[1]
    stand.manager.register_instance(ExecutionInstance("raw", url=f"http://127.0.0.1:{port}", model_name="m"))
    client = await open_connection(stand.gateway.url)
    size = 30_000_000
    client.writer.write(head(size) + sized(size, STREAMED))
    assert (await client.head()).status == 200
    assert await client.chunk() == EVENT
    assert held(stand) == size
    release.set()
    await eventually(lambda: held(stand) == 0)
    engine.close()


# ---- told


async def test_the_gauges_tell_it(make_stand: Any, eventually: Any, open_connection: Any) -> None:
    stand = await make_stand(max_body_memory_bytes=1_000_000)
    half = await open_connection(stand.gateway.url)
    half.writer.write(head(300_000) + b"x" * 200_000)
    await eventually(lambda: held(stand) == 200_000)
    _, text = make_exporter(stand.manager).render()
    assert b"control_plane_body_memory_bytes 200000.0\n" in text
    assert b"control_plane_body_memory_max_bytes 1e+06\n" in text


# ---- all of it at random


@pytest.mark.parametrize("seed", range(3))
async def test_no_way_to_end_leaks(make_stand: Any, eventually: Any, seed: int) -> None:
    random = Random(seed)
    limit = 2_000_000
    stand = await make_stand(
        engines=2,
        max_body_memory_bytes=limit,
        queue_max_requests=6,
        seed=seed,
        gateway_options={"limits": ServerLimits(body_timeout_s=0.2, linger_s=0.05)},
    )
    for instance in stand.manager.get_instances():
        instance.max_concurrent_requests = 3
    lowest, highest = 0, 0

    def look() -> None:
        nonlocal lowest, highest
        lowest, highest = min(lowest, held(stand)), max(highest, held(stand))

    def engine(exchange: Exchange) -> None:
        look()
        loop = asyncio.get_running_loop()
        fate = random.randrange(6)
        if fate == 0:
            loop.call_later(random.random() / 20, exchange.abort)
        elif fate == 1:
            exchange.respond(random.choice((400, 429, 500)), [], b"{}")
        elif fate == 2:
            exchange.start(200, [(b"content-type", b"text/event-stream")])
            exchange.write(EVENT)
            loop.call_later(random.random() / 20, lambda: None if exchange.finished else exchange.end(b"data: [DONE]\n\n"))
        else:
            loop.call_later(random.random() / 20, lambda: None if exchange.finished else answers(exchange))

    for one in stand.engines:
        one.answer = engine
    where = urlsplit(stand.gateway.url)
    codes: set[bytes] = set()

    async def client() -> None:
        reader, writer = await asyncio.open_connection(where.hostname, where.port)
        try:
            for _ in range(random.randrange(1, 4)):
                size = random.choice((200, 20_000, 100_000, 400_000, 800_000))
                start = random.choice((ASKED, STREAMED, b'{"model":"no","prompt":"', b"{"))
                whole = head(size) + sized(size, start)
                fate = random.randrange(8)
                if fate == 0:  # half sent, and left or left standing
                    writer.write(whole[: random.randrange(len(whole))])
                    await asyncio.sleep(random.random() / 5)
                    if random.random() < 0.7:
                        return
                elif fate == 1:  # several behind one another
                    writer.write(whole + head(200) + sized(200) + whole)
                elif fate == 2:  # piece by piece
                    for at in range(0, len(whole), 60_000):
                        writer.write(whole[at : at + 60_000])
                        await asyncio.sleep(0.002)
                else:
                    writer.write(whole)
                if fate == 3:
                    await asyncio.sleep(random.random() / 20)
                    return
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(0.5):
                        codes.add((await reader.read(65_536))[:12])
                look()
        except OSError:
            pass
        finally:
            writer.close()

    for _ in range(4):
        await asyncio.gather(*(client() for _ in range(25)))
    await eventually(lambda: stand.gateway.open_requests == 0 and held(stand) == 0, 10)
    assert lowest == 0
    assert 1_000_000 < highest <= limit
    assert b"HTTP/1.1 503" in codes
    assert b"HTTP/1.1 200" in codes
