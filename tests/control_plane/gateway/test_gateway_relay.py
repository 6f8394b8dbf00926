"""What goes through the gateway and how: bytes and headers to the engine; head, chunks and errors back to the client."""

from __future__ import annotations

import asyncio
import gc
import json
import socket
from types import MethodType
from typing import Any

import pytest

from control_plane.gateway import GatewaySettings
from control_plane.gateway.sink import ClientSink
from control_plane.job import Job
from control_plane.transport import Exchange
from control_plane.types import ExecutionInstance

JSON = (b"content-type", b"application/json")
EVENTS = (b"content-type", b"text/event-stream; charset=utf-8")
CHAT = "/v1/chat/completions"


def event(fields: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def token(text: str) -> bytes:
    return event({"id": "c", "choices": [{"index": 0, "delta": {"content": text}}]})


USAGE = event({"id": "c", "choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}})
DONE = b"data: [DONE]\n\n"


def stream_of(*events: bytes) -> Any:
    def answer(exchange: Exchange) -> None:
        exchange.start(200, [EVENTS], None)
        for one in events:
            exchange.write(one)
        exchange.end()

    return answer


def error_of(status: int, body: bytes, *headers: tuple[bytes, bytes]) -> Any:
    return lambda exchange: exchange.respond(status, [JSON, *headers], body)


# ---- to the engine


@pytest.mark.parametrize(
    "path",
    [
        CHAT,
        "/v1/completions",
        "/v1/embeddings",
        "/v1/responses",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/rerank",
        "/v2/rerank",
        "/rerank",
        "/v1/score",
        "/score",
        "/tokenize",
        "/detokenize",
        "/pooling",
        "/classify",
        "/v1/chat/completions/batch",
        "/v1/something/new",
    ],
)
async def test_every_path_is_relayed_byte_for_byte(stand: Any, path: str) -> None:
    body = b' {"model" : "m", "unknown":{"a":[1,2.50,"\xc3\xa9"]},\n"messages":[],"prompt":"x","input":"x"}'

    answer = await stand.ask("POST", path + "?beta=true&x=%20", body)

    assert answer.status == 200
    seen = stand.engine.seen[-1]
    assert (seen.method, seen.target, seen.body) == ("POST", path.encode() + b"?beta=true&x=%20", body)


async def test_a_model_that_was_not_named_is_added(stand: Any) -> None:
    answer = await stand.ask("POST", CHAT, {"messages": []})

    assert answer.status == 200
    assert json.loads(stand.engine.body) == {"messages": [], "model": "m"}


async def test_several_models_and_none_named(make_stand: Any) -> None:
    stand = await make_stand(engines=2)
    stand.manager.get_instances()[1].model_name = "other"
    stand.manager.get_instances()[1].served_models = ["other"]
    stand.manager.fleet.refresh(stand.manager.get_instances()[1])

    answer = await stand.ask("POST", CHAT, {"messages": []})

    assert answer.status == 400
    assert answer.error["code"] == "invalid_request"
    assert answer.error["param"] == "model"
    assert "m" in answer.error["message"]
    assert "other" in answer.error["message"]


async def test_credentials_and_traces_go_on_and_other_headers_do_not(stand: Any) -> None:
    await stand.ask(
        "POST",
        CHAT,
        {"model": "m"},
        authorization="Bearer secret",
        x_api_key="k",
        anthropic_version="2023-06-01",
        traceparent="00-ab-cd-01",
        cookie="a=b",
        x_request_id="mine",
        x_priority="high",
        origin="http://evil",
        content_type="application/json; charset=utf-8",
    )

    header = stand.engine.header
    assert header(b"authorization") == b"Bearer secret"
    assert header(b"x-api-key") == b"k"
    assert header(b"anthropic-version") == b"2023-06-01"
    assert header(b"traceparent") == b"00-ab-cd-01"
    assert header(b"x-request-id") == b"mine"
    assert header(b"content-type") == b"application/json; charset=utf-8"
    assert header(b"cookie") is None
    assert header(b"origin") is None
    assert header(b"x-priority") is None


async def test_an_instances_own_key_replaces_the_clients(stand: Any) -> None:
    stand.manager.get_instances()[0].api_key = "engine-key"

    await stand.ask("POST", CHAT, {"model": "m"}, authorization="Bearer client-key")

    assert stand.engine.header(b"authorization") == b"Bearer engine-key"


async def test_own_fields_do_not_reach_the_engine_and_take_effect(stand: Any) -> None:
    answer = await stand.chat(priority="low", slo_deadline_ms=5000, request_id="from-body", temperature=0.5)

    assert json.loads(stand.engine.body) == {"model": "m", "messages": [], "temperature": 0.5}
    assert answer.header("x-request-id") == "from-body"
    assert stand.manager.explain("from-body")["priority"] == "low"


async def test_priority_is_sent_as_vllms_integer_where_the_engine_schedules_by_it(stand: Any) -> None:
    stand.manager.get_instances()[0].priority_scheduling = True

    await stand.chat(priority="critical")
    assert json.loads(stand.engine.body)["priority"] == -2
    await stand.chat()
    assert "priority" not in json.loads(stand.engine.body)


async def test_a_form_is_relayed_with_its_content_type(stand: Any) -> None:
    body = b'--b\r\ncontent-disposition: form-data; name="model"\r\n\r\nm\r\n--b--\r\n'

    answer = await stand.ask("POST", "/v1/audio/transcriptions", body, content_type="multipart/form-data; boundary=b")

    assert answer.status == 200
    assert stand.engine.body == body
    assert stand.engine.header(b"content-type") == b"multipart/form-data; boundary=b"


# ---- unary answers


async def test_the_answer_comes_as_the_engine_gave_it_with_our_headers(stand: Any) -> None:
    body = b' {"id": "x" ,"odd":  1.50}'
    headers = [JSON, (b"x-engine", b"yes"), (b"x-simulated", b"1"), (b"x-request-id", b"engines"), (b"x-queue-ms", b"9999999")]
    stand.engine.answer = lambda exchange: exchange.respond(200, headers, body)

    answer = await stand.ask("POST", CHAT, {"model": "m"}, x_request_id="abc")

    assert (answer.status, answer.body) == (200, body)
    assert answer.header("content-length") == str(len(body))
    assert answer.header("content-type") == "application/json"
    assert answer.header("x-engine") == "yes"
    assert answer.header("x-simulated") == "1"
    assert [value for name, value in answer.headers if name == "x-request-id"] == ["abc"]
    assert [value for name, value in answer.headers if name == "x-instance-id"] == ["e0"]
    queue_ms = [float(value) for name, value in answer.headers if name == "x-queue-ms"]
    assert len(queue_ms) == 1
    assert 0 <= queue_ms[0] < 10_000


async def test_a_request_id_is_made_where_there_is_none_or_an_unfit_one(stand: Any) -> None:
    first = await stand.chat()
    second = await stand.ask("POST", CHAT, {"model": "m"}, x_request_id="has space")

    ids = {first.header("x-request-id"), second.header("x-request-id")}
    assert len(ids) == 2
    assert all(one and one.startswith("req-") for one in ids)
    assert stand.engine.header(b"x-request-id").decode() == second.header("x-request-id")


async def test_a_repeated_request_id_is_echoed_not_refused(stand: Any) -> None:
    answers = [await stand.ask("POST", CHAT, {"model": "m"}, x_request_id="same") for _ in range(2)]

    assert [answer.status for answer in answers] == [200, 200]
    assert [answer.header("x-request-id") for answer in answers] == ["same", "same"]


async def test_explain_tells_the_decision(make_stand: Any) -> None:
    stand = await make_stand(engines=2, scheduling_policy="fifo", routing_strategy="load_balanced")

    answer = await stand.ask("POST", CHAT, {"model": "m"}, x_explain="1")

    decision = json.loads(answer.header("x-decision") or "")
    assert decision["instance_id"] == answer.header("x-instance-id")
    assert decision["policy"] == "fifo"
    assert decision["router"] == "load_balanced"
    assert decision["reason"]
    assert {one["instance_id"] for one in decision["candidates"]} == {"e0", "e1"}
    assert all(one["predicted_ms"] >= 0 for one in decision["candidates"])
    assert (await stand.chat()).header("x-decision") is None


async def test_connections_are_kept_and_pipelined_requests_answered_in_order(stand: Any) -> None:
    stand.engine.answer = lambda exchange: exchange.respond(200, [JSON], exchange.body)
    from_test = [json.dumps({"model": "m", "n": n}).encode() for n in range(5)]
    reader, writer = await asyncio.open_connection("127.0.0.1", int(stand.gateway.url.rpartition(":")[2]))
    for body in from_test:
        writer.write(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))

    for body in from_test:
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        assert head.startswith(b"HTTP/1.1 200")
        assert await reader.readexactly(len(body)) == body
    writer.close()


async def test_a_large_answer_passes_whole(stand: Any) -> None:
    body = b'{"data":"' + b"x" * 3_000_000 + b'"}'
    stand.engine.answer = lambda exchange: exchange.respond(200, [JSON], body)

    answer = await stand.ask("POST", "/v1/embeddings", {"model": "m", "input": "x"})

    assert answer.body == body


# ---- streams


async def test_a_stream_passes_event_by_event(stand: Any) -> None:
    stand.engine.answer = stream_of(token("a"), token("b"), USAGE, DONE)

    answer = await stand.chat(stream=True, stream_options={"include_usage": True})

    assert answer.status == 200
    assert answer.header("content-type") == "text/event-stream; charset=utf-8"
    assert answer.header("transfer-encoding") == "chunked"
    assert answer.header("x-instance-id") == "e0"
    assert answer.body == token("a") + token("b") + USAGE + DONE


async def test_usage_that_was_not_asked_for_is_asked_and_hidden(stand: Any) -> None:
    stand.engine.answer = stream_of(token("a"), USAGE, DONE)

    answer = await stand.chat(stream=True)

    assert json.loads(stand.engine.body)["stream_options"] == {"include_usage": True}
    assert answer.body == token("a") + DONE
    assert stand.manager.explain(answer.header("x-request-id"))["state"] == "completed"


async def test_a_chunk_reaches_the_client_at_once(stand: Any, open_connection: Any) -> None:
    held: list[Exchange] = []

    def answer(exchange: Exchange) -> None:
        exchange.start(200, [EVENTS], None)
        exchange.write(token("a"))
        held.append(exchange)

    stand.engine.answer = answer
    connection = await open_connection(stand.gateway.url)
    connection.send("POST", CHAT, b'{"model":"m","stream":true}')
    assert (await connection.head()).status == 200
    assert await connection.chunk() == token("a")

    held[0].write(token("b"))
    assert await connection.chunk() == token("b")
    held[0].end(DONE)
    assert await connection.chunk() == DONE
    assert await connection.chunk() == b""


async def test_a_slow_reader_stops_the_engine_and_loses_nothing(stand: Any, open_connection: Any, eventually: Any) -> None:
    piece = token("x" * 60_000)
    paused: list[bool] = []

    def answer(exchange: Exchange) -> None:
        exchange.start(200, [EVENTS], None)
        exchange.on_pause = lambda: paused.append(True)
        asyncio.get_running_loop().create_task(feed(exchange))

    async def feed(exchange: Exchange) -> None:
        for _ in range(300):
            exchange.write(piece)
            await asyncio.sleep(0)
        exchange.end(DONE)

    stand.engine.answer = answer
    connection = await open_connection(stand.gateway.url)
    connection.send("POST", CHAT, b'{"model":"m","stream":true}')
    await connection.head()
    await eventually(lambda: paused)

    received = b""
    while data := await connection.chunk():
        received += data
    assert received == piece * 300 + DONE


# ---- errors


@pytest.mark.parametrize("status", [400, 401, 404, 422])
async def test_an_engines_own_error_is_relayed_as_it_is(stand: Any, status: int) -> None:
    body = b'{"error":{"message":"max_tokens must be at least 1, got 0.","type":"BadRequestError","param":"max_tokens","code":400}}'
    stand.engine.answer = error_of(status, body)

    answer = await stand.chat(stream=True)

    assert (answer.status, answer.body) == (status, body)
    assert answer.header("content-type") == "application/json"
    assert answer.header("x-instance-id") == "e0"
    assert answer.header("x-request-id")
    assert len(stand.engine.seen) == 1


async def test_an_overloaded_engines_answer_says_when_to_come_back(stand: Any) -> None:
    stand.engine.answer = error_of(429, b'{"error":{"message":"busy"}}', (b"retry-after", b"7"))

    answer = await stand.chat()

    assert answer.status == 429
    assert answer.header("retry-after") == "7"
    assert answer.error == {"message": "busy"}


async def test_an_engine_that_redirects_is_a_bad_gateway(stand: Any) -> None:
    stand.engine.answer = error_of(307, b"elsewhere", (b"location", b"http://elsewhere"))

    answer = await stand.chat()

    assert answer.status == 502
    assert answer.error["code"] == "instance_failed"
    assert answer.header("location") is None


async def test_an_unknown_model_is_a_404_that_lists_the_models(stand: Any) -> None:
    answer = await stand.ask("POST", CHAT, {"model": "nobody", "messages": []}, x_request_id="abc")

    assert answer.status == 404
    assert answer.error["code"] == "model_not_found"
    assert answer.error["param"] == "model"
    assert "m" in answer.error["message"]
    assert answer.header("x-request-id") == "abc"
    assert stand.engine.seen == []


async def test_a_stream_that_breaks_ends_with_an_error_event_and_no_done(stand: Any) -> None:
    def answer(exchange: Exchange) -> None:
        exchange.start(200, [EVENTS], None)
        exchange.write(token("a"))
        asyncio.get_running_loop().call_later(0.05, exchange.abort)

    stand.engine.answer = answer

    answer = await stand.chat(stream=True)

    events = answer.body.split(b"\n\n")
    assert events[0] + b"\n\n" == token("a")
    assert json.loads(events[1].removeprefix(b"data: "))["error"]["code"] == "instance_failed"
    assert b"[DONE]" not in answer.body


async def test_a_stream_that_ends_with_nothing_in_it_is_no_answer(stand: Any) -> None:
    """So vLLM that is told to stop ends the streams that still wait in it."""
    tally = event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 0}})
    stand.engine.answer = stream_of(b": hello\n\n", tally, DONE)

    answer = await stand.chat(stream=True)

    assert (answer.status, answer.error["code"]) == (502, "instance_failed")
    assert "without an answer" in answer.error["message"]


