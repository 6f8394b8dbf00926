"""Engines that answer anything but one good answer, through the whole gateway: the client is told, the connection is not used again,
what runs beside it goes on, and memory stays bounded."""

from __future__ import annotations

import asyncio
import json
import re
import resource
from collections.abc import AsyncIterator
from typing import Any

import pytest
from raw_engine import RawEngine, ok, raw_engine

from control_plane.gateway import GatewaySettings
from control_plane.transport import ServerLimits
from control_plane.types import ExecutionInstance

COMPLETIONS = "/v1/completions"
CHUNKED = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
PLAIN = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n"
EVENTS = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n"
DONE = b'data: {"choices":[{"text":"o"}]}\n\ndata: [DONE]\n\n'


@pytest.fixture
async def engine() -> AsyncIterator[RawEngine]:
    async with raw_engine() as made:
        yield made


@pytest.fixture
async def stand(engine: RawEngine, make_stand: Any, eventually: Any) -> Any:
    made = await make_stand(engines=0)
    instance = ExecutionInstance("raw", url=engine.url, model_name="m")
    made.manager.register_instance(instance)
    await eventually(lambda: instance.is_usable and made.manager.executor.http_clients["raw"].idle)
    return made


def completion(number: int, **fields: Any) -> dict[str, Any]:
    return {"model": "m", "prompt": f"number {number}", **fields}


