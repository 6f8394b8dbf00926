"""The admin API: who may ask, and what it does."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from control_plane.errors import ControlPlaneError
from control_plane.gateway import GatewaySettings
from control_plane.gateway.guard import AdminGuard, host_name, is_loopback

INSTANCES = "/control/v1/instances"


# ---- who may ask


def check(guard: AdminGuard, method: str = "GET", peer: str = "127.0.0.1", **headers: str) -> int:
    """The status that the guard stands for: 200, 401 or 403."""
    named = [(name.replace("_", "-").encode(), value.encode()) for name, value in {"host": "127.0.0.1:8080", **headers}.items() if value]
    exchange: Any = SimpleNamespace(method=method, peer=peer, headers=named, header=lambda name: dict(named).get(name))
    try:
        guard.check(exchange)
    except ControlPlaneError as error:
        return error.http_status
    return 200


JSON = {"content_type": "application/json"}
KEY = {"authorization": "Bearer sesame"}


@pytest.mark.parametrize(
    ("asked", "main", "with_key", "own_loopback", "own_public"),
    [
        # no key on the main listener: loopback all the way, nothing in between, writes in JSON
        ({}, 200, 401, 200, 200),
        ({"host": "localhost:8080"}, 200, 401, 200, 200),
        ({"host": "[::1]:8080"}, 200, 401, 200, 200),
        ({"peer": "::1"}, 200, 401, 200, 200),
        ({"peer": "::ffff:127.0.0.1"}, 200, 401, 200, 200),
        ({"peer": "10.1.2.3"}, 403, 401, 200, 200),
        ({"peer": ""}, 403, 401, 200, 200),
        ({"host": "evil.example"}, 403, 401, 403, 200),
        ({"host": "127.0.0.1.evil.example"}, 403, 401, 403, 200),
        ({"host": ""}, 403, 401, 403, 200),
        ({"x_forwarded_for": "1.2.3.4"}, 403, 401, 200, 200),
        ({"x_forwarded_anything": "1"}, 403, 401, 200, 200),
        ({"forwarded": "for=1.2.3.4"}, 403, 401, 200, 200),
        ({"via": "1.1 proxy"}, 403, 401, 200, 200),
        ({"method": "POST", **JSON}, 200, 401, 200, 200),
        ({"method": "POST", "content_type": "Application/JSON; charset=utf-8"}, 200, 401, 200, 200),
        ({"method": "POST"}, 403, 401, 403, 403),
        ({"method": "POST", "content_type": "text/plain"}, 403, 401, 403, 403),
        ({"method": "PUT", "content_type": "application/x-www-form-urlencoded"}, 403, 401, 403, 403),
        ({"method": "PATCH", "content_type": "application/jsonish"}, 403, 401, 403, 403),
        ({"method": "DELETE"}, 200, 401, 200, 200),
        # the key decides alone
        ({**KEY}, 200, 200, 200, 200),
        ({**KEY, "peer": "10.1.2.3", "host": "cp.example", "x_forwarded_for": "1.2.3.4"}, 403, 200, 403, 200),
        ({**KEY, "method": "POST", "peer": "10.1.2.3"}, 403, 200, 403, 403),
        ({"authorization": "Bearer wrong"}, 200, 401, 200, 200),
        ({"authorization": "Bearer sesam"}, 200, 401, 200, 200),
        ({"authorization": "Basic sesame"}, 200, 401, 200, 200),
    ],
)
def test_who_may_ask_what(asked: dict[str, str], main: int, with_key: int, own_loopback: int, own_public: int) -> None:
    assert check(AdminGuard(None, own_listener=False, listen_host="0.0.0.0"), **asked) == main
    assert check(AdminGuard("sesame", own_listener=False, listen_host="0.0.0.0"), **asked) == with_key
    assert check(AdminGuard("sesame", own_listener=True, listen_host="0.0.0.0"), **asked) == with_key
    assert check(AdminGuard(None, own_listener=True, listen_host="127.0.0.1"), **asked) == own_loopback
    assert check(AdminGuard(None, own_listener=True, listen_host="0.0.0.0"), **asked) == own_public


def test_names_in_host_headers() -> None:
    assert host_name(b"localhost:80") == "localhost"
    assert host_name(b"[::1]:80") == "::1"
    assert host_name(b"::1") == "::1"
    assert host_name(None) == ""
    assert is_loopback("127.8.9.10")
    assert not is_loopback("0.0.0.0")
    assert not is_loopback("localhost.example")


async def test_the_guard_stands_before_the_api_and_the_front_page(stand: Any) -> None:
    for path in (INSTANCES, "/", "/control/v1/nothing"):
        answer = await stand.ask("GET", path, host="evil.example")
        assert (answer.status, answer.error["code"]) == (403, "forbidden")


async def test_with_an_admin_key(make_stand: Any) -> None:
    stand = await make_stand(settings=GatewaySettings(access_log=False, admin_key="sesame"))

    missing = await stand.ask("GET", INSTANCES)
    given = await stand.ask("GET", INSTANCES, authorization="Bearer sesame", host="cp.example")

    assert (missing.status, missing.error["code"]) == (401, "unauthorized")
    assert given.status == 200


async def test_with_a_listener_of_its_own_the_admin_api_is_only_there(make_stand: Any) -> None:
    stand = await make_stand(admin_port=0, gateway_options={"metrics": lambda: ("text/plain", b"up 1\n")})
    admin = stand.gateway.admin_url
    assert admin != stand.gateway.url

    assert (await stand.ask("GET", INSTANCES)).status == 404
    assert (await stand.ask("GET", "/")).status == 404
    assert (await stand.ask("GET", INSTANCES, url=admin)).status == 200
    assert (await stand.ask("GET", "/metrics", url=admin)).body == b"up 1\n"
    assert (await stand.ask("GET", "/ready", url=admin)).status == 200
    relayed = await stand.ask("POST", "/v1/chat/completions", {"model": "m"}, url=admin)
    assert relayed.status == 404
    assert stand.engine.seen == []


# ---- what it does


async def test_the_front_page_names_the_endpoints(stand: Any) -> None:
    page = (await stand.ask("GET", "/")).json

    assert page["endpoints"]["instances"] == INSTANCES
    assert page["status"]["models"] == ["m"]


async def test_instances_are_shown_without_their_keys(stand: Any) -> None:
    stand.manager.get_instances()[0].api_key = "sk-secret"

    answer = await stand.ask("GET", INSTANCES)
    (shown,) = answer.json["instances"]
    one = await stand.ask("GET", f"{INSTANCES}/e0")

    assert (shown["instance_id"], shown["model_name"], shown["url"]) == ("e0", "m", stand.engine.url)
    assert shown["has_api_key"] is True
    assert one.json["instance_id"] == "e0"
    assert b"sk-secret" not in answer.body + one.body


async def test_an_instance_is_added_used_and_removed(stand: Any, make_stand: Any, eventually: Any) -> None:
    other = await make_stand(models=("other",))

    added = await stand.ask(
        "POST", INSTANCES, {"instance_id": "new", "url": other.engine.url, "gpu_count": 2, "price_per_gpu_hour_usd": 2.5}
    )
    assert added.status == 201
    assert (added.json["instance_id"], added.json["gpu_count"]) == ("new", 2)
    await eventually(lambda: "other" in stand.manager.fleet.models())
    answer = await stand.ask("POST", "/v1/chat/completions", {"model": "other"})
    assert answer.header("x-instance-id") == "new"

    removed = await stand.ask("DELETE", f"{INSTANCES}/new")
    assert removed.json["removed"] is True
    assert (await stand.ask("GET", f"{INSTANCES}/new")).status == 404
    assert (await stand.ask("POST", "/v1/chat/completions", {"model": "other"})).status == 404


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "url"),
        ({"url": "http://x:1", "gpu_cuont": 2}, "gpu_cuont"),
        ({"url": "http://x:1", "gpu_count": 0}, "gpu_count"),
        ({"url": "http://x:1", "gpu_count": "many"}, "gpu_count"),
        ({"url": "ftp://x"}, None),
        ({"url": "http://x:1", "instance_type": "fast"}, "instance_type"),
        ({"url": "http://x:1", "instance_id": "e0"}, "instance_id"),
    ],
)
async def test_a_wrong_instance_is_refused_with_the_field(stand: Any, fields: dict[str, Any], param: str | None) -> None:
    answer = await stand.ask("POST", INSTANCES, fields)

    assert answer.status == 400
    assert answer.error["code"] == "invalid_request"
    if param is not None:
        assert answer.error["param"] == param
    if param == "gpu_cuont":
        assert "did you mean gpu_count" in answer.error["message"]
    assert len(stand.manager.get_instances()) == 1


async def test_a_live_instance_is_changed(stand: Any) -> None:
    answer = await stand.ask("PATCH", f"{INSTANCES}/e0", {"max_concurrent_requests": 3, "zone": "b", "is_available": False})

    instance = stand.manager.get_instances()[0]
    assert answer.status == 200
    assert (instance.max_concurrent_requests, instance.zone, instance.is_available) == (3, "b", False)
    assert (await stand.ask("GET", "/ready")).status == 503


@pytest.mark.parametrize(
    "fields", [{"port": 1}, {"instance_id": "x"}, {"is_available": "no"}, {"max_concurrent_requests": 0}, {"zoen": "b"}]
)
async def test_a_wrong_change_changes_nothing(stand: Any, fields: dict[str, Any]) -> None:
    answer = await stand.ask("PATCH", f"{INSTANCES}/e0", {"zone": "b", **fields})

    assert (answer.status, answer.error["param"]) == (400, next(iter(fields)))
    assert stand.manager.get_instances()[0].zone is None


async def test_drain_and_undrain(make_stand: Any) -> None:
    stand = await make_stand(engines=2)

    drained = await stand.ask("POST", f"{INSTANCES}/e0/drain", {})
    assert drained.json["health_status"] == "draining"
    for _ in range(4):
        assert (await stand.chat()).header("x-instance-id") == "e1"

    back = await stand.ask("DELETE", f"{INSTANCES}/e0/drain")
    assert back.json["health_status"] == "healthy"
    answers = await asyncio.gather(*(stand.chat() for _ in range(8)))
    assert {answer.header("x-instance-id") for answer in answers} == {"e0", "e1"}


async def test_the_queue_is_shown_in_order_and_a_request_cancelled(stand: Any, eventually: Any) -> None:
    stand.manager.get_instances()[0].is_available = False
    first = asyncio.create_task(stand.chat(request_id="low", priority="low", user="ann", prompt="secret text"))
    await eventually(lambda: len(stand.manager.pending_queue) == 1)
    second = asyncio.create_task(stand.chat(request_id="high", priority="high"))
    await eventually(lambda: len(stand.manager.pending_queue) == 2)

    shown = await stand.ask("GET", "/control/v1/queue")
    assert shown.json["queued_requests"] == 2
    assert {one["request_id"] for one in shown.json["requests"]} == {"low", "high"}
    assert {one["tenant"] for one in shown.json["requests"]} == {"ann", "anonymous"}
    assert all(one["waited_ms"] >= 0 for one in shown.json["requests"])
    assert b"secret text" not in shown.body

    cancelled = await stand.ask("DELETE", "/control/v1/requests/low")
    assert cancelled.json == {"request_id": "low", "cancelled": True}
    answer = await first
    assert (answer.status, answer.error["code"]) == (499, "cancelled")
    assert (await stand.ask("GET", "/control/v1/requests/low")).json["state"] == "cancelled"
    second.cancel()


async def test_an_ended_request_is_explained(stand: Any) -> None:
    await stand.chat(request_id="r1")

    explained = (await stand.ask("GET", "/control/v1/requests/r1")).json
    unknown = await stand.ask("GET", "/control/v1/requests/nobody")

    assert (explained["state"], explained["decision"]["instance_id"]) == ("completed", "e0")
    assert (unknown.status, unknown.error["code"]) == (404, "request_not_found")


async def test_metrics_are_those_of_the_manager(stand: Any) -> None:
    await stand.chat()

    shown = (await stand.ask("GET", "/control/v1/metrics")).json

    assert (shown["total_requests"], shown["completed_requests"], shown["slo_compliance_rate"]) == (1, 1, 1.0)


@pytest.mark.parametrize(
    ("path", "field", "other"),
    [("scheduling-policy", "scheduling_policy", "fifo"), ("routing-strategy", "routing_strategy", "round_robin")],
)
async def test_policy_and_router_are_changed_at_run_time(stand: Any, path: str, field: str, other: str) -> None:
    path = f"/control/v1/{path}"
    before = (await stand.ask("GET", path)).json
    assert other in before["choices"]
    assert before[field] in before["choices"]

    changed = await stand.ask("PUT", path, {field: other})
    assert changed.json[field] == other
    assert (await stand.ask("GET", path)).json[field] == other
    for wrong in ({field: "nonsense"}, {field: "os:system"}, {}, {field: other, "more": 1}, {field: 7}):
        refused = await stand.ask("PUT", path, wrong)
        assert (refused.status, refused.error["param"]) == (400, field)
    assert (await stand.ask("GET", path)).json[field] == other
    assert (await stand.chat()).status == 200


async def test_the_configuration_is_shown_without_secrets(make_stand: Any) -> None:
    settings = GatewaySettings(access_log=False, api_keys=("sk-secret",), admin_key="sesame")
    stand = await make_stand(
        settings=settings, gateway_options={"config": lambda: {"more": 1, "server": {"port": 7}}}, scheduling_policy="fifo"
    )

    answer = await stand.ask("GET", "/control/v1/config", authorization="Bearer sesame")

    assert answer.json["scheduling_policy"] == "fifo"
    assert answer.json["server"]["max_body_bytes"] == 64 * 1024 * 1024
    assert (answer.json["more"], answer.json["server"]["port"]) == (1, 7)
    assert b"sk-secret" not in answer.body
    assert b"sesame" not in answer.body


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/control/v1/nothing", 404, "not_found"),
        ("POST", "/control/v1/queue", 405, "method_not_allowed"),
        ("GET", f"{INSTANCES}/nobody", 404, "instance_not_found"),
        ("DELETE", f"{INSTANCES}/nobody", 404, "instance_not_found"),
    ],
)
async def test_errors_have_openais_shape(stand: Any, method: str, path: str, status: int, code: str) -> None:
    answer = await stand.ask(method, path, b"{}" if method == "POST" else None)

    assert (answer.status, answer.error["code"]) == (status, code)


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("PUT", INSTANCES, "GET, HEAD, POST"),
        ("POST", "/control/v1/scheduling-policy", "GET, HEAD, PUT"),
        ("POST", f"{INSTANCES}/e0", "DELETE, GET, HEAD, PATCH"),
    ],
)
async def test_all_methods_of_a_path_are_told(stand: Any, method: str, path: str, allow: str) -> None:
    answer = await stand.ask(method, path, b"{}")

    assert (answer.status, answer.header("allow")) == (405, allow)


@pytest.mark.parametrize("body", [b"{", b"[]", b'{"a":"\xff"}', b"[" * 100_000])
async def test_a_bad_body_is_a_400(stand: Any, body: bytes) -> None:
    answer = await stand.ask("POST", INSTANCES, body)

    assert (answer.status, answer.error["code"]) == (400, "invalid_request")


async def test_a_fault_of_ours_is_a_500_and_the_rest_goes_on(stand: Any, monkeypatch: Any, caplog: Any) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("oops")

    with monkeypatch.context() as patch:
        patch.setattr(stand.manager, "get_metrics", broken)
        patch.setattr(stand.manager, "resolve_model", broken)
        for answer in (await stand.ask("GET", "/control/v1/metrics"), await stand.ask("POST", "/v1/chat/completions", b"{}")):
            assert (answer.status, answer.error["code"]) == (500, "internal_error")
            assert b"oops" not in answer.body

    assert "oops" in caplog.text
    assert (await stand.chat()).status == 200
    assert stand.gateway.open_requests == 0


async def test_admin_answers_go_over_kept_connections_between_others(stand: Any, open_connection: Any) -> None:
    connection = await open_connection(stand.gateway.url)
    for _ in range(3):
        connection.send("GET", INSTANCES)
        assert (await connection.answer()).status == 200
        connection.send("POST", "/v1/chat/completions", json.dumps({"model": "m"}).encode())
        assert (await connection.answer()).status == 200
