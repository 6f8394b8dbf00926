"""Stored responses: what concerns one goes to the instance that made it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from control_plane.gateway.responses import ResponseHomes, response_id_in, response_path
from control_plane.transport import Exchange

JSON = (b"content-type", b"application/json")
EVENTS = (b"content-type", b"text/event-stream; charset=utf-8")


def responder(name: str) -> Any:
    """An engine of its own ids: ``resp_<name>1``, ``resp_<name>2``, ..."""
    made = 0

    def answer(exchange: Exchange) -> None:
        nonlocal made
        if exchange.method != "POST" or exchange.path != "/v1/responses":
            exchange.respond(200, [JSON], json.dumps({"id": exchange.path, "by": name, "method": exchange.method}).encode())
            return
        made += 1
        body = {"id": f"resp_{name}{made}", "object": "response", "output": [{"id": "msg_1", "text": '"id":"resp_fake"'}]}
        if not json.loads(exchange.body).get("stream"):
            exchange.respond(200, [JSON], json.dumps(body).encode())
            return
        exchange.start(200, [EVENTS], None)
        for kind in ("response.created", "response.completed"):
            exchange.write(f"event: {kind}\ndata: {json.dumps({'response': body, 'type': kind})}\n\n".encode())
        exchange.end()

    return answer


@pytest.fixture
async def pair(make_stand: Any) -> Any:
    stand = await make_stand(engines=2, routing_strategy="round_robin", scheduling_policy="fifo")
    for name, engine in zip("ab", stand.engines, strict=True):
        engine.answer = responder(name)
    return stand


@pytest.mark.parametrize("stream", [False, True])
async def test_the_next_turn_goes_to_the_instance_that_holds_the_last(pair: Any, stream: bool) -> None:
    for _ in range(2):
        first = await pair.ask("POST", "/v1/responses", {"model": "m", "input": "hi", "stream": stream})
        home = first.header("x-instance-id")
        response_id = response_id_in(first.body)
        assert response_id
        for _ in range(3):
            turn = await pair.ask("POST", "/v1/responses", {"model": "m", "input": "and", "previous_response_id": response_id})
            assert (turn.status, turn.header("x-instance-id")) == (200, home)


async def test_the_next_turn_with_another_model_is_refused(pair: Any) -> None:
    first = await pair.ask("POST", "/v1/responses", {"model": "m", "input": "hi"})
    for instance in pair.manager.get_instances():
        if instance.instance_id != first.header("x-instance-id"):
            instance.model_name, instance.served_models = "other", ["other"]
            pair.manager.fleet.refresh(instance)

    turn = await pair.ask("POST", "/v1/responses", {"model": "other", "input": "x", "previous_response_id": first.json["id"]})

    assert (turn.status, turn.error["code"], turn.error["param"]) == (400, "invalid_request", "previous_response_id")


async def test_get_cancel_and_delete_go_to_its_instance(pair: Any) -> None:
    for _ in range(2):
        first = await pair.ask("POST", "/v1/responses", {"model": "m", "input": "hi"})
        home, path = first.header("x-instance-id"), f"/v1/responses/{first.json['id']}"
        for method, target in (("GET", path), ("GET", path + "/input_items"), ("POST", path + "/cancel"), ("DELETE", path)):
            answer = await pair.ask(method, target + "?a=b", b"" if method == "POST" else None)
            assert (answer.status, answer.header("x-instance-id")) == (200, home)
            assert answer.json["method"] == method
            assert answer.json["id"] == target


async def test_an_unknown_response_is_a_clear_404(pair: Any) -> None:
    got = await pair.ask("GET", "/v1/responses/resp_nobody")
    turn = await pair.ask("POST", "/v1/responses", {"model": "m", "input": "x", "previous_response_id": "resp_nobody"})

    assert (got.status, got.error["code"], got.error["param"]) == (404, "response_not_found", "response_id")
    assert (turn.status, turn.error["code"], turn.error["param"]) == (404, "response_not_found", "previous_response_id")
    assert not any(engine.seen for engine in pair.engines)


async def test_a_response_whose_instance_is_gone_is_a_clear_404(pair: Any) -> None:
    first = await pair.ask("POST", "/v1/responses", {"model": "m", "input": "hi"})
    pair.manager.unregister_instance(first.header("x-instance-id"))

    answer = await pair.ask("GET", f"/v1/responses/{first.json['id']}")

    assert (answer.status, answer.error["code"]) == (404, "response_not_found")
    assert first.header("x-instance-id") in answer.error["message"]


async def made(pair: Any) -> tuple[str, int]:
    """The id of a new response, and which engine holds it."""
    first = await pair.ask("POST", "/v1/responses", {"model": "m", "input": "hi"})
    return first.json["id"], int(first.header("x-instance-id")[1:])


def following(response_id: str) -> dict[str, Any]:
    return {"model": "m", "input": "and", "previous_response_id": response_id}


async def test_a_response_whose_engine_died_is_a_clear_404_at_once(pair: Any) -> None:
    response_id, index = await made(pair)
    await pair.engines[index].stop()

    # the first finds the engine gone, the others know it
    for _ in range(2):
        for method, path, body in (
            ("GET", f"/v1/responses/{response_id}", None),
            ("POST", f"/v1/responses/{response_id}/cancel", {}),
            ("POST", "/v1/responses", following(response_id)),
        ):
            answer = await asyncio.wait_for(pair.ask(method, path, body), 4.0)
            assert (answer.status, answer.error["code"]) == (404, "response_not_found")
            assert f"'e{index}', which is gone" in answer.error["message"]


async def test_a_draining_instance_still_tells_of_its_responses_and_makes_no_new_ones(pair: Any) -> None:
    response_id, index = await made(pair)
    pair.manager.fleet.drain(f"e{index}")

    assert (await pair.ask("GET", f"/v1/responses/{response_id}")).status == 200
    assert (await pair.ask("POST", f"/v1/responses/{response_id}/cancel", {})).status == 200
    turn = await asyncio.wait_for(pair.ask("POST", "/v1/responses", following(response_id)), 4.0)
    assert (turn.status, turn.error["code"]) == (503, "no_instance_available")
    assert turn.header("retry-after")


async def test_with_one_instance_even_a_forgotten_response_can_only_be_there(stand: Any) -> None:
    answer = await stand.ask("GET", "/v1/responses/resp_old")

    assert answer.status == 200
    assert stand.engine.seen[-1].path == "/v1/responses/resp_old"


async def test_only_the_responses_of_the_api_are_remembered(pair: Any) -> None:
    await pair.ask("POST", "/v1/responses", {"model": "m", "input": "hi"})

    assert len(pair.gateway.relay.homes) == 1


async def test_the_least_recently_used_is_forgotten(stand: Any) -> None:
    homes = ResponseHomes(stand.manager.fleet, 2)
    homes.remember("resp_1", "e0")
    homes.remember("resp_2", "e0")
    homes.find("resp_1", "response_id")
    homes.remember("resp_3", "e0")

    assert len(homes) == 2
    stand.manager.register_instance(type(stand.manager.get_instances()[0])("other", port=1, model_name="m"))
    assert homes.find("resp_1", "response_id") == "e0"
    with pytest.raises(LookupError):
        homes.find("resp_2", "response_id")


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b'{"id":"resp_1"}', "resp_1"),
        (b'event: response.created\ndata: {"response":{"id": "resp_a-b_2","x":1}}\n\n', "resp_a-b_2"),
        (b'{"text":"\\"id\\":\\"resp_no\\""}', None),
        (b'{"id":"chatcmpl-1"}', None),
        (b'{"id":"resp_', None),
    ],
)
def test_the_id_in_an_answer(data: bytes, found: str | None) -> None:
    assert response_id_in(data) == found


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("/v1/responses/resp_1", ("resp_1", "")),
        ("/v1/responses/resp_1/cancel", ("resp_1", "/cancel")),
        ("/v1/responses/", None),
        ("/v1/responses/a/b", None),
        ("/v1/responses/a%2e", None),
        ("/v1/responses/" + "x" * 300, None),
    ],
)
def test_the_id_in_a_path(path: str, found: tuple[str, str] | None) -> None:
    assert response_path(path) == found