# name: (the bytes, whether the engine then hangs up, the client's status, whether the connection may be used again)
CASES: dict[str, tuple[bytes, bool, int, bool]] = {
    # no answer at all
    "hangs up": (b"", True, 502, False),
    "garbage": (b"garbage\r\n\r\n", False, 502, False),
    "NUL": (b"\0" * 100, False, 502, False),
    "invalid UTF-8": (b"\xff\xfe" * 50, False, 502, False),
    "HTTP/2 frames": (b"\0\0\x12\x04\0\0\0\0\0\0\x03\0\0\0\x80", False, 502, False),
    "TLS alert": (b"\x15\x03\x01\0\x02\x02\x46", False, 502, False),
    "a request": (b"POST / HTTP/1.1\r\nhost: a\r\n\r\n", False, 502, False),
    "half a head": (PLAIN, True, 502, False),
    # its status line
    "101": (b"HTTP/1.1 101 Switching\r\n\r\n", False, 502, False),
    "101 with an upgrade": (b"HTTP/1.1 101 Switching\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\nxx", False, 502, False),
    "099": (b"HTTP/1.1 099 x\r\ncontent-length: 0\r\n\r\n", False, 502, False),
    "four digits": (b"HTTP/1.1 2000 x\r\ncontent-length: 0\r\n\r\n", False, 502, False),
    "999": (b"HTTP/1.1 999 x\r\ncontent-length: 2\r\n\r\n{}", False, 502, True),
    "HTTP/3.0": (b"HTTP/3.0 200 OK\r\ncontent-length: 2\r\n\r\n{}", False, 502, False),
    "304": (b"HTTP/1.1 304 x\r\ncontent-length: 2\r\n\r\n", False, 502, True),
    "302": (b"HTTP/1.1 302 x\r\nlocation: http://elsewhere\r\ncontent-length: 0\r\n\r\n", False, 502, True),
    "an odd reason": (b"HTTP/1.1 200 okay \xe4 fine!\r\ncontent-length: 2\r\n\r\n{}", False, 200, True),
    "no reason": (b"HTTP/1.1 200\r\ncontent-length: 2\r\n\r\n{}", False, 200, True),
    "interim answers": (b"HTTP/1.1 102 x\r\n\r\n" * 3 + ok(b"{}"), False, 200, True),
    "a flood of interim answers": (b"HTTP/1.1 100 Continue\r\n\r\n" * 50_000, False, 502, False),
    # its headers
    "folded": (PLAIN + b"x: a\r\n b\r\ncontent-length: 2\r\n\r\n{}", False, 502, False),
    "bare LF": (b"HTTP/1.1 200 OK\ncontent-length: 2\n\n{}", False, 502, False),
    "bare CR in a value": (PLAIN + b"x: a\rset-cookie: b\r\ncontent-length: 2\r\n\r\n{}", False, 502, False),
    "NUL in a value": (PLAIN + b"x: a\0b\r\ncontent-length: 2\r\n\r\n{}", False, 502, False),
    "blank before a colon": (PLAIN + b"content-length : 2\r\n\r\n{}", False, 502, False),
    "no colon": (PLAIN + b"x\r\ncontent-length: 2\r\n\r\n{}", False, 502, False),
    "endless header": (PLAIN + b"x: " + b"x" * 1_000_000, False, 502, False),
    "endless headers": (PLAIN + b"x: y\r\n" * 200_000, False, 502, False),
    "absurd retry-after": (b"HTTP/1.1 429 x\r\nretry-after: %b\r\ncontent-length: 2\r\n\r\n{}" % (b"9" * 400), False, 429, True),
    "absurd keep-alive": (PLAIN + b"keep-alive: timeout=%b\r\ncontent-length: 2\r\n\r\n{}" % (b"9" * 400), False, 200, True),
    # its length
    "negative length": (PLAIN + b"content-length: -2\r\n\r\n{}", False, 502, False),
    "signed length": (PLAIN + b"content-length: +2\r\n\r\n{}", False, 502, False),
    "length with a gap": (PLAIN + b"content-length: 2 2\r\n\r\n{}", False, 502, False),
    "a list of lengths": (PLAIN + b"content-length: 2, 2\r\n\r\n{}", False, 502, False),
    "two lengths": (PLAIN + b"content-length: 2\r\ncontent-length: 3\r\n\r\n{}", False, 502, False),
    "hexadecimal length": (PLAIN + b"content-length: 0x2\r\n\r\n{}", False, 502, False),
    "length beyond 64 bits": (PLAIN + b"content-length: 99999999999999999999\r\n\r\n{}", False, 502, False),
    "length of thousands of zeros": (PLAIN + b"content-length: %b2\r\n\r\n{}" % (b"0" * 5000), False, 502, False),
    "the largest length": (PLAIN + b"content-length: 18446744073709551615\r\n\r\n{}", True, 502, False),
    "both lengths": (PLAIN + b"content-length: 2\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", False, 502, False),
    "another encoding": (PLAIN + b"transfer-encoding: gzip, chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", False, 502, False),
    "two encodings": (PLAIN + b"transfer-encoding: x\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n", False, 502, False),
    # its body
    "short": (PLAIN + b"content-length: 9\r\n\r\n{}", True, 502, False),
    "long": (PLAIN + b"content-length: 2\r\n\r\n{}garbage", False, 200, False),
    "twice": (ok(b"{}") + ok(b'{"choices":[{"text":"stolen"}]}'), False, 200, False),
    "body behind a 204": (b"HTTP/1.1 204 x\r\ncontent-length: 2\r\n\r\n{}", False, 204, False),
    "until it hangs up": (PLAIN + b"\r\n{}", True, 200, False),
    "HTTP/1.0 until it hangs up": (b"HTTP/1.0 200 OK\r\n\r\n{}", True, 200, False),
    "announces its end": (PLAIN + b"connection: close\r\ncontent-length: 2\r\n\r\n{}", False, 200, False),
    # its chunks
    "extensions and trailers": (CHUNKED + b"2;a=b\r\n{}\r\n0\r\nx: y\r\n\r\n", False, 200, True),
    "no last chunk": (CHUNKED + b"2\r\n{}\r\n", True, 502, False),
    "no end behind the last chunk": (CHUNKED + b"2\r\n{}\r\n0\r\n", True, 502, False),
    "chunk size with a sign": (CHUNKED + b"+2\r\n{}\r\n0\r\n\r\n", False, 502, False),
    "chunk size with a prefix": (CHUNKED + b"0x2\r\n{}\r\n0\r\n\r\n", False, 502, False),
    "chunk size beyond 64 bits": (CHUNKED + b"1ffffffffffffffff\r\n{}\r\n0\r\n\r\n", False, 502, False),
    "chunk longer than its size": (CHUNKED + b"2\r\n{}{}\r\n0\r\n\r\n", False, 502, False),
    "chunk ended by LF": (CHUNKED + b"2\r\n{}\n0\n\n", False, 502, False),
    "endless chunk extension": (CHUNKED + b"2;" + b"x" * 1_000_000, False, 502, False),
    "endless trailers": (CHUNKED + b"2\r\n{}\r\n0\r\n" + b"x: y\r\n" * 200_000, False, 502, False),
    # its events, announced with a length though some of them are hidden or completed
    "events with a length": (EVENTS + b"content-length: %d\r\n\r\n" % len(DONE) + DONE, False, 200, True),
    "events that lack their last line": (EVENTS + b"content-length: %d\r\n\r\n" % (len(DONE) - 2) + DONE[:-2], False, 200, True),
}