async def test_a_comment_before_the_first_event_is_kept(stand: Any) -> None:
    stand.engine.answer = stream_of(b": hello\n\n", token("a"), DONE)

    answer = await stand.chat(stream=True)

    assert answer.body == b": hello\n\n" + token("a") + DONE


async def test_an_error_inside_the_engines_stream_is_told_as_it_is(stand: Any) -> None:
    broken = event({"error": {"message": "EngineCore died", "type": "InternalServerError", "code": 500}})
    stand.engine.answer = stream_of(token("a"), broken)

    answer = await stand.chat(stream=True)

    assert answer.body == token("a") + broken


async def test_errors_of_the_messages_api_have_anthropics_shape(stand: Any) -> None:
    malformed = await stand.ask("POST", "/v1/messages", b"{")
    unknown = await stand.ask("POST", "/v1/messages", {"model": "nobody"})

    assert malformed.status == 400
    assert malformed.json["type"] == "error"
    assert malformed.error["type"] == "invalid_request_error"
    assert malformed.error["code"] == "invalid_request"
    assert unknown.error["type"] == "not_found_error"
    assert unknown.error["code"] == "model_not_found"


async def test_a_messages_stream_that_breaks_ends_with_anthropics_error_event(stand: Any) -> None:
    start = b'event: message_start\ndata: {"type":"message_start"}\n\n'

    def answer(exchange: Exchange) -> None:
        exchange.start(200, [EVENTS], None)
        exchange.write(start)
        asyncio.get_running_loop().call_later(0.05, exchange.abort)

    stand.engine.answer = answer

    answer = await stand.ask("POST", "/v1/messages", {"model": "m", "stream": True})

    assert answer.body.startswith(start + b"event: error\ndata: ")
    error = json.loads(answer.body.rpartition(b"data: ")[2])
    assert error["type"] == "error"
    assert error["error"]["code"] == "instance_failed"


