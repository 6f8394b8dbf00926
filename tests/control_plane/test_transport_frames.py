"""Whole chunks that go past the parser: what is received is what the parser would have made of the same bytes."""

from __future__ import annotations

import asyncio
import itertools

from hypothesis import example, given, settings
from hypothesis import strategies as st
from silent_transport import SilentTransport

from control_plane.transport.client import HttpClient
from control_plane.transport.client_connection import ClientConnection

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
END = b"0\r\n\r\n"


class Heard:
    """Hears bodies only."""

    def __init__(self) -> None:
        self.body = b""
        self.ends: list[str] = []

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None: ...

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_complete(self) -> None:
        self.ends.append("complete")

    def on_error(self, error: Exception) -> None:
        self.ends.append("error")


class HeardFrames(Heard):
    def __init__(self) -> None:
        super().__init__()
        self.frames = 0

    def on_frame(self, frame: bytes, data: bytes) -> None:
        assert frame == b"%x\r\n%b\r\n" % (len(data), data)
        assert data
        self.frames += 1
        self.body += data


def hear(pieces: list[bytes], heard: Heard) -> tuple[bytes, list[str], bool, int]:
    """What was heard, and whether the connection is kept for the next request."""

    async def run() -> tuple[bytes, list[str], bool, int]:
        client = HttpClient("http://127.0.0.1:1")
        client._bind()
        connection = ClientConnection(client)
        connection.connection_made(SilentTransport())  # type: ignore[arg-type]
        client.pool(connection)
        client.send("POST", "/x", (), b"{}", heard)  # type: ignore[arg-type]
        for piece in pieces:
            if piece and not connection.transport.is_closing():
                connection.data_received(piece)
        kept = client.idle
        connection.connection_lost(None)
        await client.close()
        return heard.body, heard.ends, kept > 0, client.active

    return asyncio.run(run())


def cut(data: bytes, places: list[int]) -> list[bytes]:
    at = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[start:stop] for start, stop in itertools.pairwise(at)]


def chunk(data: bytes, form: int = 0) -> bytes:
    """In the usual spelling or another legal one, or in one that no parser takes."""
    size = (b"%x", b"%X", b"0%x", b"%x;ext=1", b"0x%x", b"+%x", b"%x ", b"%x")[form] % len(data)
    return size + b"\r\n" + data + (b"\r\n" if form != 7 else b"\n")


data_of = st.one_of(
    st.sampled_from([b"a", b"\r\n", b"data: {}\n\n", b"3\r\nabc\r\n", b"0\r\n\r\n", b"x" * 300]), st.binary(min_size=1, max_size=40)
)
forms = st.sampled_from([0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7])
chunks = st.lists(st.tuples(data_of, forms).map(lambda drawn: chunk(*drawn)), max_size=6)


@given(chunks, st.sampled_from([END, b"", b"zz\r\n", END + b"more", b"0\r\nx: y\r\n\r\n"]))
@example([chunk(b"a"), chunk(b"bc"), chunk(b"d" * 300)], END)
@settings(max_examples=400, deadline=None)
def test_chunk_by_chunk(made: list[bytes], last: bytes) -> None:
    pieces = [HEAD, *made, last]
    assert hear(pieces, HeardFrames()) == hear(pieces, Heard())


@given(chunks, st.sampled_from([END, b"", END + b"more"]), st.lists(st.integers(0, 2000), max_size=8))
@settings(max_examples=400, deadline=None)
def test_cut_anywhere(made: list[bytes], last: bytes, places: list[int]) -> None:
    pieces = cut(HEAD + b"".join(made) + last, places)
    assert hear(pieces, HeardFrames()) == hear(pieces, Heard())


def test_frames_are_used() -> None:
    heard = HeardFrames()
    body, ends, kept, active = hear([HEAD + chunk(b"a"), chunk(b"b"), chunk(b"c"), END], heard)
    assert (body, ends, kept, active, heard.frames) == (b"abc", ["complete"], True, 0, 2)


def test_a_receiver_that_raises_at_a_frame_fails_its_own_call() -> None:
    class Raises(HeardFrames):
        def on_frame(self, frame: bytes, data: bytes) -> None:
            raise ValueError("mine")

    assert hear([HEAD + chunk(b"a"), chunk(b"b"), chunk(b"c")], Raises()) == (b"a", ["error"], False, 0)
