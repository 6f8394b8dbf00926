"""The access log: one line a request, no text, and no disk can stop the serving."""

from __future__ import annotations

import asyncio
import json
import resource
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from control_plane.clock import ManualClock
from control_plane.gateway import GatewaySettings
from control_plane.gateway import access_log as module
from control_plane.gateway.access_line import Line
from control_plane.gateway.access_log import AccessLog
from control_plane.transport import Exchange


class Heard:
    """An EventSink that keeps names."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def event(self, name: str, message: str, **fields: Any) -> None:
        self.names.append(name)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def test_one_line_a_request_without_text(make_stand: Any, tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    stand = await make_stand(settings=GatewaySettings(access_log_path=str(path)))
    secret = "what-the-user-said"
    await stand.ask(
        "POST", "/v1/chat/completions", {"model": "m", "messages": [{"role": "user", "content": secret}], "user": "ann"}, x_request_id="r1"
    )
    await stand.ask("POST", "/v1/chat/completions", {"model": "nobody"}, x_request_id="r2")
    await stand.ask("POST", "/v1/chat/completions", b'{"' + secret.encode(), x_request_id="r3")
    await stand.ask("GET", "/health")
    await stand.gateway.stop(0.0)

    good, unknown, malformed = lines_of(path)

    assert good.pop("time").endswith("Z")
    assert good.pop("total_ms") >= good.pop("queue_ms") >= 0
    assert good.pop("ttft_ms") >= 0
    assert good == {
        "request_id": "r1",
        "method": "POST",
        "path": "/v1/chat/completions",
        "status": 200,
        "tenant": "ann",
        "model": "m",
        "instance": "e0",
        "input_tokens": 3,
        "output_tokens": 2,
    }
    assert (unknown["request_id"], unknown["status"], unknown["code"]) == ("r2", 404, "model_not_found")
    assert (malformed["request_id"], malformed["status"], malformed["code"]) == ("r3", 400, "invalid_request")
    assert secret not in path.read_text()


async def test_a_client_that_left_and_an_engine_that_broke_are_told_apart(
    make_stand: Any, tmp_path: Path, open_connection: Any, eventually: Any
) -> None:
    path = tmp_path / "access.log"
    stand = await make_stand(settings=GatewaySettings(access_log_path=str(path)), max_attempts=1)
    stand.engine.answer = lambda exchange: None
    connection = await open_connection(stand.gateway.url)
    connection.send("POST", "/v1/completions", b'{"model":"m"}')
    await eventually(lambda: stand.engine.seen)
    await connection.close()
    await eventually(lambda: stand.gateway.open_requests == 0)
    stand.engine.answer = Exchange.abort
    await stand.ask("POST", "/v1/completions", {"model": "m"})
    await stand.gateway.stop(0.0)

    left, broke = lines_of(path)

    assert (left["status"], left["code"]) == (499, "cancelled")
    assert (broke["status"], broke["code"]) == (502, "instance_failed")


async def test_no_field_can_forge_a_line(make_stand: Any, tmp_path: Path) -> None:
    path = tmp_path / "access.log"
    stand = await make_stand(settings=GatewaySettings(access_log_path=str(path)))
    await stand.ask("POST", "/v1/completions", {"model": "m", "user": 'ann"}\n{"status":200'})
    await stand.gateway.stop(0.0)

    assert [line["tenant"] for line in lines_of(path)] == ['ann"}\n{"status":200']


async def test_a_disk_that_takes_nothing_stops_no_request(make_stand: Any, tmp_path: Path, monkeypatch: Any, eventually: Any) -> None:
    monkeypatch.setattr(module, "FLUSH_INTERVAL_S", 0.01)
    stand = await make_stand(settings=GatewaySettings(access_log_path=str(tmp_path)))

    for _ in range(3):
        assert (await stand.ask("POST", "/v1/completions", {"model": "m"})).status == 200
        await asyncio.sleep(0.03)

    await eventually(lambda: stand.gateway.access_log_dropped == 3)
    assert stand.manager.events.counts["access_log_failed"] == 1


async def test_it_says_when_it_works_again(tmp_path: Path, eventually: Any) -> None:
    heard = Heard()
    folder = tmp_path / "later"
    log = AccessLog(ManualClock(), heard, str(folder / "access.log"))
    log.write(0.0, Line("lost", "POST", "/", 200, 1.0))
    await log.close()
    await eventually(lambda: heard.names == ["access_log_failed"])
    folder.mkdir()
    log.write(0.0, Line("kept", "POST", "/", 200, 1.0))
    await log.close()

    assert [line["request_id"] for line in lines_of(folder / "access.log")] == ["kept"]
    await eventually(lambda: heard.names == ["access_log_failed", "access_log_works"])
    assert log.dropped == 1


async def test_a_disk_that_fills_up_tears_one_line_and_no_other(tmp_path: Path, monkeypatch: Any, eventually: Any) -> None:
    heard, path = Heard(), tmp_path / "access.log"
    log = AccessLog(ManualClock(), heard, str(path))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (700, hard))  # the file takes 700 bytes, and then no more
    try:
        for batch in range(3):
            for n in range(5):
                log.write(0.0, Line(f"r{batch}-{n}", "POST", "/v1/chat/completions", 200, 1.0))
            await log.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log.write(0.0, Line("later", "POST", "/", 200, 1.0))
    await log.close()
    await eventually(lambda: heard.names == ["access_log_failed", "access_log_works"])

    lines = path.read_text().splitlines()
    whole = [json.loads(line)["request_id"] for line in lines if line.endswith("}")]
    torn = [line for line in lines if not line.endswith("}")]
    assert len(torn) == 1
    assert whole == [f"r{n // 5}-{n % 5}" for n in range(len(whole) - 1)] + ["later"]
    assert log.dropped == 15 - (len(whole) - 1)


@pytest.mark.parametrize("where", ["access log", "standard error", "standard output"])
def test_a_gateway_whose_logs_are_on_a_full_disk_serves(where: str, tmp_path: Path) -> None:
    """``/dev/full`` takes nothing, as a full disk does."""
    port = free_port()
    command = [sys.executable, "-m", "control_plane.cli", "serve", "--port", str(port)]
    if where == "access log":
        command += ["--access-log-path", "/dev/full"]
    error_log = tmp_path / "stderr"
    with Path("/dev/full").open("wb") as full, error_log.open("wb") as file:
        stdout = full if where == "standard output" else subprocess.DEVNULL
        process = subprocess.Popen(command, stdout=stdout, stderr=full if where == "standard error" else file)
        try:
            wait_for_port(port, process)
            for _ in range(3):
                assert status_of(port, "/v1/models") == 200
                time.sleep(0.6)  # the log is written every half second
            page = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read().decode()
        finally:
            process.terminate()
            status = process.wait(20)
    assert status == 0
    said = error_log.read_text()
    if where == "standard output":
        assert f"listening on http://127.0.0.1:{port} (standard output cannot be written" in said
    else:
        assert 'control_plane_events_total{event="access_log_failed"} 1.0' in page
    if where == "access log":
        assert said.count("event=access_log_failed") == 1
        assert "No space left on device" in said


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for_port(port: int, process: subprocess.Popen[bytes]) -> None:
    for _ in range(200):
        assert process.poll() is None
        with socket.socket() as tried:
            if tried.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise AssertionError("the gateway does not listen")


def status_of(port: int, path: str) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
        return int(answer.status)


async def test_what_waits_for_the_disk_is_bounded(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "MAX_WAITING_BYTES", 500)
    log = AccessLog(ManualClock(), Heard(), str(tmp_path / "access.log"))

    for n in range(100):
        log.write(0.0, Line(f"r{n}", "POST", "/", 200, 1.0))
    await log.close()

    kept = lines_of(tmp_path / "access.log")
    assert 0 < len(kept) < 20
    assert log.dropped == 100 - len(kept)


def test_stamps_are_iso_and_move_on() -> None:
    clock = ManualClock()
    log = AccessLog(clock, Heard())

    assert log.stamp(0.0) == "2026-01-01T00:00:00.000Z"
    assert log.stamp(0.25) == "2026-01-01T00:00:00.250Z"
    assert log.stamp(61.5) == "2026-01-01T00:01:01.500Z"
