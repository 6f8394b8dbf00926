"""The client's connections: kept, replaced, timed, paused, cancelled, closed; and what it sends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import ssl
from pathlib import Path

import pytest
from localhost_certificate import CERTIFICATE, PRIVATE_KEY
from transport_rig import LOOPS, OK, Answer, Kept, client_of, echo, post, read_request, run, saying, scripted, serving, until

from control_plane.errors import ConfigurationError, InstanceFailed
from control_plane.transport import ClientLimits, HttpClient

pytestmark = pytest.mark.parametrize("loop", LOOPS)


def test_request_bytes_and_reuse(loop: str) -> None:
    async def scenario() -> None:
        requests: list[bytes] = []
        standing = ((b"authorization", b"Bearer standing"), (b"x-standing", b"1"))
        async with (
            scripted(saying(OK, then_close=False, requests=requests)) as url,
            client_of(url + "/prefix/", headers=standing) as client,
        ):
            for headers in (((b"x-own", b"2"), (b"host", b"evil"), (b"content-length", b"9")), ((b"authorization", b"Bearer own"),)):
                answer = Answer()
                client.send("POST", "/v1/x?y=1", headers, b"body", answer)
                await answer.wait()
                assert (answer.status, answer.body, answer.error) == (200, b"ok", None)
                assert answer.headers == [(b"content-length", b"2")]
            authority = url.removeprefix("http://").encode()
            first = b"POST /prefix/v1/x?y=1 HTTP/1.1\r\nhost: " + authority + b"\r\n"
            assert requests[0] == first + b"authorization: Bearer standing\r\nx-standing: 1\r\nx-own: 2\r\ncontent-length: 4\r\n\r\nbody"
            assert requests[1] == first + b"x-standing: 1\r\nauthorization: Bearer own\r\ncontent-length: 4\r\n\r\nbody"
            assert await client.fetch("GET", "/health") == (200, [(b"content-length", b"2")], b"ok")
            assert requests[2].endswith(b"x-standing: 1\r\n\r\n")
            assert (client.idle, client.active) == (1, 0)

    run(loop, scenario())


def test_the_connection_used_last_is_used_next(loop: str) -> None:
    async def scenario() -> None:
        kept = Kept()
        async with serving(kept) as server, client_of(server.url) as client:
            answers = [post(client) for _ in range(3)]
            assert client.active == 3
            await until(lambda: len(kept.exchanges) == 3)
            for exchange in kept.exchanges:
                exchange.respond(200, (), b"")
            for answer in answers:
                await answer.wait()
            assert (client.idle, client.active) == (3, 0)
            last = kept.exchanges[-1]._channel
            for _ in range(3):
                kept.exchanges.clear()
                answer = post(client)
                await until(lambda: kept.exchanges)
                assert kept.exchanges[0]._channel is last
                kept.exchanges[0].respond(200, (), b"")
                await answer.wait()

    run(loop, scenario())


def test_a_connection_is_free_before_its_end_is_told(loop: str) -> None:
    async def scenario() -> None:
        async with serving(echo) as server, client_of(server.url) as client:
            second = Answer()

            class Chained(Answer):
                def on_complete(self) -> None:
                    super().on_complete()
                    client.send("POST", "/second", (), b"", second)

            first = Chained()
            client.send("POST", "/first", (), b"", first)
            await second.wait()
            assert second.body == b"POST /second "
            assert server.connections == 1

    run(loop, scenario())


def test_a_kept_connection_that_was_closed_is_replaced_without_a_word(loop: str) -> None:
    async def scenario() -> None:
        connections = 0

        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal connections
            connections += 1
            await read_request(reader)
            writer.write(OK)
            if connections < 3:
                # takes the next request and hangs up
                await read_request(reader)
            else:
                await reader.read()

        async with scripted(script) as url, client_of(url) as client:
            assert (await post(client).wait()).body == b"ok"
            assert (await post(client, body=b"again").wait()).body == b"ok"
            assert connections == 2
            # the second failure in a row is told: it is on a new connection
            assert (await post(client).wait()).body == b"ok"
            assert connections == 3

    run(loop, scenario())


def test_a_retry_is_tried_once(loop: str) -> None:
    async def scenario() -> None:
        connections = 0

        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            nonlocal connections
            connections += 1
            await read_request(reader)
            if connections == 1:
                writer.write(OK)
                await read_request(reader)

        async with scripted(script) as url, client_of(url) as client:
            assert (await post(client).wait()).body == b"ok"
            failed = await post(client).wait()
            assert connections == 2
            assert "without an answer" in str(failed.error)
            assert failed.error is not None
            assert not failed.error.sent

    run(loop, scenario())


def test_what_was_on_a_kept_connection_may_have_been_read_though_nobody_takes_a_new_one(loop: str) -> None:
    async def scenario() -> None:
        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await read_request(reader)
            writer.write(OK)
            await read_request(reader)
            # it dies of the request: no answer, and nobody listens any more
            server.close()
            writer.close()

        server = await asyncio.start_server(script, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with client_of(url) as client:
            assert (await post(client).wait()).body == b"ok"
            failed = (await post(client).wait()).error
            assert failed is not None
            assert (failed.connected, failed.reached, failed.sent) == (False, True, False)
            failed = (await post(client).wait()).error
            assert failed is not None
            assert (failed.connected, failed.reached) == (False, False)

    run(loop, scenario())


def test_idle_connections_die_quietly(loop: str) -> None:
    """Closed by the engine, unasked bytes, too old, announced as short-lived: none of them is used again."""

    async def scenario() -> None:
        writers: list[asyncio.StreamWriter] = []

        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writers.append(writer)
            while True:
                request = await read_request(reader)
                announced = b"Keep-Alive: timeout=%d\r\n" % (0 if b"/short" in request else 100) if b"/announced" in request else b""
                writer.write(OK.replace(b"\r\n\r\n", b"\r\n" + announced + b"\r\n"))

        async with scripted(script) as url:
            async with client_of(url, limits=ClientLimits(keepalive_s=0.15)) as client:
                await post(client).wait()
                writers[-1].close()
                await until(lambda: client.idle == 0)
                await post(client).wait()
                writers[-1].write(b"HTTP/1.1 408 Too late\r\n\r\n")
                await until(lambda: client.idle == 0)
                await post(client).wait()
                assert client.idle == 1
                await until(lambda: client.idle == 0)
                await post(client, "/announced/short").wait()
                await until(lambda: client.idle == 0)
                await post(client, "/announced").wait()
                await asyncio.sleep(0.3)
                assert client.idle == 1
            assert len(writers) == 5
            async with client_of(url, limits=ClientLimits(max_idle=2)) as client:
                answers = [post(client) for _ in range(5)]
                for answer in answers:
                    assert (await answer.wait()).body == b"ok"
                assert client.idle == 2

    run(loop, scenario())


@pytest.mark.parametrize("case", ["refused", "no such host", "no answer to connect"])
def test_connecting_fails(loop: str, case: str) -> None:
    async def scenario() -> None:
        with socket.socket() as taken:
            # bound and not listening refuses; listening with a full backlog does not answer
            taken.bind(("127.0.0.1", 0))
            port = taken.getsockname()[1]
            blocked = []
            host = "127.0.0.1"
            if case == "no such host":
                host = "no-such-host.invalid"
            if case == "no answer to connect":
                taken.listen(0)
                for _ in range(4):
                    other = socket.socket()
                    other.setblocking(False)
                    with contextlib.suppress(BlockingIOError):
                        other.connect(("127.0.0.1", port))
                    blocked.append(other)
            async with client_of(f"http://{host}:{port}", limits=ClientLimits(connect_timeout_s=0.3)) as client:
                answer = await post(client).wait()
                assert f"{host}:{port}" in str(answer.error)
                assert answer.error is not None
                assert not answer.error.connected
                assert answer.error.timed_out is (case == "no answer to connect") or case == "no such host"
                if case == "refused":
                    assert str(answer.error).endswith("Connection refused")
                assert client.active == 0
            for other in blocked:
                other.close()

    run(loop, scenario())


def test_time_limits(loop: str) -> None:
    async def scenario() -> None:
        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            request = await read_request(reader)
            if b"/silent" not in request:
                writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            while b"/endless" in request:
                writer.write(b"1\r\nx\r\n")
                await asyncio.sleep(0.05)
            await reader.read()

        limits = ClientLimits(first_byte_timeout_s=0.15, chunk_timeout_s=0.2, total_timeout_s=0.5)
        async with scripted(script) as url, client_of(url, limits=limits) as client:
            silent, stuck, endless = post(client, "/silent"), post(client, "/stuck"), post(client, "/endless")
            for answer, sent, reason in ((silent, False, "0.15 s"), (stuck, True, "0.2 s"), (endless, True, "0.5 s")):
                await answer.wait()
                assert answer.error is not None
                assert answer.error.timed_out
                assert answer.error.sent is sent
                assert reason in str(answer.error)
            assert len(endless.body) >= 5
            with pytest.raises(InstanceFailed) as failure:
                await client.fetch("GET", "/silent", timeout_s=0.1)
            assert failure.value.timed_out

    run(loop, scenario())


def test_a_kept_connection_that_hangs_is_not_tried_again(loop: str) -> None:
    async def scenario() -> None:
        requests: list[bytes] = []

        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            requests.append(await read_request(reader))
            writer.write(OK)
            requests.append(await read_request(reader))
            await reader.read()

        async with scripted(script) as url, client_of(url) as client:
            await post(client).wait()
            answer = await post(client, limits=ClientLimits(first_byte_timeout_s=0.1)).wait()
            assert answer.error is not None
            assert answer.error.timed_out
            assert len(requests) == 2

    run(loop, scenario())


def test_cancel_at_every_stage(loop: str) -> None:
    async def scenario() -> None:
        kept = Kept()
        async with serving(kept) as server, client_of(server.url) as client:
            connecting = post(client)
            connecting.call.cancel()
            await asyncio.sleep(0.02)
            waiting = post(client)
            await until(lambda: kept.exchanges)
            waiting.call.cancel()
            waiting.call.cancel()
            await until(lambda: len(kept.left) == 1, 1.0)

            class Leaving(Answer):
                def on_body(self, data: bytes) -> None:
                    super().on_body(data)
                    self.call.cancel()  # type: ignore[attr-defined]

            reading = Leaving()
            reading.call = client.send("POST", "/", (), b"", reading)  # type: ignore[attr-defined]
            await until(lambda: len(kept.exchanges) == 2)
            exchange = kept.exchanges[1]
            exchange.start(200, ())
            exchange.write(b"one")
            exchange.write(b"two")
            await until(lambda: len(kept.left) == 2, 1.0)
            assert reading.body in (b"one", b"onetwo")
            assert [answer.ends for answer in (connecting, waiting, reading)] == [0, 0, 0]
            assert (client.active, client.idle) == (0, 0)
            done = post(client)
            await until(lambda: len(kept.exchanges) == 3)
            kept.exchanges[2].respond(200, (), b"")
            await done.wait()
            for late in (done.call.cancel, done.call.pause, done.call.resume):
                late()
            assert client.idle == 1

    run(loop, scenario())


def test_a_paused_call_holds_the_engine_back_and_has_time(loop: str) -> None:
    async def scenario() -> None:
        kept = Kept()
        async with serving(kept) as server, client_of(server.url, limits=ClientLimits(chunk_timeout_s=0.2)) as client:
            answer = post(client)
            answer.call.pause()
            await until(lambda: kept.exchanges)
            exchange = kept.exchanges[0]
            held: list[str] = []
            exchange.on_pause = lambda: held.append("pause")
            exchange.start(200, ())
            written = 0
            while not held:
                exchange.write(b"x" * 50_000)
                written += 50_000
                await asyncio.sleep(0)
                assert written < 100_000_000
            assert answer.body == b""
            await asyncio.sleep(0.4)
            assert answer.ends == 0
            answer.call.resume()
            exchange.end()
            await answer.wait()
            assert len(answer.body) == written
            assert client.idle == 1
            # and the connection reads again
            again = post(client)
            await until(lambda: len(kept.exchanges) == 2)
            kept.exchanges[1].respond(200, (), b"ok")
            assert (await again.wait()).body == b"ok"

    run(loop, scenario())


def test_an_answer_before_the_request_was_sent_costs_the_connection(loop: str) -> None:
    async def scenario() -> None:
        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(OK)
            await asyncio.sleep(5)

        async with scripted(script) as url, client_of(url) as client:
            answer = await post(client, body=b"x" * 20_000_000).wait()
            assert (answer.body, client.idle) == (b"ok", 0)

    run(loop, scenario())


def test_a_failing_receiver_fails_its_call_alone(loop: str, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Answer):
        def on_body(self, data: bytes) -> None:
            raise ZeroDivisionError("on purpose")

    async def scenario() -> None:
        async with serving(echo) as server, client_of(server.url) as client:
            broken = Broken()
            client.send("POST", "/", (), b"", broken)
            await broken.wait()
            assert "could not be handled" in str(broken.error)
            assert (await post(client).wait()).error is None

    with caplog.at_level(logging.CRITICAL + 1):
        run(loop, scenario())


def test_closing_fails_what_runs(loop: str) -> None:
    async def scenario() -> None:
        kept = Kept()
        async with serving(kept) as server:
            client = HttpClient(server.url)
            running = post(client)
            await until(lambda: kept.exchanges)
            connecting = post(client)
            await client.close()
            late = post(client)
            for answer in (running, connecting, late):
                await answer.wait()
                assert "closed" in str(answer.error)
            assert (client.active, client.idle) == (0, 0)
            await HttpClient(server.url).close()

    run(loop, scenario())


def test_fetch_bounds_the_body_and_reports_failures(loop: str) -> None:
    async def scenario() -> None:
        async with serving(lambda exchange: exchange.respond(200, (), b"x" * 1000)) as server, client_of(server.url) as client:
            assert (await client.fetch("GET", "/", max_body_bytes=1000))[2] == b"x" * 1000
            with pytest.raises(InstanceFailed, match="longer than 999 bytes"):
                await client.fetch("GET", "/", max_body_bytes=999)
            await server.stop(0)
            with pytest.raises(InstanceFailed, match="Connection refused"):
                await client.fetch("GET", "/")

    run(loop, scenario())


@pytest.mark.parametrize("url", ["10.0.0.1:80", "ftp://a", "http://", "http://a:99999", "http://a/?q", "http://[::1", "http://ä"])
def test_urls_that_are_none(loop: str, url: str) -> None:
    with pytest.raises(ConfigurationError):
        HttpClient(url)


@pytest.mark.parametrize("path", ["x", "/a b", "/a\r\nX: 1", "/ä", "/\0", ""])
def test_paths_that_are_none(loop: str, path: str) -> None:
    async def scenario() -> None:
        async with client_of("http://127.0.0.1:1") as client:
            with pytest.raises(ValueError, match="request target"):
                post(client, path)
            with pytest.raises(ValueError, match="line break"):
                client.send("POST", "/", ((b"x", b"1\r\ny: 2"),), b"", Answer())

    run(loop, scenario())


def test_tls_and_ipv6(loop: str, tmp_path: Path) -> None:
    (tmp_path / "cert.pem").write_text(CERTIFICATE)
    (tmp_path / "key.pem").write_text(PRIVATE_KEY)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    trusting = ssl.create_default_context(cadata=CERTIFICATE)

    async def scenario() -> None:
        async with serving(echo, ssl=context) as server:
            async with client_of(server.url, ssl=trusting) as client:
                large = b"x" * 1_000_000
                assert (await post(client, body=large).wait()).body == b"POST /x " + large
                assert (await post(client).wait()).body == b"POST /x {}"
                assert server.connections == 1
            async with client_of(server.url) as client:
                assert "certificate verify failed" in str((await post(client).wait()).error).lower()
            async with client_of(server.url.replace("https", "http")) as client:
                assert (await post(client).wait()).error is not None
        async with serving(echo) as server, client_of(server.url.replace("http", "https"), ssl=trusting) as client:
            assert f"127.0.0.1:{server.port}" in str((await post(client).wait()).error)

        from control_plane.transport import HttpServer

        six = HttpServer(echo)
        await six.start("::1")
        async with client_of(six.url) as client:
            assert (await client.fetch("GET", "/x"))[2] == b"GET /x "
        await six.stop(0)

    run(loop, scenario())


def test_without_a_limit_on_connecting(loop: str) -> None:
    async def scenario() -> None:
        async with serving(echo) as server, client_of(server.url, limits=ClientLimits(connect_timeout_s=None)) as client:
            assert (await post(client).wait()).body == b"POST /x {}"

    run(loop, scenario())
