"""No file descriptor left: what is open is served on, it is said once, no engine is blamed, and it serves again afterwards."""

from __future__ import annotations

import asyncio
import json
import re
import resource
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from descriptors import none_left
from raw_engine import RawEngine, raw_engine
from transport_rig import LOOPS, Answer, client_of, post, run

from control_plane.errors import OutOfDescriptors
from control_plane.fleet import HealthSettings
from control_plane.gateway.descriptors import DescriptorWatch
from control_plane.types import ExecutionInstance, HealthStatus

CHAT = b'{"model":"m","messages":[{"role":"user","content":"hi"}],"max_tokens":2}'


# ---- the engines' side


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_connection_that_there_is_no_descriptor_for_is_our_own_shortage(loop: str, host: str) -> None:
    async def scenario() -> None:
        async with raw_engine() as engine, client_of(engine.url.replace("127.0.0.1", host)) as client:
            await asyncio.get_running_loop().run_in_executor(None, int)  # the thread that looks names up
            with none_left():
                answer: Answer = await post(client).wait()
            assert isinstance(answer.error, OutOfDescriptors)
            assert "cannot connect to" in answer.error.message
            assert client.active == 0
            assert (await post(client).wait()).status == 200

    run(loop, scenario())


@pytest.fixture
async def closing_engine() -> AsyncIterator[RawEngine]:
    """It keeps no connection, so that each probe and each request needs a new one."""
    async with raw_engine(keeps=False) as engine:
        engine.says(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}", close=True)
        yield engine


async def test_no_engine_is_blamed(closing_engine: RawEngine, make_stand: Any, open_connection: Any, eventually: Any) -> None:
    stand = await make_stand(engines=0, health=HealthSettings(probe_interval_s=3600.0))
    instance = ExecutionInstance("raw", url=closing_engine.url, model_name="m")
    stand.manager.register_instance(instance)
    await eventually(lambda: instance.health_status == HealthStatus.HEALTHY and not closing_engine.open)
    connection = await open_connection(stand.gateway.url)
    connection.send("POST", "/v1/chat/completions", CHAT)
    assert (await connection.answer()).status == 200
    await eventually(lambda: not closing_engine.open)
    await asyncio.sleep(0.05)  # both ends of the last connection are closed, or they would leave descriptors behind

    with none_left():
        for _ in range(3):
            connection.send("POST", "/v1/chat/completions", CHAT)
            answer = await connection.answer()
            assert (answer.status, answer.error["code"], answer.header("retry-after")) == (503, "no_descriptors", "1")
        assert await stand.manager.executor.health_check("raw")
        assert instance.health_status == HealthStatus.HEALTHY

    connection.send("POST", "/v1/chat/completions", CHAT)
    assert (await connection.answer()).status == 200
    assert instance.active_requests == 0
    assert not {"instance_down", "instance_ejected", "warmup_failed"} & set(stand.manager.events.counts)
    assert stand.manager.metrics.failed == {"no_descriptors": 3}


# ---- what is said


class Heard:
    def __init__(self) -> None:
        self.said: list[tuple[str, dict[str, Any]]] = []

    def event(self, name: str, message: str, **fields: Any) -> None:
        self.said.append((name, fields))


async def test_it_is_said_once_a_minute_and_when_it_is_over() -> None:
    heard, missed = Heard(), 0
    watch = DescriptorWatch(heard, 100, lambda: missed)
    watch.close()

    watch.look(0.0)
    assert heard.said == []
    missed = 7
    for second in range(30):
        watch.look(float(second))
    with none_left():
        watch.look(31.0)
    missed = 9
    watch.look(70.0)
    watch.look(71.0)
    watch.look(80.0)

    assert [name for name, _ in heard.said] == ["descriptors_short", "descriptors_suffice", "descriptors_short", "descriptors_suffice"]
    assert heard.said[0][1] == {"limit": 100, "turned_away": 7}
    assert heard.said[2][1] == {"limit": 100, "turned_away": 2}


# ---- a gateway of its own process

LIMIT = 128


@pytest.fixture
def small_gateway(tmp_path: Path) -> Iterator[tuple[int, Path]]:
    """A gateway that may open 128 files, over a simulated engine; its port, and the file of its standard error."""
    log = tmp_path / "log"
    command = (sys.executable, "-m", "control_plane.cli")
    engine = subprocess.Popen((*command, "sim-engine", "--port", "0", "--model", "m", "--speed", "100"), stdout=subprocess.PIPE, text=True)
    processes = [engine]
    try:
        assert engine.stdout is not None
        url = re.search(r"http://\S+", engine.stdout.readline())
        assert url is not None
        with log.open("w") as file:
            gateway = subprocess.Popen(
                (*command, "serve", "--port", "0", "--engine", url[0]),
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (LIMIT, LIMIT)),
            )
        processes.append(gateway)
        assert gateway.stdout is not None
        port = re.search(r":(\d+)$", gateway.stdout.readline().strip())
        assert port is not None
        yield int(port[1]), log
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def ask(connection: socket.socket) -> int:
    """One chat request on an open connection; its status."""
    connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\ncontent-length: %d\r\n\r\n" % len(CHAT) + CHAT)
    return read_status(connection)


def read_status(connection: socket.socket) -> int:
    """The status of the answer that comes; 0: the other side hung up without one."""
    got = b""
    while b"\r\n\r\n" not in got:
        piece = connection.recv(65536)
        if not piece:
            return 0
        got += piece
    head, _, body = got.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head)
    while length is not None and len(body) < int(length[1]):
        body += connection.recv(65536)
    return int(head[9:12])


def test_a_gateway_out_of_descriptors_serves_what_is_open_and_says_so(small_gateway: tuple[int, Path]) -> None:
    port, log = small_gateway

    def connect() -> socket.socket:
        return socket.create_connection(("127.0.0.1", port), timeout=10)

    with closing(connect()) as first:
        assert ask(first) == 200
        held: list[socket.socket] = []
        refused = cut_off = 0
        try:
            for _ in range(3 * LIMIT):
                connection = connect()
                held.append(connection)
            # whoever is one too many is told so or cut off, none is left hanging
            for connection in held:
                connection.settimeout(0.01)
                try:
                    status = read_status(connection)
                except TimeoutError:
                    continue
                except OSError:
                    status = 0
                refused += status == 503
                cut_off += status == 0
            served = len(held) - refused - cut_off
            assert LIMIT // 2 < served < LIMIT
            assert refused
            for _ in range(5):
                assert ask(first) == 200
            time.sleep(1.5)
            assert ask(held[0]) == 200
        finally:
            for connection in held:
                connection.close()
        time.sleep(0.2)
        with closing(connect()) as later:
            assert ask(later) == 200
        assert ask(first) == 200

    said = [line for line in log.read_text().splitlines() if "event=descriptors_short" in line]
    assert len(said) == 1
    assert f"limit={LIMIT}" in said[0]
    assert "ulimit -n" in said[0]
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith("{")]
    assert sum(line.get("code") == "too_many_connections" for line in lines) == refused
