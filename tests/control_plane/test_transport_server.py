"""The server against real sockets: what it serves, what it refuses and how, and that no byte disturbs what comes after."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import socket
import ssl
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from localhost_certificate import CERTIFICATE, PRIVATE_KEY
from transport_rig import LOOPS, Kept, ask, echo, raw_socket, run, serving, until

from control_plane.transport import Exchange, HttpServer, ServerLimits

pytestmark = pytest.mark.parametrize("loop", LOOPS)

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
CLOSE = b"Connection: close\r\n"
CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


def statuses(answer: bytes) -> list[int]:
    """The status codes of the answers in a byte stream."""
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]


def posted(*lines: bytes, body: bytes = b"abc", version: bytes = b"1.1", target: bytes = b"/") -> bytes:
    return b"POST %b HTTP/%b\r\nHost: a\r\n%b\r\n%b" % (target, version, b"".join(line + b"\r\n" for line in lines), body)


REFUSED: dict[str, tuple[bytes, int]] = {
    "both lengths": (posted(b"Content-Length: 3", b"Transfer-Encoding: chunked"), 400),
    "both lengths, the other way": (posted(b"Transfer-Encoding: chunked", b"Content-Length: 3"), 400),
    "two lengths": (posted(b"Content-Length: 3", b"Content-Length: 4"), 400),
    "two equal lengths": (posted(b"Content-Length: 3", b"Content-Length: 3"), 400),
    "a list of lengths": (posted(b"Content-Length: 3, 3"), 400),
    "signed length": (posted(b"Content-Length: +3"), 400),
    "negative length": (posted(b"Content-Length: -3"), 400),
    "hexadecimal length": (posted(b"Content-Length: 0x3"), 400),
    "empty length": (posted(b"Content-Length: "), 400),
    "length beyond 64 bits": (posted(b"Content-Length: 99999999999999999999999"), 400),
    "length with a gap": (posted(b"Content-Length: 3 4"), 400),
    "unknown encoding": (posted(b"Transfer-Encoding: gzip"), 501),
    "encodings, chunked last": (posted(b"Transfer-Encoding: gzip, chunked"), 501),
    "encodings, chunked first": (posted(b"Transfer-Encoding: chunked, gzip"), 400),
    "chunked misspelt": (posted(b"Transfer-Encoding: xchunked"), 501),
    "chunked quoted": (posted(b'Transfer-Encoding: "chunked"'), 501),
    "chunked after a control byte": (posted(b"Transfer-Encoding: \x0bchunked"), 400),
    "chunked twice": (posted(b"Transfer-Encoding: chunked", b"Transfer-Encoding: chunked"), 400),
    "chunked on a folded line": (posted(b"Transfer-Encoding:", b" chunked"), 400),
    "chunked in HTTP/1.0": (posted(b"Transfer-Encoding: chunked", version=b"1.0", body=b"0\r\n\r\n"), 400),
    "chunk size with a prefix": (CHUNKED + b"0x3\r\nabc\r\n0\r\n\r\n", 400),
    "chunk size negative": (CHUNKED + b"-3\r\nabc\r\n0\r\n\r\n", 400),
    "chunk size missing": (CHUNKED + b"\r\nabc\r\n0\r\n\r\n", 400),
    "chunk size beyond 64 bits": (CHUNKED + b"fffffffffffffffff\r\nabc\r\n0\r\n\r\n", 400),
    "chunk size with a blank": (CHUNKED + b"3 \r\nabc\r\n0\r\n\r\n", 400),
    "chunk size ended by LF": (CHUNKED + b"3\nabc\r\n0\r\n\r\n", 400),
    "chunk longer than its size": (CHUNKED + b"3\r\nabcd\r\n0\r\n\r\n", 400),
    "chunk ended by LF": (CHUNKED + b"3\r\nabc\n0\r\n\r\n", 400),
    "chunk extension with LF": (CHUNKED + b"3;a\nb\r\nabc\r\n0\r\n\r\n", 400),
    "length in a trailer": (CHUNKED + b"3\r\nabc\r\n0\r\nContent-Length: 3\r\n\r\n", 400),
    "trailer with a blank before its colon": (CHUNKED + b"3\r\nabc\r\n0\r\nX : 1\r\n\r\n", 400),
    "blank before a colon": (b"GET / HTTP/1.1\r\nHost : a\r\n\r\n", 400),
    "folded header": (b"GET / HTTP/1.1\r\nHost: a\r\nX: b\r\n c\r\n\r\n", 400),
    "header before any other folded": (b"GET / HTTP/1.1\r\n Host: a\r\n\r\n", 400),
    "LF after the request line": (b"GET / HTTP/1.1\nHost: a\r\n\r\n", 400),
    "LF after a header": (b"GET / HTTP/1.1\r\nHost: a\n\r\n", 400),
    "LF as the empty line": (b"GET / HTTP/1.1\r\nHost: a\r\n\n", 400),
    "CR inside a value": (b"GET / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n", 400),
    "NUL inside a value": (b"GET / HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n", 400),
    "control byte inside a value": (b"GET / HTTP/1.1\r\nHost: a\r\nX: a\x01b\r\n\r\n", 400),
    "header without a name": (b"GET / HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n", 400),
    "header without a colon": (b"GET / HTTP/1.1\r\nHost: a\r\nX\r\n\r\n", 400),
    "header name beyond ASCII": (b"GET / HTTP/1.1\r\nHost: a\r\nX\xe9: 1\r\n\r\n", 400),
    "no host": (b"GET / HTTP/1.1\r\n\r\n", 400),
    "two hosts": (b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", 400),
    "host that is none": (b"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
    "host with a path": (b"GET / HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
    "NUL in the target": (b"GET /\0 HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "raw bytes in the target": (b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "blank in the target": (b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "fragment in the target": (b"GET /#a HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "target without a slash": (b"GET a HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "target of another scheme": (b"GET ftp://a/ HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "asterisk with GET": (b"GET * HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "HTTP/2.0": (b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", 505),
    "HTTP/1.2": (b"GET / HTTP/1.2\r\nHost: a\r\n\r\n", 505),
    "HTTP/0.9": (b"GET /\r\n\r\n", 505),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "version in lower case": (b"GET / http/1.1\r\nHost: a\r\n\r\n", 400),
    "CONNECT": (b"CONNECT a:80 HTTP/1.1\r\nHost: a\r\n\r\n", 501),
    "a method of another protocol": (b"PROPFIND / HTTP/1.1\r\nHost: a\r\n\r\n", 501),
    "no method": (b"FOO / HTTP/1.1\r\nHost: a\r\n\r\n", 400),
    "TLS at a plain port": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
    "an answer": (b"HTTP/1.1 200 OK\r\n\r\n", 400),
    "another expectation": (posted(b"Content-Length: 3", b"Expect: 200-ok"), 417),
    "too many headers": (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"a: b\r\n" * 200 + b"\r\n", 431),
    "header too long": (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 70_000 + b"\r\n\r\n", 431),
    "target too long": (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 431),
    "body too long by its length": (posted(b"Content-Length: 100001"), 413),
    "body too long by its chunks": (CHUNKED + b"fff0\r\n" + b"x" * 0xFFF0 + b"\r\nfff0\r\n" + b"x" * 0xFFF0 + b"\r\n0\r\n\r\n", 413),
    "endless trailers": (CHUNKED + b"1\r\na\r\n0\r\nX: " + b"x" * 500_000, 431),
    "endless chunk extension": (CHUNKED + b"1;" + b"x" * 500_000, 431),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_openai_shape_and_closed(loop: str, case: str) -> None:
    request, status = REFUSED[case]

    async def scenario() -> None:
        kept = Kept()
        told: list[tuple[int, str, str]] = []
        limits = ServerLimits(max_body_bytes=100_000, linger_s=0.2)
        async with serving(kept, limits, reject=lambda *refused: told.append(refused)) as server:
            # a valid request behind it must never be read as one
            answer = await ask(server.port, request, GET)
            head, _, body = answer.partition(b"\r\n\r\n")
            assert statuses(answer) == [status]
            assert b"connection: close" in head
            error = json.loads(body)["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert kept.exchanges == []
            assert [(refused[0], refused[1]) for refused in told] == [(status, error["code"])]

    run(loop, scenario())


SERVED: dict[str, tuple[bytes, bytes]] = {
    "length with blanks behind it": (posted(b"Content-Length: 3 \t", CLOSE[:-2]), b"POST / abc"),
    "length with leading zeros": (posted(b"Content-Length: 0003", CLOSE[:-2]), b"POST / abc"),
    "chunked in capitals": (posted(b"Transfer-Encoding: CHUNKED", CLOSE[:-2], body=b"3\r\nabc\r\n0\r\n\r\n"), b"POST / abc"),
    "chunks, extensions and trailers": (
        posted(b"Transfer-Encoding: chunked", CLOSE[:-2], body=b"3;a=b\r\nabc\r\nA\r\n0123456789\r\n0\r\nX-T: 1\r\n\r\n"),
        b"POST / abc0123456789",
    ),
    "empty lines before the request": (b"\r\n\r\nGET / HTTP/1.1\r\nHost: a\r\n" + CLOSE + b"\r\n", b"GET / "),
    "absolute target": (b"GET http://x:1/y?z HTTP/1.1\r\nHost: a\r\n" + CLOSE + b"\r\n", b"GET http://x:1/y?z "),
    "HTTP/1.0 without a host": (b"GET / HTTP/1.0\r\n\r\n", b"GET / "),
    "upgrade ignored": (posted(b"Connection: upgrade, close", b"Upgrade: h2c", b"Content-Length: 3"), b"POST / abc"),
    "upgrade with a chunked body": (
        posted(b"Connection: close, Upgrade", b"Upgrade: websocket", b"Transfer-Encoding: chunked", body=b"3\r\nabc\r\n0\r\n\r\n"),
        b"POST / abc",
    ),
    "asterisk with OPTIONS": (b"OPTIONS * HTTP/1.1\r\nHost: a\r\n" + CLOSE + b"\r\n", b"OPTIONS * "),
    "IPv6 host": (b"GET / HTTP/1.1\r\nHost: [::1]:80\r\n" + CLOSE + b"\r\n", b"GET / "),
    "bytes behind a closing request": (b"GET / HTTP/1.1\r\nHost: a\r\n" + CLOSE + b"\r\nGET /other HTTP/1.1\r\n\r\n", b"GET / "),
}


@pytest.mark.parametrize("case", SERVED)
@pytest.mark.parametrize("split", [False, True], ids=["whole", "bytewise"])
def test_served(loop: str, case: str, split: bool) -> None:
    request, body = SERVED[case]

    async def scenario() -> None:
        async with serving(echo) as server:
            pieces = [request[at : at + 1] for at in range(len(request))] if split else [request]
            answer = await ask(server.port, *pieces)
            assert statuses(answer) == [200]
            assert answer.partition(b"\r\n\r\n")[2] == body

    run(loop, scenario())


def test_what_the_handler_sees(loop: str) -> None:
    async def scenario() -> None:
        kept = Kept()
        async with serving(kept) as server:
            async with raw_socket(server.port) as (reader, writer):
                writer.write(b"POST http://h/a%20b?x=1&y HTTP/1.1\r\nHoSt: a\r\nX-Two: 1\r\nx-two:  2 \r\nContent-Length: 2\r\n\r\nhi")
                await until(lambda: kept.exchanges)
                exchange = kept.exchanges[0]
                assert (exchange.method, exchange.target) == ("POST", b"http://h/a%20b?x=1&y")
                assert (exchange.path, exchange.query, exchange.body) == ("/a%20b", b"x=1&y", b"hi")
                assert exchange.headers == [(b"host", b"a"), (b"x-two", b"1"), (b"x-two", b"2"), (b"content-length", b"2")]
                assert exchange.header(b"x-two") == b"1"
                assert exchange.header(b"x-three") is None
                assert (exchange.peer, exchange.tls, exchange.keep_alive) == ("127.0.0.1", False, True)
                assert abs(exchange.received_s - asyncio.get_running_loop().time()) < 5
                assert (server.connections, server.open_exchanges) == (1, 1)
                exchange.respond(200, (), b"")
                assert exchange.finished
                assert server.open_exchanges == 0
                assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
            await until(lambda: server.connections == 0)

    run(loop, scenario())


def test_keep_alive_and_pipelining_keep_the_order(loop: str) -> None:
    async def scenario() -> None:
        kept = Kept()
        async with serving(kept) as server, raw_socket(server.port) as (reader, writer):
            for index in range(3):
                writer.write(b"POST /%d HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n%d" % (index, index))
            for index in range(3):
                await until(lambda index=index: len(kept.exchanges) == index + 1)
                assert server.open_exchanges == 1
                await asyncio.sleep(0.01)
                assert len(kept.exchanges) == index + 1
                exchange = kept.exchanges[index]
                exchange.respond(200, (), exchange.path.encode() + exchange.body)
            received = await reader.readexactly(3 * len(b"HTTP/1.1 200 OK\r\ncontent-length: 3\r\n\r\n/0x"))
            assert [part[-3:] for part in received.split(b"HTTP/1.1")[1:]] == [b"/00", b"/11", b"/22"]

    run(loop, scenario())


def test_a_refusal_waits_for_the_answers_before_it(loop: str) -> None:
    async def scenario() -> None:
        kept = Kept()
        async with serving(kept, ServerLimits(linger_s=0.2)) as server, raw_socket(server.port) as (reader, writer):
            writer.write(GET + GET + b"garbage\r\n\r\n" + GET)
            await until(lambda: kept.exchanges)
            kept.exchanges[0].respond(200, (), b"first")
            await until(lambda: len(kept.exchanges) == 2)
            kept.exchanges[1].start(200, ())
            kept.exchanges[1].write(b"second")
            await asyncio.sleep(0.01)
            kept.exchanges[1].end()
            assert statuses(await reader.read()) == [200, 200, 400]
            assert len(kept.exchanges) == 2

    run(loop, scenario())


def test_too_many_pipelined_requests_end_the_connection_behind_the_last_one_taken(loop: str) -> None:
    async def scenario() -> None:
        kept = Kept()
        async with serving(kept, ServerLimits(max_pipelined=4, linger_s=0.2)) as server, raw_socket(server.port) as (reader, writer):
            writer.write(GET * 1000)
            for index in range(5):
                await until(lambda index=index: len(kept.exchanges) == index + 1)
                kept.exchanges[index].respond(200, (), b"")
            answers = await reader.read()
            assert statuses(answers) == [200] * 5
            assert answers.count(b"connection: close") == 1
            assert len(kept.exchanges) == 5

    run(loop, scenario())


def test_pipelining_behind_a_client_that_does_not_read_stops(loop: str) -> None:
    """Answers are not piled up in memory for a client that asks and never reads."""

    async def scenario() -> None:
        served = 0
        body = b"x" * 50_000

        def handler(exchange: Exchange) -> None:
            nonlocal served
            served += 1
            exchange.respond(200, (), body)

        async with serving(handler, ServerLimits(write_timeout_s=0.3)) as server:
            async with raw_socket(server.port) as (reader, writer):
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


def test_expect_continue(loop: str) -> None:
    async def scenario() -> None:
        async with serving(echo) as server, raw_socket(server.port) as (reader, writer):
            head = b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-Continue\r\nContent-Length: %d\r\n\r\n"
            writer.write(head % 3)
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(b"abc")
            assert (await reader.readuntil(b"POST / abc")).startswith(b"HTTP/1.1 200")
            # nothing to wait for, nothing to say
            writer.write(head % 0)
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")

    run(loop, scenario())


def test_continue_is_not_mixed_into_an_answer(loop: str) -> None:
    async def scenario() -> None:
        kept = Kept()
        async with serving(kept) as server, raw_socket(server.port) as (reader, writer):
            writer.write(GET + b"POST / HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n")
            await until(lambda: kept.exchanges)
            exchange = kept.exchanges[0]
            exchange.start(200, ())
            exchange.write(b"a")
            await asyncio.sleep(0.02)
            exchange.write(b"b")
            exchange.end()
            received = await reader.readuntil(b"Continue\r\n\r\n")
            assert received.endswith(b"1\r\na\r\n1\r\nb\r\n0\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n")
            writer.write(b"abc")
            await until(lambda: len(kept.exchanges) == 2)
            assert kept.exchanges[1].body == b"abc"

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


@pytest.mark.parametrize("request_part", [GET[:9], posted(b"Content-Length: 9"), CHUNKED + b"3\r\nab"], ids=["head", "body", "chunk"])
def test_a_request_that_ends_early(loop: str, request_part: bytes) -> None:
    async def scenario() -> None:
        kept = Kept()
        async with serving(kept) as server:
            assert statuses(await ask(server.port, request_part, half_close=True)) == [400]
            assert kept.exchanges == []

    run(loop, scenario())


def test_slow_requests_time_out_and_idle_connections_close(loop: str) -> None:
    async def scenario() -> None:
        limits = ServerLimits(header_timeout_s=0.15, body_timeout_s=0.15, idle_timeout_s=0.15, linger_s=0.1)
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
                await asyncio.sleep(0.05)
                writer.close()
                assert (await read).count(b"2710\r\n") == written
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


def test_bodies_of_all_lengths_behind_each_other(loop: str) -> None:
    async def scenario() -> None:
        async with serving(lambda exchange: exchange.respond(200, (), b"%d " % len(exchange.body) + exchange.body[-5:])) as server:
            async with raw_socket(server.port) as (reader, writer):
                for size in (0, 1, 65_535, 65_536, 65_537, 300_000, 2_000_000, 3):
                    body = (b"0123456789" * (size // 10 + 1))[:size]
                    both = posted(b"Content-Length: %d" % size, body=body) + CHUNKED + b"1\r\nx\r\n0\r\n\r\n"
                    writer.write(both)
                    expected = b"%d " % size + body[-5:]
                    assert (await reader.readuntil(expected)).endswith(b"\r\n\r\n" + expected)
                    assert (await reader.readuntil(b"1 x")).startswith(b"HTTP/1.1 200")

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
        async with serving(echo, ServerLimits(max_body_bytes=1000, linger_s=0.5)) as server:
            async with raw_socket(server.port) as (reader, writer):
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
            try:
                assert await stuck.read() == b""
            except ConnectionResetError:
                pass

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
            accepted = kept.exchanges[0]._connection.transport.get_extra_info("socket")
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)

    run(loop, scenario())


PIPELINE = (
    b"\r\nGET /a?b HTTP/1.1\r\nHost: a\r\nX-Long: " + b"v" * 300 + b" \r\n\r\n",
    posted(b"Content-Length: 5", body=b"hello"),
    CHUNKED + b"5;x=y\r\nhello\r\n6\r\n world\r\n0\r\nT: 1\r\n\r\n",
    posted(b"Connection: Upgrade", b"Upgrade: websocket", b"Content-Length: 4", body=b"GET "),
    posted(b"Content-Length: 70000", body=b"z" * 70_000),
    b"HEAD http://x HTTP/1.1\r\nHost: a\r\n\r\n",
    posted(b"Transfer-Encoding: chunked", b"Connection: close", body=b"0\r\n\r\n"),
)


@given(order=st.permutations(range(6)), cuts=st.lists(st.integers(0, 71_500), max_size=12))
@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_splitting_changes_nothing(loop: str, order: list[int], cuts: list[int]) -> None:
    stream = b"".join(PIPELINE[index] for index in [*order, 6])
    borders = sorted({0, len(stream), *(cut for cut in cuts if cut < len(stream))})
    pieces = [stream[a:b] for a, b in zip(borders, borders[1:], strict=False)]

    async def scenario() -> None:
        async def answers(*sent: bytes) -> bytes:
            async with serving(echo) as server, raw_socket(server.port) as (reader, writer):
                for piece in sent:
                    writer.write(piece)
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
                return await reader.read()

        whole = await answers(stream)
        assert statuses(whole) == [200] * 7
        assert await answers(*pieces) == whole

    run(loop, scenario())
