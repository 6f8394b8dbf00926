"""Known heads: what is read with a memory of earlier heads is what is read without one, whatever the bytes."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from silent_transport import SilentTransport

from control_plane.transport.client import HttpClient
from control_plane.transport.client_connection import ClientConnection
from control_plane.transport.heads import MAX_HEADS, HeadMemory, cut_length
from control_plane.transport.limits import ServerLimits
from control_plane.transport.request_head import Refused, RequestHead
from control_plane.transport.request_reader import Receiving, RequestReader

Seen = list[tuple[object, ...]]


class Taker:
    def __init__(self) -> None:
        self.seen: Seen = []

    def take_request(self, head: RequestHead, body: bytes) -> None:
        self.seen.append((head.method, head.target, head.path, head.query, tuple(head.headers), head.keep_alive, head.http10, body))

    def send_continue(self) -> None:
        self.seen.append(("continue",))


def read(pieces: list[bytes], receiving: Receiving | None = None, *, alone: bool = False) -> Seen:
    """Each piece is one read; ``alone``: by a reader that knows no head."""
    taker = Taker()
    receiving = receiving or Receiving()
    reader = RequestReader(taker, ServerLimits(max_body_bytes=1000), receiving)
    for piece in pieces:
        if alone:
            receiving.heads = HeadMemory()
        try:
            reader.feed(piece)
        except Refused as refused:
            taker.seen.append((refused.status, refused.code))
            break
    return taker.seen


BASE = b"POST /v1/x HTTP/1.1\r\nhost: a\r\n"
LINES = [
    b"content-length: 5\r\n",
    b"Content-Length: 5\r\n",
    b"content-length: 12\r\n",
    b"content-length: 0012\r\n",
    b"content-length:5\r\n",
    b"content-length: 5 \r\n",
    b"content-length: +5\r\n",
    b"content-length: 5, 5\r\n",
    b"content-length: \r\n",
    b"content-length: 99999999999999999999\r\n",
    b"content-length: 2000\r\n",
    b"x-content-length: 3\r\n",
    b"x: content-length: 3\r\n",
    b"x: a\r\n content-length: 3\r\n",
    b"x: a\n",
    b"x: \ncontent-length: 3\r\n",
    b"transfer-encoding: chunked\r\n",
    b"connection: close\r\n",
    b"connection: upgrade\r\nupgrade: h2c\r\n",
    b"expect: 100-continue\r\n",
    b"authorization: Bearer k\r\n",
]
BODIES = [b"", b"hello", b"hello world!", b"5\r\nhello\r\n0\r\n\r\n", b"\r\n\r\nx", b"GET / HTTP/1.1\r\nhost: b\r\n\r\n", b"z" * 1500]
messages = st.tuples(st.lists(st.sampled_from(LINES), max_size=3), st.sampled_from(BODIES)).map(
    lambda drawn: BASE + b"".join(drawn[0]) + b"\r\n" + drawn[1]
)


@given(st.lists(messages, min_size=1, max_size=6))
@example([BASE + b"content-length: 5\r\n\r\nhello"] * 3)
@example([BASE + b"content-length: 5\r\n\r\nhello", BASE + b"content-length: 12\r\n\r\nhello world!"] * 2)
@example([BASE + b"x: content-length: 3\r\ncontent-length: 5\r\n\r\nhello"] * 2)
@settings(max_examples=600, deadline=None)
def test_a_memory_changes_nothing(pieces: list[bytes]) -> None:
    expected = read(pieces, alone=True)
    shared = Receiving()
    assert read(pieces, shared) == expected
    assert read(pieces, shared) == expected


@given(st.binary(max_size=60), st.binary(max_size=60))
@example(b"ontent-Length: ", b"")
@settings(max_examples=300, deadline=None)
def test_different_heads_stay_different(before: bytes, behind: bytes) -> None:
    """The cut can be undone."""
    raw = b"G\r\n" + before + b"\r\ncontent-length: 17\r\n" + behind
    found = cut_length(raw)
    if found is not None:
        cut, length = found
        lower = cut.find(b"ontent-length: ")
        at = (lower if lower >= 0 else cut.find(b"ontent-Length: ")) + 15
        assert any(raw == cut[:at] + b"0" * zeros + str(length).encode() + cut[at:] for zeros in range(15))


def test_a_body_above_the_limit_is_refused_behind_a_known_head() -> None:
    small, large = (BASE + b"content-length: %d\r\n\r\n" % n + b"z" * n for n in (5, 1500))
    assert read([small, small, large])[-1] == (413, "payload_too_large")


def test_the_memory_has_a_bound() -> None:
    receiving = Receiving()
    read([BASE + b"x-id: %d\r\ncontent-length: 2\r\n\r\nhi" % n for n in range(3 * MAX_HEADS)], receiving)
    assert len(receiving.heads.known) <= MAX_HEADS


# ---- answers


class Heard:
    def __init__(self) -> None:
        self.seen: Seen = []

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.seen.append((status, tuple(headers)))

    def on_body(self, data: bytes) -> None:
        self.seen.append(("body", data))

    def on_complete(self) -> None:
        self.seen.append(("complete",))

    def on_error(self, error: Exception) -> None:
        self.seen.append(("error", type(error).__name__))


def hear(answers: list[bytes], client: HttpClient, *, alone: bool = False) -> tuple[Seen, bool]:
    """What a receiver hears of each answer in turn on one connection, and whether that is still good for another."""
    connection, wire = ClientConnection(client), SilentTransport()
    connection.connection_made(wire)  # type: ignore[arg-type]
    client.pool(connection)
    heard = Heard()
    for answer in answers:
        if not client.idle:
            break
        client.send("POST", "/x", (), b"{}", heard)  # type: ignore[arg-type]
        if alone:
            client.heads = HeadMemory()
        connection.data_received(answer)
    good = client.idle > 0
    connection.drop()
    connection.connection_lost(None)
    return heard.seen, good


OK = b"HTTP/1.1 200 OK\r\n"
ANSWER_LINES = [
    *LINES[:5],
    b"content-length: 5, 5\r\n",
    b"content-length: 3\r\ncontent-length: 3\r\n",
    b"keep-alive: timeout=9\r\n",
    b"transfer-encoding: chunked\r\n",
    b"connection: close\r\n",
    b"x: content-length: 3\r\n",
    b"date: now\r\n",
]
STARTS = [OK, b"HTTP/1.1 204 No Content\r\n", b"HTTP/1.1 503 Busy\r\n", b"HTTP/1.1 100 Continue\r\n\r\n" + OK, b"HTTP/1.0 200 OK\r\n"]
ANSWER_BODIES = [b"", b"abc", b"hello", b"hello world!", b"hello world! and more", b"3\r\nabc\r\n0\r\n\r\n"]


@given(
    st.lists(
        st.tuples(st.sampled_from(STARTS), st.lists(st.sampled_from(ANSWER_LINES), max_size=3), st.sampled_from(ANSWER_BODIES)).map(
            lambda drawn: drawn[0] + b"".join(drawn[1]) + b"\r\n" + drawn[2]
        ),
        min_size=1,
        max_size=5,
    )
)
@settings(max_examples=400, deadline=None)
def test_a_memory_changes_no_answer(answers: list[bytes]) -> None:
    async def run() -> None:
        client = HttpClient("http://127.0.0.1:1")
        client._bind()
        results = [hear(answers, client, alone=alone) for alone in (True, False, False)]
        assert results[0] == results[1] == results[2]
        await client.close()

    asyncio.run(run())


@pytest.mark.parametrize("fails_at", ["on_head", "on_body"])
async def test_a_receiver_that_raises_fails_its_own_call(fails_at: str, caplog: pytest.LogCaptureFixture) -> None:
    client = HttpClient("http://127.0.0.1:1")
    client._bind()
    answer = OK + b"content-length: 3\r\n\r\nabc"
    assert hear([answer, answer], client)[0].count(("complete",)) == 2
    connection, heard = ClientConnection(client), Heard()
    connection.connection_made(SilentTransport())  # type: ignore[arg-type]
    client.pool(connection)

    def raises(*_: object) -> None:
        raise ValueError("mine")

    setattr(heard, fails_at, raises)
    client.send("POST", "/x", (), b"{}", heard)  # type: ignore[arg-type]
    connection.data_received(answer)
    assert heard.seen[-1] == ("error", "InstanceFailed")
    assert "a receiver failed" in caplog.text
    assert client.idle == 0
    connection.connection_lost(None)
    await client.close()