@pytest.mark.parametrize("case", CASES)
async def test_one_bad_answer(stand: Any, engine: RawEngine, open_connection: Any, case: str) -> None:
    said, hangs_up, status, kept = CASES[case]
    beside = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
        if b"number 1" in request:
            writer.write(said)
            if hangs_up:
                writer.close()
        elif b"beside" in request:
            await beside.wait()
            writer.write(ok(b'{"choices":[{"text":"beside"}]}'))
        else:
            writer.write(ok(b'{"choices":[{"text":"two"}]}'))

    engine.script = script
    other = await open_connection(stand.gateway.url)
    other.send("POST", COMPLETIONS, json.dumps({"model": "m", "prompt": "beside"}).encode())
    while not engine.posts:
        await asyncio.sleep(0.005)

    answer = await stand.ask("POST", COMPLETIONS, completion(1))
    assert answer.status == status
    if status == 502:
        assert answer.error["code"] == "instance_failed"
    elif status == 200:
        assert answer.body in (b"{}", DONE)
    after = await stand.ask("POST", COMPLETIONS, completion(2))
    beside.set()

    assert (after.status, after.json["choices"][0]["text"]) == (200, "two")
    assert (await other.answer()).json["choices"][0]["text"] == "beside"
    numbers = [number for number, request in engine.posts if b"beside" not in request]
    assert len(numbers) == 2
    assert (numbers[0] == numbers[1]) is kept
    assert stand.gateway.open_requests == 0


@pytest.mark.parametrize("said", [ok(b'{"choices":[{"text":"stolen"}]}'), b"\0", b"HTTP/1.1 408 x\r\ncontent-length: 0\r\n\r\n"])
async def test_what_comes_unasked_on_a_kept_connection_is_nobodys_answer(
    stand: Any, engine: RawEngine, eventually: Any, said: bytes
) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
        writer.write(ok(b'{"choices":[{"text":"asked"}]}'))
        await writer.drain()
        if len(engine.posts) == 1:
            await asyncio.sleep(0.05)
            writer.write(said)

    engine.script = script
    client = stand.manager.executor.http_clients["raw"]

    for _ in range(2):
        answer = await stand.ask("POST", COMPLETIONS, completion(1))
        assert answer.json["choices"][0]["text"] == "asked"
        if len(engine.posts) == 1:
            await eventually(lambda: client.idle == 0)
    assert engine.posts[0][0] != engine.posts[1][0]


async def test_an_answer_before_the_request_was_read_is_relayed_and_its_connection_dropped(stand: Any, engine: RawEngine) -> None:
    over = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        engine.connections += 1
        head = await reader.readuntil(b"\r\n\r\n")
        engine.posts.append((engine.connections, head))
        body = b'{"error":"too long"}' if engine.connections == 1 else b'{"choices":[]}'
        status = b"413 x" if engine.connections == 1 else b"200 OK"
        writer.write(b"HTTP/1.1 %b\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%b" % (status, len(body), body))
        writer.transport.pause_reading()  # the rest of the request is never looked at
        try:
            await over.wait()
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    engine.connections = 0
    stand.manager.get_instances()[0].url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    long = await stand.ask("POST", COMPLETIONS, completion(1, padding="x" * 20_000_000))
    short = await stand.ask("POST", COMPLETIONS, completion(2))
    over.set()
    server.close()

    assert (long.status, long.json) == (413, {"error": "too long"})
    assert short.status == 200
    assert [number for number, _ in engine.posts] == [1, 2]