async def test_a_full_queue_is_a_429_with_retry_after(make_stand: Any) -> None:
    stand = await make_stand(queue_max_requests=1)
    stand.manager.get_instances()[0].is_available = False
    waiting = asyncio.create_task(stand.chat())
    while not len(stand.manager.pending_queue):
        await asyncio.sleep(0.01)

    answer = await stand.chat()

    assert answer.status == 429
    assert answer.error["code"] == "queue_full"
    assert int(answer.header("retry-after")) >= 1
    waiting.cancel()


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"model":"m\xff"}', b'{"model":7}'])
async def test_a_bad_body_is_a_400_and_reaches_no_engine(stand: Any, body: bytes) -> None:
    answer = await stand.ask("POST", CHAT, body)

    assert answer.status == 400
    assert answer.error["code"] == "invalid_request"
    assert stand.engine.seen == []


# ---- clients that leave


async def test_a_client_that_leaves_a_stream_stops_the_engine(stand: Any, open_connection: Any, eventually: Any) -> None:
    def answer(exchange: Exchange) -> None:
        exchange.start(200, [EVENTS], None)
        exchange.write(token("a"))

    stand.engine.answer = answer
    connection = await open_connection(stand.gateway.url)
    connection.send("POST", CHAT, b'{"model":"m","stream":true}', {"x-request-id": "gone"})
    await connection.head()
    await connection.close()

    await eventually(lambda: stand.engine.left == 1)
    await eventually(lambda: stand.gateway.open_requests == 0)
    assert stand.manager.explain("gone")["state"] == "cancelled"


