"""Requests as bytes: what the server serves, what it refuses and how, and that no byte is taken for another request's."""

from __future__ import annotations

import asyncio
import itertools
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transport_rig import CLOSE, GET, LOOPS, Kept, ask, echo, posted, raw_socket, run, serving, statuses, until

from control_plane.transport import Exchange, Refused, ServerLimits
from control_plane.transport.wire import refusal_body

pytestmark = pytest.mark.parametrize("loop", LOOPS)


CHUNKED = b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"


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
    "chunked after another encoding of its own line": (posted(b"Transfer-Encoding: identity", b"Transfer-Encoding: chunked"), 400),
    "chunked after an encoding misspelt": (posted(b"Transfer-Encoding: chu", b"Transfer-Encoding: chunked"), 400),
    "length of thousands of digits": (posted(b"Content-Length: " + b"0" * 5000 + b"3"), 400),
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
        told: list[Refused] = []

        def refuse(refused: Refused) -> tuple[list[tuple[bytes, bytes]], bytes]:
            told.append(refused)
            return [(b"x-refused", b"yes")], refusal_body(refused.status, refused.code, refused.message)

        limits = ServerLimits(max_body_bytes=100_000, linger_s=0.2)
        async with serving(kept, limits, refuse=refuse) as server:
            # a valid request behind it must never be read as one
            answer = await ask(server.port, request, GET)
            head, _, body = answer.partition(b"\r\n\r\n")
            assert statuses(answer) == [status]
            assert b"connection: close" in head
            assert b"x-refused: yes" in head
            error = json.loads(body)["error"]
            assert set(error) == {"message", "type", "param", "code"}
            assert kept.exchanges == []
            assert [(refused.status, refused.code) for refused in told] == [(status, error["code"])]

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


@pytest.mark.parametrize("behind", [b"garbage\r\n\r\n", b"GET / HTTP/2.0\r\nHost: a\r\n\r\n", b"\0"], ids=["garbage", "version", "NUL"])
def test_what_comes_behind_an_ignored_upgrade_is_http_as_well(loop: str, behind: bytes) -> None:
    async def scenario() -> None:
        upgrade = posted(b"Connection: upgrade", b"Upgrade: h2c", b"Content-Length: 3")
        async with serving(echo, ServerLimits(linger_s=0.2)) as server:
            answer = await ask(server.port, upgrade + GET + behind)
            assert statuses(answer) == [200, 200, 505 if b"2.0" in behind else 400]

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


@pytest.mark.parametrize("request_part", [GET[:9], posted(b"Content-Length: 9"), CHUNKED + b"3\r\nab"], ids=["head", "body", "chunk"])
def test_a_request_that_ends_early(loop: str, request_part: bytes) -> None:
    async def scenario() -> None:
        kept = Kept()
        async with serving(kept) as server:
            assert statuses(await ask(server.port, request_part, half_close=True)) == [400]
            assert kept.exchanges == []

    run(loop, scenario())


def test_bodies_of_all_lengths_behind_each_other(loop: str) -> None:
    def handler(exchange: Exchange) -> None:
        exchange.respond(200, (), b"%d " % len(exchange.body) + exchange.body[-5:])

    async def scenario() -> None:
        async with serving(handler) as server, raw_socket(server.port) as (reader, writer):
            for size in (0, 1, 65_535, 65_536, 65_537, 300_000, 2_000_000, 3):
                body = (b"0123456789" * (size // 10 + 1))[:size]
                writer.write(posted(b"Content-Length: %d" % size, body=body) + CHUNKED + b"1\r\nx\r\n0\r\n\r\n")
                assert (await reader.readuntil(b"\r\n\r\n%d " % size + body[-5:])).startswith(b"HTTP/1.1 200")
                assert (await reader.readuntil(b"\r\n\r\n1 x")).startswith(b"HTTP/1.1 200")

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
    pieces = [stream[a:b] for a, b in itertools.pairwise(borders)]

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
