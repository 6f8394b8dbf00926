"""Smuggling shapes, every one: each byte at each place of a framing header. A request hidden in the body of another is never served."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from fuzz_targets import serve
from other_parsers import requests_agree

#: a chunked body that is empty, with a request behind it; or, by its length, a body
HIDDEN = b"0\r\n\r\nGET /hidden HTTP/1.1\r\nhost: a\r\n\r\n"
#: an encoding that somebody might read as chunked and another not; ``{}`` is any byte
ENCODINGS = [
    b"{}Transfer-Encoding: chunked",
    b"Transfer{}-Encoding: chunked",
    b"Transfer-{}Encoding: chunked",
    b"Transfer-Encoding{}: chunked",
    b"Transfer-Encoding:{}chunked",
    b"Transfer-Encoding: {}chunked",
    b"Transfer-Encoding: chun{}ked",
    b"Transfer-Encoding: chunked{}",
    b"Transfer-Encoding: chunked{}, identity",
    b"Transfer-Encoding: identity{}, chunked",
    b"Transfer-Encoding: chunked\r\n{}Transfer-Encoding: x",
    b"Transfer-Encoding: x\r\n{}Transfer-Encoding: chunked",
    b"X: y{}Transfer-Encoding: chunked",
    b"X: y\r\n{}\r\nTransfer-Encoding: chunked",
]
LENGTHS = [
    b"{}Content-Length: %d",
    b"Content{}-Length: %d",
    b"Content-Length{}: %d",
    b"Content-Length:{}%d",
    b"Content-Length: {}%d",
    b"Content-Length: %d{}",
    b"Content-Length: %d{}0",
    b"Content-Length: 0\r\n{}Content-Length: %d",
    b"Content-Length: %d\r\n{}Content-Length: 0",
    b"X: y{}Content-Length: %d",
]
BYTES = [bytes((byte,)) for byte in range(256)] + [b"", b"\r\n", b"\n ", b"\r\n ", b"\xc2\xa0", b"\r\r\n"]


def made(head: bytes, shape: bytes) -> list[bytes]:
    """The requests with this line, for every byte; less those in which the byte has ended the head before it."""
    heads = (head + shape.replace(b"{}", byte) for byte in BYTES)
    return [lines + b"\r\n\r\n" + HIDDEN for lines in heads if b"\r\n\r\n" not in lines + b"\r\n"]


def within(check: object, requests: list[bytes]) -> None:
    async def each() -> None:
        for request in requests:
            check(request)  # type: ignore[operator]

    asyncio.run(each())


@pytest.mark.parametrize("shape", ENCODINGS)
def test_an_encoding_beside_a_length_hides_no_request(shape: bytes) -> None:
    """Refused, or no encoding at all to anybody: then the length says what is the body."""
    head = b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n" % len(HIDDEN)

    def check(request: bytes) -> None:
        served = serve([request])
        assert len(served) <= 1
        assert [body for _, body in served] in ([], [HIDDEN])
        if served:
            assert b"transfer-encoding" not in dict(served[0][0].headers)
        requests_agree(b"\0" + request)

    within(check, made(head, shape))


@pytest.mark.parametrize("shape", ENCODINGS)
def test_an_encoding_alone_means_the_same_to_others(shape: bytes) -> None:

    def check(request: bytes) -> None:
        for exchange, _ in serve([request]):
            assert [value.lower() for name, value in exchange.headers if name == b"transfer-encoding"] in ([], [b"chunked"])
        requests_agree(b"\0" + request)

    within(check, made(b"POST / HTTP/1.1\r\nhost: a\r\n", shape))


@pytest.mark.parametrize("shape", LENGTHS)
def test_a_length_means_the_same_to_others(shape: bytes) -> None:
    """The whole of the body, or nothing: never a part of it, with a request behind."""

    def check(request: bytes) -> None:
        assert [body for exchange, body in serve([request]) if exchange.method == "POST"] in ([], [HIDDEN], [b""])
        assert not any(exchange.target == b"/hidden" for exchange, _ in serve([request]))
        requests_agree(b"\0" + request)

    within(check, made(b"POST / HTTP/1.1\r\nhost: a\r\n", shape.replace(b"%d", b"%d" % len(HIDDEN))))