async def test_a_client_that_leaves_before_the_answer_stops_the_engine(stand: Any, open_connection: Any, eventually: Any) -> None:
    stand.engine.answer = lambda exchange: None
    connection = await open_connection(stand.gateway.url)
    connection.send("POST", CHAT, b'{"model":"m"}')
    await eventually(lambda: stand.engine.seen)
    await connection.close()

    await eventually(lambda: stand.engine.left == 1)
    assert stand.manager.get_instances()[0].active_requests == 0


async def test_a_client_that_leaves_the_queue_is_taken_out_of_it(stand: Any, open_connection: Any, eventually: Any) -> None:
    stand.manager.get_instances()[0].is_available = False
    connection = await open_connection(stand.gateway.url)
    connection.send("POST", CHAT, b'{"model":"m"}')
    await eventually(lambda: len(stand.manager.pending_queue) == 1)
    await connection.close()

    await eventually(lambda: len(stand.manager.pending_queue) == 0)
    assert stand.engine.seen == []


@pytest.mark.parametrize("path", [CHAT, "/v1/responses"])
async def test_what_is_remembered_of_ended_requests_holds_no_connection_and_no_body(stand: Any, path: str) -> None:
    for body in ({"model": "m"}, {"model": "m", "stream": True}, {"model": "nobody"}):
        await stand.ask("POST", path, body)

    sinks = [found for found in gc.get_objects() if isinstance(found, ClientSink)]
    assert sinks
    for sink in sinks:
        assert not [held for held in gc.get_referents(sink) if isinstance(held, Exchange | Job | MethodType)]


