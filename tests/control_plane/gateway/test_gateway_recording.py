"""Recordings: a gateway's traffic as a trace that the simulator loads, and nothing in it of what anybody said."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest

from control_plane.cli import operate
from control_plane.cli.record import TraceFile, record
from control_plane.errors import ControlPlaneError
from control_plane.gateway import GatewaySettings, recording
from control_plane.gateway.recording import BLOCK_BYTES, MAX_RECORDINGS, Recording, prompt_bytes
from control_plane.simulator.resample import at_rate
from control_plane.simulator.traces import load_trace
from control_plane.transport import Exchange

RECORD = "/control/v1/record"
SECRET = "the patient's name is Ann"
LONG = " ".join([SECRET] * 200)


def answer_with(prompt_tokens: int, output_tokens: int) -> Any:
    def answer(exchange: Exchange) -> None:
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": output_tokens}
        exchange.respond(200, [(b"content-type", b"application/json")], json.dumps({"id": "c", "choices": [], "usage": usage}).encode())

    return answer


class Reader:
    """Reads ``/control/v1/record`` beside the test."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection
        self.data = b""
        self.done: asyncio.Task[None]

    @classmethod
    async def open(cls, stand: Any, open_connection: Any, query: str = "") -> Reader:
        reader = cls(await open_connection(stand.gateway.url))
        reader.connection.send("GET", RECORD + query)
        head = await reader.connection.head()
        assert (head.status, head.header("content-type")) == (200, "application/x-ndjson")
        reader.data = await reader.connection.chunk()
        reader.done = asyncio.create_task(reader._read())
        return reader

    async def _read(self) -> None:
        with contextlib.suppress(ValueError, asyncio.IncompleteReadError):  # cut off at the end of a test
            while data := await self.connection.chunk():
                self.data += data

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.data.splitlines() if line.strip()]

    @property
    def requests(self) -> list[dict[str, Any]]:
        return [line for line in self.lines if "trace" not in line]


def chat(*turns: str, **fields: Any) -> dict[str, Any]:
    roles = ("user", "assistant")
    return {"model": "m", "messages": [{"role": roles[place % 2], "content": text} for place, text in enumerate(turns)], **fields}


async def test_a_recording_is_a_trace_without_texts(make_stand: Any, open_connection: Any, eventually: Any, tmp_path: Path) -> None:
    stand = await make_stand()
    reader = await Reader.open(stand, open_connection)
    stand.engine.answer = answer_with(1_300, 40)
    await stand.ask("POST", "/v1/chat/completions", chat(LONG, user="ann"), x_session_id="visit", x_slo_ttft_ms="900", x_priority="high")
    stand.engine.answer = answer_with(2_600, 40)
    more = chat(LONG, "yes", LONG.upper(), user="ann")
    await stand.ask("POST", "/v1/chat/completions", more, x_session_id="visit", x_gateway_inference_objective="batch")
    stand.engine.answer = answer_with(3, 2)
    await stand.ask("POST", "/v1/completions", {"model": "m", "prompt": "hi"})
    await stand.ask("POST", "/v1/embeddings", {"model": "m", "input": SECRET})
    await stand.ask("POST", "/v1/chat/completions", {"model": "nobody", "messages": []})
    await eventually(lambda: len(reader.requests) == 3)
    await stand.gateway.stop(5.0)
    await reader.done

    for told in ("Ann", "ann", "visit", "patient"):
        assert told.encode() not in reader.data
    first, second, third = reader.requests
    assert (first["prompt_tokens"], first["output_tokens"], first["priority"], first["ttft_slo_ms"]) == (1_300, 40, "high", 900.0)
    assert second["slo_class"] == "batch"
    assert first["session_id"] == second["session_id"]
    assert first["tenant"] == second["tenant"]
    assert first["arrival_s"] <= second["arrival_s"] <= third["arrival_s"]
    whole = len(LONG) // BLOCK_BYTES
    assert first["block_ids"][:whole] == second["block_ids"][:whole]
    assert not set(first["block_ids"]) & set(third["block_ids"])
    assert "tenant" not in third
    footer = reader.lines[-1]
    # what never got to the manager was no traffic that could be served
    assert (footer["recorded"], footer["left_out"], footer["dropped"]) == (3, 2, 0)

    path = tmp_path / "recorded.jsonl"
    path.write_bytes(reader.data)
    workload = load_trace(path)
    assert [(one.prompt_tokens, one.output_tokens) for one in workload.requests] == [(1_300, 40), (2_600, 40), (3, 2)]
    assert workload.requests[0].arrival_s == 0.0
    one, two, alone = workload.requests
    assert one.session_id == two.session_id != alone.session_id == ""
    assert (one.priority, two.slo_class) == ("high", "batch")
    assert (one.ttft_slo_ms, one.has_targets, two.has_targets) == (900.0, True, False)
    # a block is as many tokens as its bytes were in this traffic, in whole blocks of an engine
    assert workload.block_tokens == pytest.approx(BLOCK_BYTES * 3_903 / sum(line["prompt_bytes"] for line in reader.requests), abs=8)
    assert workload.block_tokens % 16 == 0
    assert one.block_ids[: len(one.block_ids) - 1] == two.block_ids[: len(one.block_ids) - 1]
    assert len(at_rate(workload, 100, 10, Random(1)).requests) >= 990