# ---- bounds


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


ENDLESS: dict[str, tuple[bytes, bytes]] = {
    "chunks": (CHUNKED, b"10000\r\n" + b"x" * 65536 + b"\r\n"),
    "body of the largest length": (PLAIN + b"content-length: 18446744073709551615\r\n\r\n", b"x" * 65536),
    "until it hangs up": (PLAIN + b"\r\n", b"x" * 65536),
    "an error": (b"HTTP/1.1 500 x\r\ntransfer-encoding: chunked\r\n\r\n", b"10000\r\n" + b"x" * 65536 + b"\r\n"),
    "one event": (EVENTS + b"\r\n", b"data: " + b"x" * 65536),
    "events that say nothing": (EVENTS + b"\r\n", b'data: {"choices":[]}\n\n' * 3000),
    "events": (EVENTS + b"\r\n", b'data: {"choices":[{"text":"oooooooooooooooooooooooooooooooo"}]}\n\n' * 1000),
}


@pytest.mark.parametrize("case", ENDLESS)
async def test_an_endless_answer_takes_bounded_memory(stand: Any, engine: RawEngine, open_connection: Any, case: str) -> None:
    """The client reads nothing: the engine is held back, or cut off, long before it has sent 300 MB."""
    head, piece = ENDLESS[case]
    sent = 0
    stopped = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
        nonlocal sent
        if b"number 1" not in request:
            writer.write(ok())
            return
        writer.write(head)
        try:
            while sent < 300_000_000:
                writer.write(piece)
                async with asyncio.timeout(1.0):
                    await writer.drain()
                sent += len(piece)
        except (OSError, TimeoutError):
            pass
        stopped.set()
        writer.close()

    engine.script = script
    connection = await open_connection(stand.gateway.url)
    connection.writer.transport.pause_reading()
    before = resident_bytes()
    connection.send("POST", COMPLETIONS, json.dumps(completion(1, stream=head.startswith(EVENTS))).encode())
    await asyncio.wait_for(stopped.wait(), 20)

    assert sent < 50_000_000
    assert resident_bytes() - before < 60_000_000
    assert (await stand.ask("POST", COMPLETIONS, completion(2))).status == 200


async def test_an_engine_that_drips_its_head_meets_a_time_limit(engine: RawEngine, make_stand: Any) -> None:
    """A byte every now and then, for ever: a head has the time between two reads of an answer, as a whole."""
    stand = await make_stand(engines=0, chunk_timeout_s=0.5)
    stand.manager.register_instance(ExecutionInstance("raw", url=engine.url, model_name="m"))
    engine.says(*(bytes((byte,)) for byte in PLAIN * 10), pause_s=0.02)

    answer = await stand.ask("POST", COMPLETIONS, completion(1))

    assert answer.status in (502, 504)
    assert "0.5 s" in answer.error["message"]


async def test_a_flood_of_pipelined_requests_takes_bounded_memory(engine: RawEngine, make_stand: Any, open_connection: Any) -> None:
    """The first is not answered, and 200 MB of others are sent behind it: they stay where they are."""
    limits = ServerLimits(max_pipelined=4)
    stand = await make_stand(engines=0, gateway_options={"limits": limits}, settings=GatewaySettings(access_log=False))
    stand.manager.register_instance(ExecutionInstance("raw", url=engine.url, model_name="m"))
    waiting = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> None:
        if b"number 1" in request:
            await waiting.wait()
        writer.write(ok())

    engine.script = script
    connection = await open_connection(stand.gateway.url)
    before = resident_bytes()
    connection.send("POST", COMPLETIONS, json.dumps(completion(1)).encode())
    body = json.dumps(completion(2, padding="x" * 1_000_000)).encode()
    taken = 0
    try:
        for _ in range(200):
            connection.send("POST", COMPLETIONS, body)
            async with asyncio.timeout(0.5):
                await connection.writer.drain()
            taken += 1
    except TimeoutError:
        pass

    assert taken < 20
    assert resident_bytes() - before < 60_000_000
    assert (await stand.ask("POST", COMPLETIONS, completion(3))).status == 200
    waiting.set()
    assert (await connection.answer()).status == 200