# ---- waiting


async def test_a_waiting_stream_is_told_that_we_are_here(make_stand: Any, open_connection: Any) -> None:
    stand = await make_stand(settings=GatewaySettings(access_log=False, queue_keepalive_s=0.05))
    instance = stand.manager.get_instances()[0]
    instance.is_available = False
    stand.engine.answer = stream_of(token("a"), DONE)
    connection = await open_connection(stand.gateway.url)
    connection.send("POST", CHAT, b'{"model":"m","stream":true}')

    head = await connection.head()
    assert (head.status, head.header("content-type")) == (200, "text/event-stream; charset=utf-8")
    assert await connection.chunk() == b": waiting\n\n"
    assert await connection.chunk() == b": waiting\n\n"
    instance.is_available = True
    stand.manager.fleet.refresh(instance)
    rest = b""
    while data := await connection.chunk():
        rest += data
    assert rest.replace(b": waiting\n\n", b"") == token("a") + DONE


async def test_after_a_waiting_stream_was_told_so_errors_are_events(make_stand: Any, open_connection: Any) -> None:
    stand = await make_stand(settings=GatewaySettings(access_log=False, queue_keepalive_s=0.05))
    instance = stand.manager.get_instances()[0]
    instance.is_available = False
    stand.engine.answer = error_of(400, b'{"error":{"message":"no","type":"BadRequestError","param":null,"code":400}}')
    connection = await open_connection(stand.gateway.url)
    connection.send("POST", CHAT, b'{"model":"m","stream":true}')
    assert (await connection.head()).status == 200
    instance.is_available = True
    stand.manager.fleet.refresh(instance)

    rest = b""
    while data := await connection.chunk():
        rest += data
    assert json.loads(rest.rpartition(b"data: ")[2])["error"]["message"] == "no"