async def test_sessions_are_found_by_their_blocks(make_stand: Any, open_connection: Any, eventually: Any, tmp_path: Path) -> None:
    stand = await make_stand()
    reader = await Reader.open(stand, open_connection)
    stand.engine.answer = answer_with(1_300, 40)
    for who in ("a", "b", "c"):
        await stand.ask("POST", "/v1/chat/completions", chat(who + LONG))
        await stand.ask("POST", "/v1/chat/completions", chat(who + LONG, "ok", "go on"))
    await eventually(lambda: len(reader.requests) == 6)
    (tmp_path / "t").write_bytes(reader.data)
    assert [one.session_id for one in load_trace(tmp_path / "t").requests] == ["s1", "s1", "s2", "s2", "s3", "s3"]


async def test_two_recordings_cannot_be_joined(make_stand: Any, open_connection: Any, eventually: Any) -> None:
    stand = await make_stand()
    one, other = [await Reader.open(stand, open_connection) for _ in range(2)]
    stand.engine.answer = answer_with(1_300, 40)
    await stand.ask("POST", "/v1/chat/completions", chat(LONG, user="ann"))
    await eventually(lambda: one.requests and other.requests)
    a, b = one.requests[0], other.requests[0]
    assert a["arrival_s"] == b["arrival_s"]
    assert a["tenant"] != b["tenant"]
    assert not set(a["block_ids"]) & set(b["block_ids"])


async def test_nothing_runs_while_nobody_records(make_stand: Any, open_connection: Any, eventually: Any) -> None:
    stand = await make_stand()
    relay = stand.gateway.relay
    assert relay.on_end is None
    reader = await Reader.open(stand, open_connection)
    assert relay.on_end is not None
    reader.done.cancel()
    await reader.connection.close()
    await eventually(lambda: relay.on_end is None)
    await Reader.open(stand, open_connection, "?duration_s=0.2")
    await eventually(lambda: relay.on_end is None)


async def test_it_ends_in_time_and_says_that_it_lives(make_stand: Any, open_connection: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "KEEPALIVE_S", 0.01)
    monkeypatch.setattr(recording, "FLUSH_INTERVAL_S", 0.02)
    stand = await make_stand()
    reader = await Reader.open(stand, open_connection, "?duration_s=0.2")
    await asyncio.wait_for(reader.done, 10)
    assert b"\n\n" in reader.data
    assert [line["trace"] for line in reader.lines] == [1, 1]


async def test_streams_and_clients_that_leave(make_stand: Any, open_connection: Any, eventually: Any) -> None:
    stand = await make_stand()
    reader = await Reader.open(stand, open_connection)

    def stream(exchange: Exchange) -> None:
        exchange.start(200, [(b"content-type", b"text/event-stream")])
        for _ in range(3):
            exchange.write(b'data: {"choices":[{"delta":{"content":"x"}}]}\n\n')

    stand.engine.answer = stream
    client = await open_connection(stand.gateway.url)
    client.send("POST", "/v1/chat/completions", json.dumps(chat(LONG, stream=True)).encode())
    await client.head()
    await client.chunk()
    await eventually(lambda: any(job.output_tokens for job in stand.manager.lifecycle.records.live()))
    await client.close()
    await eventually(lambda: reader.requests)
    assert reader.requests[0]["output_tokens"] in (1, 2, 3)  # as far as it was counted
    assert reader.requests[0]["prompt_tokens"] > 500  # estimated: the engine did not come to tell

    stand.engine.answer = lambda exchange: exchange.respond(400, [], b"no")
    await stand.ask("POST", "/v1/chat/completions", chat(LONG))
    await stand.gateway.stop(5.0)
    await reader.done
    assert (reader.lines[-1]["recorded"], reader.lines[-1]["left_out"]) == (1, 1)


