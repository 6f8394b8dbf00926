"""Answers as bytes: whatever an engine sends, the client tells exactly one end, and keeps no connection that it cannot trust."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transport_rig import LOOPS, OK, Answer, client_of, echo, post, read_request, run, saying, scripted, serving, until

from control_plane.errors import InstanceFailed
from control_plane.transport import Exchange

pytestmark = pytest.mark.parametrize("loop", LOOPS)


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


GOOD: dict[str, tuple[bytes, int, bytes, bool]] = {
    "length": (OK, 200, b"ok", True),
    "length 0": (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", 200, b"", True),
    "chunks": (CHUNKED + b"2;x=y\r\nok\r\nA\r\n0123456789\r\n0\r\nTrailer: 1\r\n\r\n", 200, b"ok0123456789", True),
    "until close": (b"HTTP/1.1 200 OK\r\n\r\nok", 200, b"ok", False),
    "HTTP/1.0": (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", 200, b"ok", False),
    "HTTP/1.0 kept": (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\nConnection: keep-alive\r\n\r\nok", 200, b"ok", True),
    "closing": (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok", 200, b"ok", False),
    "no reason": (b"HTTP/1.1 299\r\nContent-Length: 2\r\n\r\nok", 299, b"ok", True),
    "204": (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b"", True),
    "304": (b"HTTP/1.1 304 Not Modified\r\nContent-Length: 9\r\n\r\n", 304, b"", True),
    "after interim answers": (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early\r\nLink: x\r\n\r\n" + OK, 200, b"ok", True),
    "an error": (b"HTTP/1.1 503 No\r\nContent-Length: 2\r\n\r\nno", 503, b"no", True),
    "more behind its end": (OK + b"garbage", 200, b"ok", False),
    "twice": (OK + OK, 200, b"ok", False),
    "bytes behind a closing one": (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok++", 200, b"ok", False),
    "body behind a 204": (b"HTTP/1.1 204 No\r\nContent-Length: 2\r\n\r\nok", 204, b"", False),
}


@pytest.mark.parametrize("case", GOOD)
def test_good_answers(loop: str, case: str) -> None:
    sent, status, body, reusable = GOOD[case]

    async def scenario() -> None:
        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_request(reader)
            writer.write(sent)
            if case == "until close":
                return
            await reader.read()

        async with scripted(script) as url, client_of(url) as client:
            answer = await post(client).wait()
            assert (answer.status, answer.body, answer.error) == (status, body, None)
            assert client.idle == reusable
            assert client.active == 0

    run(loop, scenario())


BAD: dict[str, bytes] = {
    "nothing": b"",
    "garbage": b"garbage\r\n\r\n",
    "NUL": b"\0" * 50,
    "a page without a head": b"<html>no</html>",
    "a request": b"GET / HTTP/1.1\r\nHost: a\r\n\r\n",
    "half a status line": b"HTTP/1.1 20",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "short body": b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nab",
    "no body": b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n",
    "chunks without an end": CHUNKED + b"2\r\nok\r\n",
    "half a chunk": CHUNKED + b"5\r\nok",
    "no closing empty line": CHUNKED + b"2\r\nok\r\n0\r\n",
    "bad chunk size": CHUNKED + b"2\r\nok\r\nxx\r\n",
    "chunk longer than its size": CHUNKED + b"2\r\nokay\r\n0\r\n\r\n",
    "both lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\nok",
    "length that is none": b"HTTP/1.1 200 OK\r\nContent-Length: two\r\n\r\nok",
    "another encoding": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip\r\n\r\nok",
    "two encodings": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    "folded header": b"HTTP/1.1 200 OK\r\nX: a\r\n b\r\nContent-Length: 2\r\n\r\nok",
    "bare LF": b"HTTP/1.1 200 OK\nContent-Length: 2\n\nok",
    "NUL in a header": b"HTTP/1.1 200 OK\r\nX: \0\r\nContent-Length: 2\r\n\r\nok",
    "HTTP/2.0": b"HTTP/2.0 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "status of two digits": b"HTTP/1.1 20 OK\r\nContent-Length: 2\r\n\r\nok",
    "status 000": b"HTTP/1.1 000 OK\r\nContent-Length: 2\r\n\r\nok",
    "switching protocols": b"HTTP/1.1 101 Switching\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\nok",
    "only an interim answer": b"HTTP/1.1 100 Continue\r\n\r\n",
    "head too large": b"HTTP/1.1 200 OK\r\nX: " + b"x" * 70_000,
    "head too large, many headers": b"HTTP/1.1 200 OK\r\n" + b"X: x\r\n" * 20_000,
    "endless interim answers": b"HTTP/1.1 100 Continue\r\n\r\n" * 5_000,
    "endless trailers": CHUNKED + b"2\r\nok\r\n0\r\nX: " + b"x" * 1_000_000,
    "endless chunk extension": CHUNKED + b"2;" + b"x" * 1_000_000,
}


@pytest.mark.parametrize("case", BAD)
def test_bad_answers(loop: str, case: str) -> None:
    async def scenario() -> None:
        seen = 0

        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal seen
            seen += 1
            await read_request(reader)
            writer.write(BAD[case])
            await writer.drain()

        async with scripted(script) as url, client_of(url) as client:
            answer = await post(client).wait()
            assert isinstance(answer.error, InstanceFailed)
            assert url in str(answer.error)
            assert answer.error.sent is (case != "nothing")
            assert not answer.error.timed_out
            assert (client.idle, client.active) == (0, 0)
            # an answer that has begun, and a new connection's failure, are not tried again
            assert seen == 1
            assert b"".join(answer.chunks) in (b"", b"ok", b"ab", b"oka")

    run(loop, scenario())


def test_head_requests(loop: str) -> None:
    async def scenario() -> None:
        async with serving(echo) as server, client_of(server.url) as client:
            answer = Answer()
            client.send("HEAD", "/x", (), b"", answer)
            await answer.wait()
            assert (answer.status, answer.body, answer.error) == (200, b"", None)
            assert (b"content-length", b"8") in answer.headers

    run(loop, scenario())


def test_large_bodies_both_ways(loop: str) -> None:
    async def scenario() -> None:
        async with serving(lambda exchange: exchange.respond(200, (), exchange.body)) as server, client_of(server.url) as client:
            for size in (1, 65_536, 65_537, 3_000_000, 2):
                body = (b"0123456789" * (size // 10 + 1))[:size]
                assert (await post(client, body=body).wait()).body == body
            assert server.connections == 1

    run(loop, scenario())


STREAM = (
    (b"HTTP/1.1 100 Continue\r\n\r\n" + OK.replace(b"\r\n\r\n", b"\r\nX: " + b"v" * 200 + b" \r\n\r\n"), b"ok"),
    (CHUNKED + b"5;x=y\r\nhello\r\n6\r\n world\r\n0\r\nT: 1\r\n\r\n", b"hello world"),
    (b"HTTP/1.1 204 No\r\n\r\n", b""),
    (b"HTTP/1.1 200 OK\r\nContent-Length: 2000\r\n\r\n" + b"y" * 2000, b"y" * 2000),
)


@given(data=st.data())
@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_splitting_changes_nothing(loop: str, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(STREAM))))
    cuts = [sorted(data.draw(st.lists(st.integers(0, len(STREAM[index][0])), max_size=6))) for index in order]

    async def scenario() -> None:
        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            for index, borders in zip(order, cuts, strict=True):
                await read_request(reader)
                sent = STREAM[index][0]
                for begin, end in zip([0, *borders], [*borders, len(sent)], strict=True):
                    writer.write(sent[begin:end])
                    await asyncio.sleep(0)
                    await asyncio.sleep(0)
            await reader.read()

        async with scripted(script) as url, client_of(url) as client:
            for index in order:
                answer = await post(client).wait()
                assert (answer.body, answer.error) == (STREAM[index][1], None)
            assert client.idle == 1

    run(loop, scenario())


@given(answer_bytes=st.binary(max_size=300), valid_start=st.booleans())
@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
def test_any_bytes_end_a_call_exactly_once(loop: str, answer_bytes: bytes, valid_start: bool) -> None:
    async def scenario() -> None:
        async with scripted(saying((CHUNKED if valid_start else b"") + answer_bytes)) as url, client_of(url) as client:
            answer = await post(client).wait()
            assert answer.ends == 1
            assert client.active == 0

    run(loop, scenario())


def test_streams_through_the_server(loop: str) -> None:
    """Both sides together: many streams at once, each chunk where it belongs."""

    def handler(exchange: Exchange) -> None:
        name = exchange.path[1:].encode()
        exchange.start(200, ((b"content-type", b"text/event-stream"),))

        def step(left: int) -> None:
            if left:
                exchange.write(b"data: %b %d\n\n" % (name, left))
                asyncio.get_running_loop().call_soon(step, left - 1)
            else:
                exchange.end(b"data: [DONE]\n\n")

        step(20)

    async def scenario() -> None:
        async with serving(handler) as server, client_of(server.url) as client:
            answers = {index: post(client, f"/{index}") for index in range(50)}
            for index, answer in answers.items():
                await answer.wait()
                expected = b"".join(b"data: %d %d\n\n" % (index, left) for left in range(20, 0, -1)) + b"data: [DONE]\n\n"
                assert answer.body == expected

    run(loop, scenario())


def test_cancel_in_the_middle_of_one_read(loop: str) -> None:
    async def scenario() -> None:
        async with scripted(saying(CHUNKED + b"1\r\na\r\n1\r\nb\r\n0\r\n\r\n")) as url, client_of(url) as client:
            for stage in ("on_head", "on_body"):
                heard: list[str] = []

                class Leaving(Answer):
                    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
                        self._heard("on_head")

                    def on_body(self, data: bytes) -> None:
                        self._heard("on_body")

                    def on_complete(self) -> None:
                        self._heard("on_complete")

                    def _heard(self, what: str, heard: list[str] = heard, stage: str = stage) -> None:
                        heard.append(what)
                        if what == stage:
                            self.call.cancel()  # type: ignore[attr-defined]

                answer = Leaving()
                answer.call = client.send("POST", "/", (), b"", answer)  # type: ignore[attr-defined]
                await until(lambda heard=heard: heard)
                await asyncio.sleep(0.02)
                assert heard == (["on_head"] if stage == "on_head" else ["on_head", "on_body"])
                assert (client.active, client.idle) == (0, 0)

    run(loop, scenario())