# ---- what a client says does not reach the engine as anything else


HOSTILE = [
    b"a\r\nx-evil: 1",
    b"a\rx-evil: 1",
    b"a\nx-evil: 1",
    b"a\r\n x-evil: 1",
    b"a\0b",
    b"a\r\n\r\nPOST /v1/completions HTTP/1.1\r\nhost: b\r\ncontent-length: 0\r\n\r\n",
    b"a\x0bb",
    b"a\x7fb",
    b"\xe5\x98\x8a\xe5\x98\x8dx-evil: 1",  # what some servers turn into CR and LF
    b"a%0d%0ax-evil:%201",
    b"a\tb \xff",
]


@pytest.mark.parametrize("value", HOSTILE)
@pytest.mark.parametrize(
    "name", [b"x-request-id", b"traceparent", b"tracestate", b"content-type", b"authorization", b"x-api-key", b"anthropic-beta"]
)
async def test_no_header_of_a_client_writes_one_of_its_own(
    stand: Any, engine: RawEngine, open_connection: Any, name: bytes, value: bytes
) -> None:
    body = b'{"model":"m","prompt":"x"}'
    connection = await open_connection(stand.gateway.url)
    connection.writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: a\r\n%b: %b\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b"
        % (name, value, len(body), body)
    )
    answers = await asyncio.wait_for(connection.reader.read(), 5)

    # at most one request was made of it (one that a line break ends early is another request, as the client wrote it)
    heads = [request.partition(b"\r\n\r\n")[0].lower() for _, request in engine.posts]
    assert len(heads) <= 1
    for head in heads:
        assert not re.search(rb"(^|\r|\n)[ \t]*x-evil", head) or b"\r\nx-evil: 1" in b"\r\n" + value
        assert b"x-evil" not in head or b"\r" not in value
        assert head.count(b"\r\n\r\n") == 0
        assert set(re.findall(rb"\r\n([a-z-]+):", head)) <= {
            b"host", b"x-request-id", b"content-type", b"content-length", b"traceparent", b"tracestate", b"authorization", b"x-api-key",
            b"anthropic-beta",
        }  # fmt: skip
    head = answers.partition(b"\r\n\r\n")[0]
    assert b"\r\nx-evil" not in head
    assert head.startswith((b"HTTP/1.1 200", b"HTTP/1.1 400"))


@pytest.mark.parametrize(
    "target", [b"/v1/completions?a=\r\nx: y", b"/v1/completions%0d%0ax:y", b"/v1/x\0y", b"/v1/\xe4", b"/v1/a b", b"/v1/a\tb"]
)
async def test_no_target_of_a_client_writes_a_line(stand: Any, engine: RawEngine, open_connection: Any, target: bytes) -> None:
    body = b'{"model":"m","prompt":"x"}'
    connection = await open_connection(stand.gateway.url)
    connection.writer.write(b"POST %b HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: %d\r\n\r\n%b" % (target, len(body), body))
    status = int((await asyncio.wait_for(connection.reader.read(), 5))[9:12])

    assert status in (200, 400, 404, 505)
    for _, request in engine.posts:
        assert request.split(b"\r\n")[0] == b"POST %b HTTP/1.1" % target


@pytest.mark.parametrize(
    "line", [b"x-instance-id: forged", b"x-request-id: forged", b"x-decision: {}", b"connection: x-a", b"transfer-encoding: chunked"]
)
async def test_an_engines_headers_do_not_pass_for_ours(stand: Any, engine: RawEngine, line: bytes) -> None:
    body = b"2\r\n{}\r\n0\r\n\r\n" if line.startswith(b"transfer") else b"{}"
    length = b"" if line.startswith(b"transfer") else b"content-length: 2\r\n"
    engine.says(PLAIN + line + b"\r\n" + length + b"\r\n" + body)

    answer = await stand.ask("POST", COMPLETIONS, completion(1))

    assert (answer.status, answer.body) == (200, b"{}")
    name = line.partition(b":")[0].decode()
    assert [value for key, value in answer.headers if key == name and value in ("forged", "{}", "x-a")] == []