async def test_keepalive_leaves_others_alone(make_stand: Any) -> None:
    stand = await make_stand(settings=GatewaySettings(access_log=False, queue_keepalive_s=0.01))

    def slow(exchange: Exchange) -> None:
        asyncio.get_running_loop().call_later(0.1, stream_of(token("a"), DONE), exchange)

    stand.engine.answer = slow
    answer = await stand.chat(stream=True)

    assert answer.body == token("a") + DONE


# ---- bounds


async def test_the_next_stream_beyond_the_bound_is_refused(make_stand: Any, open_connection: Any, eventually: Any) -> None:
    stand = await make_stand(settings=GatewaySettings(access_log=False, max_streams=2))
    stand.engine.answer = lambda exchange: None
    connections = [await open_connection(stand.gateway.url) for _ in range(2)]
    for connection in connections:
        connection.send("POST", CHAT, b'{"model":"m"}')
    await eventually(lambda: len(stand.engine.seen) == 2)

    refused = await stand.chat()
    assert refused.status == 503
    assert refused.error["code"] == "too_many_streams"
    assert refused.header("retry-after")

    await connections[0].close()
    await eventually(lambda: stand.gateway.open_requests == 1)
    stand.engine.answer = lambda exchange: exchange.respond(200, [JSON], b"{}")
    assert (await stand.chat()).status == 200


async def test_a_body_beyond_the_bound_is_a_413(make_stand: Any) -> None:
    stand = await make_stand(settings=GatewaySettings(access_log=False, max_body_bytes=1000))

    answer = await stand.chat(text="x" * 2000)

    assert answer.status == 413
    assert answer.error["code"] == "payload_too_large"
    assert (await stand.chat()).status == 200


async def test_nothing_listens_where_the_engine_should_be(make_stand: Any) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = await make_stand(engines=0, no_instance_timeout_s=0.3)
    alone.manager.register_instance(ExecutionInstance("down", port=port, model_name="m"))

    answer = await alone.chat()

    assert answer.status == 503
    assert answer.error["code"] == "no_instance_available"
    assert answer.header("retry-after")
