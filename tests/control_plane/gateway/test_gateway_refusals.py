"""What never reaches an engine: every refusal and every answer of the gateway's own has an id, its API's shape, and a log line."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from control_plane.gateway import GatewaySettings
from control_plane.gateway.endpoints import leads_up
from control_plane.transport import Exchange, ServerLimits

CHAT = "/v1/chat/completions"
MESSAGES = "/v1/messages"


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


async def send(open_connection: Any, stand: Any, raw: bytes, url: str | None = None) -> Any:
    connection = await open_connection(url or stand.gateway.url)
    connection.writer.write(raw)
    return await connection.answer()


def posted(path: str, *lines: str) -> bytes:
    return "\r\n".join((f"POST {path} HTTP/1.1", "host: 127.0.0.1", *lines, "", "")).encode()


TOO_LONG = "content-length: 2000"


@pytest.mark.parametrize(
    ("raw", "status", "code", "path", "method"),
    [
        (posted(CHAT, TOO_LONG), 413, "payload_too_large", CHAT, "POST"),
        (posted(f"http://h{CHAT}?a=b", TOO_LONG), 413, "payload_too_large", CHAT, "POST"),
        (posted(CHAT, "transfer-encoding: gzip"), 501, "invalid_request", CHAT, "POST"),
        (posted(CHAT, "transfer-encoding: chunked") + b"zz\r\n", 400, "invalid_request", CHAT, "POST"),
        (posted(CHAT, "expect: 200-ok", "content-length: 1"), 417, "invalid_request", CHAT, "POST"),
        (posted(CHAT, "x: " + "a" * 70_000), 431, "invalid_request", CHAT, "POST"),
        (b"GET /health HTTP/1.1\r\n\r\n", 400, "invalid_request", "/health", "GET"),
        (b"\x16\x03\x01\x02\r\n\r\n", 400, "invalid_request", "", ""),
    ],
)
async def test_what_the_listener_refuses_is_noted_as_any_other(
    make_stand: Any, tmp_path: Path, open_connection: Any, raw: bytes, status: int, code: str, path: str, method: str
) -> None:
    file = tmp_path / "access.log"
    stand = await make_stand(settings=GatewaySettings(access_log_path=str(file), max_body_bytes=1000))

    answer = await send(open_connection, stand, raw)
    await stand.gateway.stop(0.0)

    assert (answer.status, answer.error["code"]) == (status, code)
    (line,) = lines_of(file)
    assert (line["status"], line["code"], line["path"], line["method"]) == (status, code, path, method)
    assert line["request_id"] == answer.header("x-request-id")
    assert stand.gateway.relay.refused[code] == 1


async def test_a_refusal_keeps_the_clients_id_and_origin(make_stand: Any, open_connection: Any) -> None:
    settings = GatewaySettings(access_log=False, max_body_bytes=1000, cors_origins=("https://a.example",))
    stand = await make_stand(settings=settings)

    answer = await send(open_connection, stand, posted(CHAT, "x-request-id: mine", "origin: https://a.example", TOO_LONG))

    assert answer.header("x-request-id") == "mine"
    assert answer.header("access-control-allow-origin") == "https://a.example"


async def test_a_refusal_of_the_messages_api_has_its_shape(make_stand: Any, open_connection: Any) -> None:
    stand = await make_stand(settings=GatewaySettings(access_log=False, max_body_bytes=1000))

    answer = await send(open_connection, stand, posted(MESSAGES, TOO_LONG))

    assert answer.json["type"] == "error"
    assert (answer.error["type"], answer.error["code"]) == ("request_too_large", "payload_too_large")


async def test_a_request_that_stops_half_way_is_told_and_noted(make_stand: Any, tmp_path: Path, open_connection: Any) -> None:
    file = tmp_path / "access.log"
    limits = ServerLimits(header_timeout_s=0.05, body_timeout_s=0.05)
    stand = await make_stand(settings=GatewaySettings(access_log_path=str(file)), gateway_options={"limits": limits})

    in_head = await send(open_connection, stand, b"POST /v1/completions HTTP/1.1\r\nhost: a\r\n")
    in_body = await send(open_connection, stand, posted(CHAT, "content-length: 9") + b"{")
    await stand.gateway.stop(0.0)

    assert (in_head.status, in_body.status) == (408, 408)
    assert [(line["path"], line["status"], line["code"]) for line in lines_of(file)] == [
        ("/v1/completions", 408, "timeout"),
        (CHAT, 408, "timeout"),
    ]


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [("GET", MESSAGES, None), ("GET", f"{MESSAGES}/batches", None), ("POST", f"{MESSAGES}/batches", {"requests": []})],
)
async def test_errors_below_the_messages_api_have_its_shape(stand: Any, method: str, path: str, body: Any) -> None:
    answer = await stand.ask(method, path, body)

    assert answer.status in (404, 405)
    assert answer.json["type"] == "error"


async def test_answers_to_messages_carry_the_id_under_the_name_that_its_clients_read(stand: Any) -> None:
    good = await stand.ask("POST", MESSAGES, {"model": "m", "max_tokens": 4, "messages": []}, x_request_id="mine")
    refused = await stand.ask("POST", MESSAGES, {"model": "m", "priority": "none"}, x_request_id="mine")
    unknown = await stand.ask("GET", f"{MESSAGES}/batches", x_request_id="mine")

    for answer in (good, refused, unknown):
        assert (answer.header("request-id"), answer.header("x-request-id")) == ("mine", "mine")


async def test_pages_and_admin_are_noted_and_probes_are_not(make_stand: Any, tmp_path: Path) -> None:
    file = tmp_path / "access.log"
    stand = await make_stand(settings=GatewaySettings(access_log_path=str(file)), gateway_options={"metrics": lambda: ("text/plain", b"")})

    for path in ("/health", "/ready", "/metrics"):
        await stand.ask("GET", path)
    answers = [
        await stand.ask("GET", "/v1/models", x_request_id="r0"),
        await stand.ask("GET", "/v1/models/nobody", x_request_id="r1"),
        await stand.ask("GET", "/nowhere\t".strip(), x_request_id="r2"),
        await stand.ask("DELETE", CHAT, x_request_id="r3"),
        await stand.ask("GET", "/control/v1/instances", x_request_id="r4"),
        await stand.ask("GET", "/control/v1/instances/nobody", x_request_id="r5"),
        await stand.ask("GET", "/control/v1/queue", host="evil.example", x_request_id="r6"),
    ]
    await stand.gateway.stop(0.0)

    assert [answer.header("x-request-id") for answer in answers] == [f"r{n}" for n in range(7)]
    assert [(line["request_id"], line["status"], line.get("code", "")) for line in lines_of(file)] == [
        ("r0", 200, ""),
        ("r1", 404, "model_not_found"),
        ("r2", 404, "not_found"),
        ("r3", 405, "method_not_allowed"),
        ("r4", 200, ""),
        ("r5", 404, ""),
        ("r6", 403, "forbidden"),
    ]


@pytest.mark.parametrize("path", ["/v1/../metrics", "/v1/./x", "/v1/a/%2e%2E/b", "/v1/a%2f..%2Fb", "/v1/.."])
async def test_a_path_with_dot_segments_is_not_relayed(stand: Any, path: str) -> None:
    answer = await stand.ask("POST", path, {"model": "m"})

    assert (answer.status, answer.error["code"]) == (404, "not_found")
    assert stand.engine.seen == []


def test_dots_inside_a_name_are_no_dot_segments() -> None:
    assert not any(map(leads_up, ("/v1/images.generate", "/v1/a..b", "/v1/...", "/v1/plain", "/v1/a%20b")))


# ---- towards the engine


async def test_a_stream_without_its_end_is_told_also_where_the_url_has_a_query(stand: Any) -> None:
    def stop_early(exchange: Exchange) -> None:
        exchange.start(200, [(b"content-type", b"text/event-stream")])
        exchange.write(b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"a"}}]}\n\n')
        exchange.end()

    stand.engine.answer = stop_early

    answer = await stand.ask("POST", f"{CHAT}?api-version=1", {"model": "m", "messages": [], "stream": True})

    assert stand.engine.seen[-1].target == f"{CHAT}?api-version=1".encode()
    assert b'"code":"instance_failed"' in answer.body
    assert b"[DONE]" not in answer.body


@pytest.mark.parametrize(
    ("status", "code", "kind"), [(413, "invalid_request", "invalid_request_error"), (500, "instance_failed", "server_error")]
)
async def test_a_text_that_an_engine_answers_an_error_with_goes_into_the_shape(make_stand: Any, status: int, code: str, kind: str) -> None:
    stand = await make_stand(max_attempts=1)
    stand.engine.answer = lambda exchange: exchange.respond(status, [(b"content-type", b"text/html")], b"<p>too bad</p>")

    answer = await stand.ask("POST", CHAT, {"model": "m", "messages": []})
    messages = await stand.ask("POST", MESSAGES, {"model": "m", "messages": []})

    assert (answer.status, answer.header("content-type")) == (status, "application/json")
    assert answer.error == {"message": "<p>too bad</p>", "type": kind, "param": None, "code": code}
    assert (messages.status, messages.json["type"], messages.error["message"]) == (status, "error", "<p>too bad</p>")


async def test_the_instances_own_key_takes_the_place_of_both_of_the_clients(stand: Any) -> None:
    stand.manager.get_instances()[0].api_key = "engine-key"

    await stand.ask("POST", MESSAGES, {"model": "m", "messages": []}, x_api_key="client-key", authorization="Bearer client-key")

    assert stand.engine.header(b"authorization") == b"Bearer engine-key"
    assert stand.engine.header(b"x-api-key") is None


async def test_the_last_instance_of_a_model_is_asked_also_when_it_is_ejected(stand: Any) -> None:
    good, (instance,) = stand.engine.answer, stand.manager.get_instances()
    for _ in range(5):
        stand.engine.answer = Exchange.abort
        await stand.ask("POST", "/v1/completions", {"model": "m"})
        if instance.health_status == "unhealthy":
            break
    assert instance.health_status == "unhealthy"
    stand.engine.answer = good

    answer = await asyncio.wait_for(stand.ask("POST", CHAT, {"model": "m", "messages": []}), 4.0)

    assert answer.status == 200
