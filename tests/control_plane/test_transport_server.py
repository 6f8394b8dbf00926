"""The server's connections: answers in all their forms, clients that leave, hang, never read or are too many, and stopping."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import ssl
import struct
from pathlib import Path

import pytest
from localhost_certificate import CERTIFICATE, PRIVATE_KEY
from transport_rig import CLOSE, GET, LOOPS, Kept, ask, echo, posted, raw_socket, run, serving, statuses, until

from control_plane.transport import Exchange, HttpServer, ServerLimits

pytestmark = pytest.mark.parametrize("loop", LOOPS)


def test_pipelining_behind_a_client_that_does_not_read_stops(loop: str) -> None:
    """Answers are not piled up in memory for a client that asks and never reads."""

    async def scenario() -> None:
        served = 0
        body = b"x" * 50_000

        def handler(exchange: Exchange) -> None:
            nonlocal served
            served += 1
            exchange.respond(200, (), body)

        async with serving(handler, ServerLimits(write_timeout_s=0.3)) as server, raw_socket(server.port) as (_reader, writer):
            writer.transport.pause_reading()
            for _ in range(50):
                writer.write(GET * 100)
                await asyncio.sleep(0)
            await asyncio.sleep(0.15)
            assert 0 < served < 400
            # and a client that never reads again is dropped
            await until(lambda: server.connections == 0)

    run(loop, scenario())


def test_http10(loop: str) -> None:
    async def scenario() -> None:
        kept = Kept()
        async with serving(kept) as server, raw_socket(server.port) as (reader, writer):
            writer.write(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
            await until(lambda: kept.exchanges)
            kept.exchanges[0].respond(200, (), b"ab")
            expected = b"HTTP/1.1 200 OK\r\nconnection: keep-alive\r\ncontent-length: 2\r\n\r\nab"
            assert await reader.readexactly(len(expected)) == expected
            writer.write(b"GET / HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
            await until(lambda: len(kept.exchanges) == 2)
            kept.exchanges[1].start(200, ())
            kept.exchanges[1].write(b"one")
            kept.exchanges[1].write(b"two")
            kept.exchanges[1].end()
            assert (await reader.read()).endswith(b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nonetwo")

    run(loop, scenario())


def test_bodiless_answers(loop: str) -> None:
    def handler(exchange: Exchange) -> None:
        kind = exchange.path[1:]
        if kind == "respond":
            exchange.respond(200, (), b"body")
        elif kind == "204":
            exchange.respond(204, (), b"body")
        else:
            exchange.start(304 if kind == "304" else 200, (), 4 if kind == "length" else None)
            exchange.write(b"body")
            exchange.end()

    async def scenario() -> None:
        async with serving(handler) as server, raw_socket(server.port) as (reader, writer):
            for target in (b"HEAD /respond", b"HEAD /length", b"HEAD /chunked", b"GET /204", b"GET /304"):
                writer.write(target + b" HTTP/1.1\r\nHost: a\r\n\r\n")
                head = await reader.readuntil(b"\r\n\r\n")
                assert head.startswith(b"HTTP/1.1 ")
                expected = target in (b"HEAD /respond", b"HEAD /length")
                assert (b"content-length: 4" in head) is expected
                assert b"transfer-encoding" not in head

    run(loop, scenario())


def test_streaming_head_is_held_back_until_the_first_byte(loop: str) -> None:
    async def scenario() -> None:
        kept = Kept()
        async with serving(kept) as server, raw_socket(server.port) as (reader, writer):
            writer.write(GET + GET)
            await until(lambda: kept.exchanges)
            exchange = kept.exchanges[0]
            exchange.start(200, ((b"content-type", b"text/event-stream"), (b"content-length", b"7"), (b"connection", b"close")))
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(reader.readexactly(1), 0.03)
            exchange.write(b"")
            exchange.write(b"data: 1\n\n")
            large = b"y" * 100_000
            exchange.write(large)
            exchange.end(b"last")
            head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
            expected = head + b"9\r\ndata: 1\n\n\r\n186a0\r\n" + large + b"\r\n4\r\nlast\r\n0\r\n\r\n"
            assert await reader.readexactly(len(expected)) == expected
            await until(lambda: len(kept.exchanges) == 2)
            kept.exchanges[1].start(200, ())
            kept.exchanges[1].flush_head()
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")

    run(loop, scenario())


def test_announced_length_is_kept_or_the_connection_dropped(loop: str) -> None:
    async def scenario() -> None:
        kept = Kept()
        async with serving(kept) as server:
            for pieces, whole in (([b"ab", b"cd"], True), ([b"ab"], False), ([b"abcd", b"e"], False), ([b"x" * 70_000], False)):
                async with raw_socket(server.port) as (reader, writer):
                    writer.write(GET)
                    await until(lambda: kept.exchanges)
                    exchange = kept.exchanges.pop()
                    exchange.start(200, (), 4)
                    try:
                        for piece in pieces:
                            exchange.write(piece)
                    except ValueError:
                        assert sum(map(len, pieces)) > 4
                    exchange.end()
                    assert exchange.finished
                    if whole:
                        assert (await reader.readuntil(b"abcd")).endswith(b"\r\n\r\nabcd")
                    else:
                        try:
                            received = await reader.read()
                        except ConnectionResetError:
                            received = b""
                        assert len(received.partition(b"\r\n\r\n")[2]) < 4 or pieces == [b"abcd", b"e"]
            assert kept.left == []

    run(loop, scenario())


def test_wrong_order_of_calls(loop: str) -> None:
    async def scenario() -> None:
        kept = Kept()
        async with serving(kept) as server, raw_socket(server.port) as (reader, writer):
            writer.write(GET)
            await until(lambda: kept.exchanges)
            exchange = kept.exchanges[0]
            with pytest.raises(RuntimeError):
                exchange.write(b"x")
            with pytest.raises(RuntimeError):
                exchange.end()
            for bad in ((b"x", b"1\r\nset-cookie: 2"), (b"x", b"1\n"), (b"x\r", b"1")):
                with pytest.raises(ValueError, match="line break"):
                    exchange.respond(200, (bad,), b"")
            assert not exchange.started
            exchange.respond(200, (), b"")
            with pytest.raises(RuntimeError):
                exchange.respond(200, (), b"")
            exchange.write(b"late")
            exchange.end()
            exchange.abort()
            writer.write(GET.replace(b"Host", b"Connection: close\r\nHost"))
            await until(lambda: len(kept.exchanges) == 2)
            kept.exchanges[1].respond(599, (), b"")
            assert statuses(await reader.read()) == [200, 599]

    run(loop, scenario())


def test_a_client_that_leaves_is_noticed(loop: str) -> None:
    async def scenario() -> None:
        kept = Kept()
        async with serving(kept) as server:
            # waiting for an answer; an answer under way; by a reset
            for stage in ("unstarted", "held", "streaming", "reset"):
                _, writer = await asyncio.open_connection("127.0.0.1", server.port)
                writer.write(GET)
                await until(lambda: kept.exchanges)
                exchange = kept.exchanges.pop()
                if stage in ("held", "streaming"):
                    exchange.start(200, ())
                if stage == "streaming":
                    exchange.write(b"x")
                await asyncio.sleep(0.02)
                if stage == "reset":
                    raw = writer.get_extra_info("socket")
                    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                writer.close()
                await until(lambda exchange=exchange: kept.left == [exchange], 2.0)
                assert exchange.finished
                exchange.write(b"dropped")
                exchange.end()
                kept.left.clear()
            assert server.open_exchanges == 0

    run(loop, scenario())


def test_a_half_closed_client_gets_its_answer(loop: str) -> None:
    async def scenario() -> None:
        kept = Kept()
        async with serving(kept) as server, raw_socket(server.port) as (reader, writer):
            writer.write(GET)
            writer.write_eof()
            await until(lambda: kept.exchanges)
            await asyncio.sleep(0.6)
            assert kept.left == []
            exchange = kept.exchanges[0]
            exchange.start(200, ())
            for _ in range(3):
                exchange.write(b"ab")
                await asyncio.sleep(0.01)
            exchange.end()
            answer = await reader.read()
            assert set(statuses(answer)) == {100, 200}
            assert statuses(answer)[-1] == 200
            assert answer.endswith(b"2\r\nab\r\n0\r\n\r\n")

    run(loop, scenario())


def test_slow_requests_time_out_and_idle_connections_close(loop: str) -> None:
    async def scenario() -> None:
        limits = ServerLimits(header_timeout_s=0.5, body_timeout_s=0.5, idle_timeout_s=0.5, linger_s=0.1)
        async with serving(echo, limits) as server:
            trickle = [b"GET / HTTP/1.1\r\n", *[b"a: b\r\n"] * 40]
            slow_head = ask(server.port, GET[:-2])
            slow_body = ask(server.port, posted(b"Content-Length: 9"))
            steady = ask(server.port, posted(b"Content-Length: 9", CLOSE[:-2], body=b""), *[b"x"] * 9, pause_s=0.06)
            idle, used = ask(server.port), ask(server.port, GET)
            answers = await asyncio.gather(slow_head, slow_body, idle, used, steady, trickling(server.port, trickle))
            assert [statuses(answer) for answer in answers] == [[408], [408], [], [200], [200], [408]]
            assert b'"code":"timeout"' in answers[0]

    run(loop, scenario())


async def trickling(port: int, pieces: list[bytes]) -> bytes:
    """A head that grows all the time and never ends."""
    async with raw_socket(port) as (reader, writer):
        answer = asyncio.ensure_future(reader.read())
        for piece in pieces:
            if answer.done() or writer.is_closing():
                break
            writer.write(piece)
            await asyncio.sleep(0.02)
        return await answer


def test_backpressure(loop: str) -> None:
    async def scenario() -> None:
        kept = Kept()
        calls: list[str] = []
        async with serving(kept, ServerLimits(write_buffer_high_bytes=65_536, write_timeout_s=0.4)) as server:
            async with raw_socket(server.port) as (reader, writer):
                writer.transport.pause_reading()
                writer.write(GET)
                await until(lambda: kept.exchanges)
                exchange = kept.exchanges.pop()
                exchange.on_pause = lambda: calls.append("pause")
                exchange.on_resume = lambda: calls.append("resume")
                exchange.start(200, ())
                written = 0
                while not calls:
                    exchange.write(b"x" * 10_000)
                    written += 1
                    await asyncio.sleep(0)
                    assert written < 2_000
                writer.transport.resume_reading()
                read = asyncio.ensure_future(reader.read())
                await until(lambda: calls == ["pause", "resume"])
                exchange.keep_alive = False
                exchange.end()
                assert (await read).count(b"2710\r\n") == written  # to its end: the server closes behind it
                writer.close()
            # a client that takes nothing more is dropped
            async with raw_socket(server.port) as (reader, writer):
                writer.transport.pause_reading()
                writer.write(GET)
                await until(lambda: kept.exchanges)
                exchange = kept.exchanges.pop()
                exchange.start(200, ())
                for _ in range(2_000):
                    exchange.write(b"x" * 10_000)
                await until(lambda: exchange.finished)

    run(loop, scenario())


@pytest.mark.parametrize("chunk_bytes", [1_000, 8_192, 300_000])
def test_a_chunked_body_may_come_in_reads_of_any_size(loop: str, chunk_bytes: int) -> None:
    """Only reads without a byte of it are counted as chunk extensions and trailers."""

    async def scenario() -> None:
        chunk = b"%x\r\n%b\r\n" % (chunk_bytes, b"x" * chunk_bytes)
        count = 900_000 // chunk_bytes
        async with serving(echo) as server:
            answer = await ask(server.port, posted(b"Transfer-Encoding: chunked", b"Connection: close", body=chunk * count + b"0\r\n\r\n"))
            assert statuses(answer) == [200]
            assert answer.count(b"x" * 1_000) == chunk_bytes * count // 1_000

    run(loop, scenario())


def test_unfinished_bodies_have_a_common_bound(loop: str) -> None:
    async def scenario() -> None:
        async with serving(echo, ServerLimits(max_receiving_bytes=1_000_000, linger_s=0.2)) as server:
            async with raw_socket(server.port) as (_, first):
                first.write(posted(b"Content-Length: 900000", body=b"x" * 800_000))
                await until(lambda: server.receiving.total_bytes >= 800_000)
                answer = await ask(server.port, posted(b"Content-Length: 900000", body=b"x" * 300_000))
                assert statuses(answer) == [503]
                assert b"retry-after: 1" in answer
            await until(lambda: server.receiving.total_bytes == 0)

    run(loop, scenario())


def test_a_refused_client_that_keeps_sending_can_read_why(loop: str) -> None:
    async def scenario() -> None:
        limits = ServerLimits(max_body_bytes=1000, linger_s=0.5)
        async with serving(echo, limits) as server, raw_socket(server.port) as (reader, writer):
            writer.write(posted(b"Content-Length: 3000000", body=b"x" * 3_000_000))
            assert statuses(await reader.read()) == [413]

    run(loop, scenario())


def test_too_many_connections(loop: str) -> None:
    async def scenario() -> None:
        async with serving(echo, ServerLimits(max_connections=2, linger_s=0.2)) as server:
            async with raw_socket(server.port), raw_socket(server.port):
                await until(lambda: server.connections == 2)
                answer = await ask(server.port)
                assert statuses(answer) == [503]
                assert b"retry-after: 1" in answer
            await until(lambda: server.connections == 0)
            assert statuses(await ask(server.port, GET, half_close=True)) == [200]

    run(loop, scenario())


@pytest.mark.parametrize("secure", [False, True], ids=["plain", "TLS"])
def test_a_connection_with_too_high_a_descriptor_is_refused(loop: str, secure: bool, tmp_path: Path) -> None:
    asking = None
    serving_options: dict[str, ssl.SSLContext] = {}
    if secure:
        (tmp_path / "cert.pem").write_text(CERTIFICATE)
        (tmp_path / "key.pem").write_text(PRIVATE_KEY)
        serving_options["ssl"] = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        serving_options["ssl"].load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
        asking = ssl.create_default_context(cadata=CERTIFICATE)

    async def one(port: int) -> list[int]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=asking)
        with contextlib.suppress(OSError):  # it may be refused before it has asked
            writer.write(posted(CLOSE[:-2], b"Content-Length: 3"))
        try:
            return statuses(await reader.read())
        finally:
            writer.close()

    async def scenario() -> None:
        async with serving(echo, ServerLimits(max_descriptor=100_000), **serving_options) as server:
            assert await one(server.port) == [200]
            assert server.turned_away == 0
        # as if 60 others were open: of those above, a sixteenth is told so
        async with serving(echo, ServerLimits(max_descriptor=60, linger_s=0.2), **serving_options) as server:
            held = [os.dup(0) for _ in range(60)]
            try:
                with contextlib.suppress(OSError):
                    assert await one(server.port) in ([], [503])
                assert server.turned_away == 1
            finally:
                for descriptor in held:
                    os.close(descriptor)
        async with serving(echo, ServerLimits(max_descriptor=10_000), **serving_options) as server:
            assert await one(server.port) == [200]

    run(loop, scenario())


def test_a_failing_handler(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    def handler(exchange: Exchange) -> None:
        if exchange.path == "/started":
            exchange.start(200, ())
            exchange.write(b"x")
        if exchange.path == "/left":
            exchange.on_disconnect = lambda: 1 / 0
            return
        raise KeyError("on purpose")

    async def scenario() -> None:
        async with serving(handler) as server:
            answer = await ask(server.port, GET)
            assert statuses(answer) == [500]
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "internal_error"
            try:
                answer = await ask(server.port, GET.replace(b"/ ", b"/started "))
            except ConnectionResetError:
                answer = b""
            assert not answer.endswith(b"0\r\n\r\n")
            async with raw_socket(server.port) as (_, writer):
                writer.write(GET.replace(b"/ ", b"/left "))
                await until(lambda: server.open_exchanges == 1)
            await until(lambda: server.connections == 0)

    with caplog.at_level(logging.CRITICAL + 1):
        run(loop, scenario())


def test_stop_lets_running_exchanges_end(loop: str) -> None:
    async def scenario() -> None:
        kept = Kept()
        server = HttpServer(kept)
        await server.start()
        async with raw_socket(server.port) as (reader, writer), raw_socket(server.port) as (stuck, other), raw_socket(server.port) as idle:
            writer.write(GET)
            other.write(GET)
            await until(lambda: len(kept.exchanges) == 2)
            stopping = asyncio.ensure_future(server.stop(0.5))
            assert await idle[0].read() == b""
            with pytest.raises(OSError, match="Connect"):
                await asyncio.open_connection("127.0.0.1", server.port)
            kept.exchanges[0].respond(200, (), b"done")
            assert b"connection: close" in await reader.read()
            await stopping
            assert kept.left == [kept.exchanges[1]]
            assert server.connections == 0
            with contextlib.suppress(ConnectionResetError):
                assert await stuck.read() == b""

    run(loop, scenario())


def test_tls_and_ipv6(loop: str, tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text(CERTIFICATE)
    (tmp_path / "key.pem").write_text(PRIVATE_KEY)
    serving_context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    serving_context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    asking_context = ssl.create_default_context(cadata=CERTIFICATE)

    async def scenario() -> None:
        kept = Kept()
        async with serving(kept, ssl=serving_context) as server:
            assert server.url == f"https://127.0.0.1:{server.port}"
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port, ssl=asking_context)
            writer.write(GET + b"garbage\r\n\r\n")
            await until(lambda: kept.exchanges)
            assert kept.exchanges[0].tls
            kept.exchanges[0].respond(200, (), b"secret")
            assert statuses(await reader.read()) == [200, 400]
            writer.close()
        server = HttpServer(echo)
        await server.start("::1")
        assert server.url == f"http://[::1]:{server.port}"
        reader, writer = await asyncio.open_connection("::1", server.port)
        writer.write(GET)
        assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        writer.close()
        await server.stop(0)

    run(loop, scenario())


def test_small_writes_are_not_delayed(loop: str) -> None:
    async def scenario() -> None:
        kept = Kept()
        async with serving(kept) as server, raw_socket(server.port) as (_, writer):
            writer.write(GET)
            await until(lambda: kept.exchanges)
            accepted = kept.exchanges[0]._channel.transport.get_extra_info("socket")
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    run(loop, scenario())
