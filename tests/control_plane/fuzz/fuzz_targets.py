"""What is fuzzed: the server's reading, the client's reading, and the reading of bodies. Each takes any bytes and asserts what must hold.

``TARGETS`` is used by ``test_fuzz.py`` (kept cases and a bounded time in CI) and by ``run.py`` (as long as one likes, ``make fuzz``).
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

from control_plane.clock import SystemClock
from control_plane.engines.openai_compatible import EngineAnswer
from control_plane.errors import ControlPlaneError
from control_plane.gateway.endpoints import ENDPOINTS, GENERIC
from control_plane.gateway.openai import OWN_MEMBERS, read
from control_plane.protocols import Call, EngineOutcome, Headers, WireRequest
from control_plane.transport import ClientLimits, Exchange, HttpClient, HttpServer, ServerLimits
from control_plane.transport.client_connection import ClientConnection
from control_plane.transport.connection import ServerConnection

LIMITS = ServerLimits(max_body_bytes=4096, max_header_bytes=2048, max_headers=20, max_pipelined=4)


class FakeTransport:
    """Keeps what is written, and whether it was closed."""

    def __init__(self) -> None:
        self.wrote = bytearray()
        self.closed = False

    def write(self, data: bytes) -> None:
        assert not self.closed
        self.wrote += data

    def writelines(self, parts: Any) -> None:
        for part in parts:
            self.write(part)

    def get_extra_info(self, name: str) -> Any:
        return ("127.0.0.1", 1) if name == "peername" else None

    def set_write_buffer_limits(self, high: int, low: int) -> None: ...

    def get_write_buffer_size(self) -> int:
        return 0

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...

    def is_closing(self) -> bool:
        return self.closed

    def close(self) -> None:
        self.closed = True

    abort = close


def split(data: bytes) -> tuple[bytes, list[bytes]]:
    """(the bytes to be read, the same cut into reads): the first byte says how."""
    if not data:
        return b"", []
    step, rest = data[0], data[1:]
    if step == 0:
        return rest, [rest]
    return rest, [rest[at : at + step] for at in range(0, len(rest), step)]


# ---- the server


def _serve(reads: list[bytes], *, known: HttpServer | None = None) -> tuple[list[tuple[str, bytes, bytes]], bytes, HttpServer]:
    """The requests that a connection makes of these reads, and what it answers."""
    seen: list[tuple[str, bytes, bytes]] = []

    def handler(exchange: Exchange) -> None:
        seen.append((exchange.method, exchange.target, exchange.body))
        exchange.respond(200, ((b"content-type", b"text/plain"),), b"ok")

    server = known or HttpServer(handler, limits=LIMITS)
    server.handler = handler
    server.loop = asyncio.get_running_loop()
    server.wheel = getattr(server, "wheel", None) or _wheel()
    transport = FakeTransport()
    connection = ServerConnection(server)
    connection.connection_made(transport)  # type: ignore[arg-type]
    for piece in reads:
        if transport.closed:
            break
        connection.data_received(piece)
    if not transport.closed:
        connection.eof_received()
    connection.connection_lost(None)
    assert server.open_exchanges == 0
    assert server.receiving.total_bytes == 0
    assert server.receiving.memory.held_bytes == 0
    assert server.connections == 0
    return seen, bytes(transport.wrote), server


def serve(reads: list[bytes]) -> list[tuple[Exchange, bytes]]:
    """The requests that a connection makes of these reads, with their bodies, to look at."""
    seen: list[tuple[Exchange, bytes]] = []

    def handler(exchange: Exchange) -> None:
        seen.append((exchange, exchange.body))
        exchange.respond(200, (), b"ok")

    server = HttpServer(handler, limits=LIMITS)
    server.loop = asyncio.get_running_loop()
    server.wheel = _wheel()
    transport = FakeTransport()
    connection = ServerConnection(server)
    connection.connection_made(transport)  # type: ignore[arg-type]
    for piece in reads:
        connection.data_received(piece)
    connection.connection_lost(None)
    server.wheel.close()
    return seen


def _wheel() -> Any:
    from control_plane.transport import TimerWheel

    return TimerWheel(asyncio.get_running_loop())


def _statuses(answers: bytes, methods: list[str]) -> list[int]:
    """Of a run of answers as this server writes them to requests of these methods; asserts that it is nothing else."""
    found = []
    while answers:
        head, separator, rest = answers.partition(b"\r\n\r\n")
        assert separator
        assert head.startswith(b"HTTP/1.1 "), answers[:80]
        status = int(head[9:12])
        if status == 100:
            answers = rest
            continue
        found.append(status)
        lines = [line.partition(b": ") for line in head.split(b"\r\n")[1:]]
        lengths = [int(value) for name, _, value in lines if name == b"content-length"]
        assert len(lengths) == 1
        headless = len(found) <= len(methods) and methods[len(found) - 1] == "HEAD"
        body = b"" if headless else rest[: lengths[0]]
        answers = rest[len(body) :]
    return found


def server_reads(data: bytes) -> None:
    """No bytes raise, every request gets one answer, nothing is answered behind a refusal, nothing is kept; and how the bytes were cut
    into reads, or what heads came before, changes no request."""
    whole, reads = split(data)
    at_once, answers, server = _serve([whole])
    statuses = _statuses(answers, [method for method, _, _ in at_once])
    refused = [status for status in statuses if status != 200]
    assert len(statuses) - len(refused) <= len(at_once)
    assert len(refused) <= 1
    if refused:
        assert statuses[-1] == refused[0]
    in_pieces, _, _ = _serve(reads)
    again, _, _ = _serve([whole], known=server)
    assert in_pieces == at_once == again
    server.wheel.close()


# ---- the client's side


class _Heard:
    """A Sink that checks the order of its calls."""

    def __init__(self) -> None:
        self.begun = 0
        self.ends = 0
        self.good = False
        self.body = bytearray()

    def started(self, status: int, headers: Headers, call: Call) -> None:
        assert not self.ends
        assert 200 <= status < 300
        self.begun += 1

    def chunk(self, data: bytes) -> None:
        assert self.begun == 1
        assert not self.ends
        self.body += data

    def frame(self, frame: bytes, data: bytes) -> None:
        assert frame == b"%x\r\n%b\r\n" % (len(data), data)
        self.chunk(data)

    def tokens(self, n: int, first_s: float, last_s: float) -> None:
        assert n > 0
        assert first_s <= last_s

    def finished(self, outcome: EngineOutcome) -> None:
        assert self.begun == 1
        self.ends += 1
        self.good = True

    def failed(self, error: ControlPlaneError) -> None:
        self.ends += 1


_clock = SystemClock()


class _EngineSide:
    """A client with one connection to an engine, of which the bytes come from here."""

    def __init__(self) -> None:
        self.client = HttpClient("http://127.0.0.1:1", limits=ClientLimits(max_header_bytes=2048))
        self.client._bind()
        self._transport = FakeTransport()
        self._connection = ClientConnection(self.client)
        self._connection.connection_made(self._transport)  # type: ignore[arg-type]
        self.client.pool(self._connection)

    def send(self, reads: list[bytes]) -> None:
        for piece in reads:
            if not self._transport.closed:
                self._connection.data_received(piece)

    def hang_up(self) -> None:
        if not self._transport.closed:
            self._connection.eof_received()
        self._connection.connection_lost(None)

    def close(self) -> None:
        for task in list(self.client._opening):
            task.cancel()
        if self.client._sweeper is not None:
            self.client._sweeper.close()
        self.client.wheel.close()


def _answer(reads: list[bytes], *, stream: bool) -> tuple[_Heard, bool]:
    """What is heard of an engine that sends these reads and hangs up; whether its connection would have been used again."""
    engine, heard = _EngineSide(), _Heard()
    client = engine.client
    answer = EngineAnswer("e", WireRequest("/v1/chat/completions", b"{}", stream, hide_usage=stream), heard, _clock)
    answer.attach(client.send("POST", "/x", (), b"{}", answer))
    engine.send(reads)
    kept = client.idle > 0
    if kept:
        assert heard.ends == 1
    engine.hang_up()
    assert heard.ends <= 1
    assert client.active == (0 if heard.ends else len(client._opening))
    engine.close()
    return heard, kept


def client_reads(data: bytes) -> None:
    """No bytes raise, an answer begins and ends at most once, its connection is kept only behind a whole one; and where it is whole, how
    the bytes were cut does not change what is received."""
    whole, reads = split(data)
    for stream in (False, True):
        at_once, _ = _answer([whole], stream=stream)
        in_pieces, _ = _answer(reads, stream=stream)
        if at_once.good and in_pieces.good:
            # a stream without its last empty line gets one
            assert at_once.body.split() == in_pieces.body.split()


class _Kept:
    """A transport's receiver that keeps one answer."""

    def __init__(self) -> None:
        self.status = 0
        self.body = b""
        self.whole = False

    def on_head(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self.status = status

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_complete(self) -> None:
        self.whole = True

    def on_error(self, error: ControlPlaneError) -> None:
        self.whole = False


def heard_of(reads: list[bytes]) -> tuple[int, bytes] | None:
    """Status and body of the answer that the client makes of these reads and a hang-up; None where it is none."""
    engine, kept = _EngineSide(), _Kept()
    engine.client.send("POST", "/x", (), b"", kept)
    engine.send(reads)
    engine.hang_up()
    engine.close()
    return (kept.status, kept.body) if kept.whole else None


# ---- bodies

_PATHS = [*ENDPOINTS, "/v1/anything"]


def _loads(body: bytes) -> Any:
    return json.loads(body, parse_constant=lambda name: (_ for _ in ()).throw(ValueError(name)))


def body_reads(data: bytes) -> None:
    """Only typed errors; what goes on to the engine is the client's object less our members, with usage asked for in streams."""
    path = _PATHS[data[0] % len(_PATHS)] if data else _PATHS[0]
    endpoint, body = ENDPOINTS.get(path, GENERIC), data[1:]
    try:
        ask = read(endpoint, body, {b"x-priority": b"low"} if data[:1] > b"\x80" else {}, lambda _: "named")
    except ControlPlaneError as error:
        refused = error
    else:
        refused = None
    if refused is not None:
        assert 400 <= refused.http_status < 500
        assert refused.message
        return
    sent, came = _loads(ask.body), _loads(body)
    assert isinstance(came, dict)
    expected = {name: value for name, value in came.items() if name not in OWN_MEMBERS}
    if not came.get("model"):
        expected["model"] = "named"
    options = sent.get("stream_options")
    if ask.hide_usage:
        assert ask.stream
        assert options["include_usage"] is True
    sent.pop("stream_options", None)
    expected.pop("stream_options", None)
    assert json.dumps(sent, sort_keys=True) == json.dumps(expected, sort_keys=True)
    assert ask.request.prompt_bytes >= 0


TARGETS: dict[str, Callable[[bytes], None]] = {"server": server_reads, "client": client_reads, "body": body_reads}

#: what a fuzzer starts from
SEEDS: dict[str, list[bytes]] = {
    "server": [
        b"\x00POST /v1/x HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nhelloGET / HTTP/1.1\r\nhost: a\r\n\r\n",
        b"\x07POST /v1/x HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5;x=1\r\nhello\r\n0\r\nt: 1\r\n\r\n",
        b"\x03GET http://a/b?c=d HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
        b"\x01POST / HTTP/1.1\r\nhost: a\r\nexpect: 100-continue\r\ncontent-length: 2\r\n\r\nok",
        b"\x09POST / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: h2c\r\ncontent-length: 2\r\n\r\nok",
        b"\x02POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 2\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
    "client": [
        b'\x00HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 29\r\n\r\n{"usage":{"prompt_tokens":12}}',
        b"\x05HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
        b'1a\r\ndata: {"choices":[{"a":1}]}\n\n\r\ne\r\ndata: [DONE]\n\n\r\n0\r\n\r\n',
        b"\x03HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n",
        b"\x04HTTP/1.0 500 Oops\r\n\r\nit broke",
        b"\x11HTTP/1.1 429 Busy\r\nretry-after: 3\r\nkeep-alive: timeout=5\r\ncontent-length: 0\r\n\r\nHTTP/1.1 200 OK\r\n\r\n",
    ],
    "body": [
        b'\x00{"model":"m","messages":[{"role":"user","content":"hi"}],"stream":true,"max_tokens":5,"priority":"high"}',
        b'\x01{"model":"m","prompt":[1,2,3],"stream":true,"stream_options":{"include_usage":false},"slo_deadline_ms":1e3}',
        b'\xf0{"input":"\xc3\xa4","user":"u","request_id":"r","n":2,"model":"m","model":"k","when_late":"reject"}',
        b'\x04{"model":"m","system":"s","messages":[],"metadata":{"user_id":"u"},"cost_budget":0.5,"tools":[{}]}',
    ],
}