async def test_there_are_bounds(make_stand: Any, open_connection: Any, eventually: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stand = await make_stand()
    readers = [await Reader.open(stand, open_connection) for _ in range(MAX_RECORDINGS)]
    refused = await stand.ask("GET", RECORD)
    assert (refused.status, refused.error["code"]) == (429, "rate_limited")
    monkeypatch.setattr(recording, "MAX_WAITING_BYTES", 10)
    await stand.ask("POST", "/v1/chat/completions", chat(LONG))
    await stand.gateway.stop(5.0)
    await readers[0].done
    assert (readers[0].lines[-1]["recorded"], readers[0].lines[-1]["dropped"]) == (0, 1)


@pytest.mark.parametrize("given", ["0", "-1", "nan", "inf", "soon", ""])
async def test_a_duration_that_is_none(make_stand: Any, given: str) -> None:
    refused = await (await make_stand()).ask("GET", f"{RECORD}?duration_s={given}")
    assert (refused.status, refused.error["param"]) == (400, "duration_s")


async def test_it_is_guarded_like_the_rest(make_stand: Any) -> None:
    stand = await make_stand(settings=GatewaySettings(access_log=False, admin_key="sesame"))
    assert (await stand.ask("GET", RECORD)).status == 401
    assert (await stand.ask("HEAD", RECORD, authorization="Bearer sesame")).status == 200
    assert stand.gateway.relay.on_end is None


async def test_what_a_model_reads_is_hashed_in_its_order() -> None:
    body = b'{"messages":[1],"x":2,"system":"s","tools":[{"t":1}],"model":"m"}'
    assert prompt_bytes(body, "messages", "system") == b'[{"t":1}]\n"s"\n[1]'
    assert prompt_bytes(b"{", "messages", "") == b""
    image = b'{"messages":["data:image/png;base64,%b"]}'
    one, same, other = (prompt_bytes(image % data, "messages", "") for data in (b"A" * 9_000, b"A" * 9_000, b"B" * 9_000))
    assert one == same != other
    assert len(one) < 2_200
    made = Recording()
    assert len(made.blocks(b"x" * (3 * BLOCK_BYTES + 1))) == 4
    assert made.blocks(b"x" * 5_000)[:3] == made.blocks(b"x" * 3_072)
    made.close()


# ---- the command


async def test_the_command_writes_a_file(make_stand: Any, eventually: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stand = await make_stand()
    path = tmp_path / "trace.jsonl"

    def run() -> None:
        with contextlib.closing(operate.AdminClient(stand.gateway.url)) as client:
            record(client, str(path), 1.0)

    recorded = asyncio.create_task(asyncio.to_thread(run))
    await eventually(lambda: stand.gateway.relay.on_end is not None)
    await stand.ask("POST", "/v1/chat/completions", chat(LONG))
    await stand.ask("POST", "/v1/chat/completions", {"model": "nobody", "messages": []})
    await recorded
    assert capsys.readouterr().err == f"1 requests recorded in {path}; 1 left out (refused, failed, or no text generation)\n"
    assert len(load_trace(path).requests) == 1


async def test_a_gateway_that_dies_is_told(tmp_path: Path) -> None:
    async def half(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b'HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\nb\r\n{"trace":1}\r\n4\r\n\n{}\n\r\n')
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(half, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    path = tmp_path / "t"
    client = operate.AdminClient(f"http://127.0.0.1:{port}")
    try:
        with pytest.raises(ControlPlaneError, match="broke the recording off; 1 requests"):
            await asyncio.to_thread(record, client, str(path), None)
    finally:
        client.close()
        server.close()
    assert path.read_bytes() == b'{"trace":1}\n{}\n'


async def test_ctrl_c_ends_it_well(make_stand: Any, eventually: Any, tmp_path: Path) -> None:
    stand = await make_stand()
    path = tmp_path / "trace.jsonl"
    command = (sys.executable, "-m", "control_plane.cli", "record", "--url", stand.gateway.url, "--out", str(path))
    # as from a terminal: what runs in the background of a script has it ignored, and so would its children
    as_in_a_terminal = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    child = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE, preexec_fn=as_in_a_terminal)
    await eventually(lambda: stand.gateway.relay.on_end is not None, 20)
    await stand.ask("POST", "/v1/chat/completions", chat(LONG))
    await eventually(lambda: path.read_bytes().count(b"\n") == 2)
    child.send_signal(signal.SIGINT)
    _, said = await asyncio.wait_for(child.communicate(), 20)
    assert child.returncode == 0
    assert said.decode().endswith(f"1 requests recorded in {path}\n")


HEAD = b'{"trace":1,"block_bytes":1024}\n'


def lines(count: int, first: int = 0) -> list[bytes]:
    return [b'{"arrival_s":%d,"prompt_tokens":9,"output_tokens":9}\n' % (first + number) for number in range(count)]


def test_what_was_in_the_file_stays_until_the_recording_begins(tmp_path: Path) -> None:
    path = tmp_path / "t"
    path.write_bytes(b"last week's\n")
    with (
        contextlib.closing(operate.AdminClient("http://127.0.0.1:1")) as client,
        pytest.raises(ControlPlaneError, match="no gateway answers"),
    ):
        record(client, str(path), None)
    assert path.read_bytes() == b"last week's\n"
    with contextlib.closing(TraceFile(str(path))) as file:
        file.add(HEAD)
    assert path.read_bytes() == HEAD


@pytest.mark.parametrize("how", ["moved", "removed", "emptied", "another in its place"])
def test_a_file_that_is_rotated_is_begun_again_with_its_head(how: str, tmp_path: Path) -> None:
    path, old = tmp_path / "t", tmp_path / "t.1"
    with contextlib.closing(TraceFile(str(path))) as file:
        for line in (HEAD, *lines(3)):
            file.add(line)
        if how == "moved":
            path.rename(old)
        elif how == "removed":
            path.unlink()
        elif how == "emptied":
            old.write_bytes(path.read_bytes())
            os.truncate(path, 0)
        else:
            path.rename(old)
            path.touch()
        for line in lines(2, 3):
            file.add(line)
    assert path.read_bytes() == b"".join([HEAD, *lines(2, 3)])
    assert len(load_trace(path).requests) == 2
    if how != "removed":
        joined = tmp_path / "joined"
        joined.write_bytes(old.read_bytes() + path.read_bytes())
        assert [one.arrival_s for one in load_trace(joined).requests] == [0, 1, 2, 3, 4]


def test_a_full_disk_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t"
    whole, free = os.write, len(HEAD) + len(lines(1)[0]) + 10

    def write(file: int, data: Any) -> int:
        nonlocal free
        if not free:
            raise OSError(28, "No space left on device")
        took = whole(file, data[:free])
        free -= took
        return took

    monkeypatch.setattr(os, "write", write)
    with contextlib.closing(TraceFile(str(path))) as file:
        file.add(HEAD)
        file.add(lines(1)[0])
        with pytest.raises(OSError, match="No space left"):
            file.add(lines(1)[0])
    assert path.read_bytes() == HEAD + lines(1)[0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full here")
async def test_a_file_that_takes_no_more_is_told_and_the_gateway_goes_on(make_stand: Any, eventually: Any) -> None:
    stand = await make_stand()
    command = (sys.executable, "-m", "control_plane.cli", "record", "--url", stand.gateway.url, "--out", "/dev/full")
    child = await asyncio.create_subprocess_exec(*command, stderr=subprocess.PIPE)
    _, said = await asyncio.wait_for(child.communicate(), 20)
    assert child.returncode == 1
    assert said.decode() == "control-plane: /dev/full cannot be written any more: No space left on device; 0 requests were recorded\n"
    await stand.ask("POST", "/v1/chat/completions", chat(LONG))
    await eventually(lambda: stand.gateway.relay.on_end is None, 20)
