"""The same bytes read by us and by h11, a parser of other people's making: what both take must mean the same to both.

A request that two servers in a row read differently is how requests are smuggled. Where h11 refuses what we take, or the other way, no
harm is done: then only one of them goes on.
"""

from __future__ import annotations

from typing import Any

import h11
from fuzz_targets import SEEDS, FakeTransport, heard_of, serve, split

from control_plane.gateway.cors import Cors
from control_plane.gateway.known_heads import CREDENTIALS, FORWARDED, KnownHead
from control_plane.transport import ClientLimits, Exchange, HttpClient
from control_plane.transport.client_connection import ClientConnection

Request = tuple[bytes, bytes, list[tuple[bytes, bytes]], bytes]
#: an `upgrade` is ignored, and taken out with its `connection`, before the handler sees the head
_CHANGED = (b"upgrade", b"connection")


def read_requests(data: bytes) -> list[Request]:
    """The requests that h11 makes of these bytes, up to the first thing it does not take."""
    connection, found = h11.Connection(h11.SERVER, max_incomplete_event_size=1 << 20), []
    connection.receive_data(data)
    connection.receive_data(b"")
    try:
        while isinstance(request := connection.next_event(), h11.Request):
            body = b""
            while isinstance(event := connection.next_event(), h11.Data):
                body += bytes(event.data)
            if not isinstance(event, h11.EndOfMessage):
                break
            headers = [(bytes(name), bytes(value)) for name, value in request.headers]
            found.append((bytes(request.method), bytes(request.target), headers, body))
            connection.send(h11.Response(status_code=200, headers=[("content-length", "0")]))
            connection.send(h11.EndOfMessage())
            if h11.MUST_CLOSE in (connection.our_state, connection.their_state):
                break
            connection.start_next_cycle()
    except h11.ProtocolError:
        pass
    return found


def _plain(request: Request) -> Request:
    method, target, headers, body = request
    # h11 writes the encoding in lower case
    kept = [(name, value.lower() if name == b"transfer-encoding" else value) for name, value in headers if name not in _CHANGED]
    return method, target, kept, body


def requests_agree(data: bytes) -> None:
    """What we take as a request, h11 takes for the same one, or for none."""
    whole, _ = split(data)
    ours = [_plain((exchange.method.encode(), exchange.target, exchange.headers, body)) for exchange, body in serve([whole])]
    theirs = [_plain(request) for request in read_requests(whole.lstrip(b"\r\n"))]
    both = min(len(ours), len(theirs))
    assert ours[:both] == theirs[:both]


def relayed_means_the_same(data: bytes) -> None:
    """Whatever a client's request says, the engine is sent one request: the method, path, body and forwarded headers of it, no more."""
    whole, _ = split(data)
    for exchange, body in serve([whole]):
        sent = _send_on(exchange, body)
        if sent is None:
            continue
        (request,) = read_requests(sent)
        known = KnownHead(exchange.head, FORWARDED | CREDENTIALS, Cors(()))
        headers = [(b"host", b"127.0.0.1:1"), (b"x-request-id", b"r"), *known.forwarded, (b"content-length", b"%d" % len(body))]
        assert request == (b"POST", known.target.encode(), headers, body)


def _send_on(exchange: Exchange, body: bytes) -> bytes | None:
    """The bytes that an engine would be sent. None: its target is none (``OPTIONS *``)."""
    known = KnownHead(exchange.head, FORWARDED | CREDENTIALS, Cors(()))
    if not known.target.startswith("/"):
        return None
    client = HttpClient("http://127.0.0.1:1", limits=ClientLimits())
    client._bind()
    transport, connection = FakeTransport(), ClientConnection(client)
    connection.connection_made(transport)  # type: ignore[arg-type]
    client.pool(connection)
    receiver: Any = _Ignore()
    call = client.send("POST", known.target, (), body, receiver, lines=b"x-request-id: r\r\n" + known.lines)
    call.cancel()
    connection.connection_lost(None)
    assert client._sweeper is not None
    client._sweeper.close()
    client.wheel.close()
    return bytes(transport.wrote)


class _Ignore:
    def on_error(self, error: Exception) -> None: ...


def answers_agree(data: bytes) -> None:
    """An answer that we take as whole is the same to h11, or none."""
    whole, _ = split(data)
    ours = heard_of([whole])
    if ours is None:
        return
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=1 << 20)
    connection.send(h11.Request(method="POST", target="/x", headers=[("host", "a"), ("content-length", "0")]))
    connection.send(h11.EndOfMessage())
    try:
        connection.receive_data(whole)
        connection.receive_data(b"")
        while isinstance(event := connection.next_event(), h11.InformationalResponse):
            pass
        if not isinstance(event, h11.Response):
            return
        status, body = event.status_code, b""
        while isinstance(event := connection.next_event(), h11.Data):
            body += bytes(event.data)
    except h11.ProtocolError:
        return
    if isinstance(event, h11.EndOfMessage):
        assert ours == (status, body)


PEERS = {"peer_requests": requests_agree, "peer_relayed": relayed_means_the_same, "peer_answers": answers_agree}

_HEADS = [
    b"\x00POST /v1/x?a=b HTTP/1.1\r\nhost: a\r\ntraceparent: 00-ab-cd-01\r\nx-request-id: abc\r\nauthorization:\t Bearer \xe4 \t\r\n"
    b"content-type: application/json\r\ncontent-length: 2\r\n\r\n{}",
    b"\x00POST http://a?b HTTP/1.1\r\nHost:a\r\ntracestate: a=b,\tc=d\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"A;a=b\r\n0123456789\r\n000\r\nx: y\r\n\r\n",
    b"\x00POST //a%0d%0ab/../c HTTP/1.1\r\nhost: a\r\nx-api-key: k\r\nanthropic-beta: x\r\nanthropic-beta: y\r\n"
    b"content-length: 2\r\n\r\n{}",
]
SEEDS |= {
    "peer_requests": SEEDS["server"] + _HEADS,
    "peer_relayed": SEEDS["server"] + _HEADS,
    "peer_answers": SEEDS["client"],
}
