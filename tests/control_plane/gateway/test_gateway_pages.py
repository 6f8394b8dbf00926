"""Everything beside the relay: probes, models, methods, unknown paths, CORS, client keys, shutting down, TLS."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from pathlib import Path
from typing import Any

import pytest

from control_plane.errors import ConfigurationError
from control_plane.gateway import GatewaySettings
from control_plane.gateway.descriptors import for_clients, raise_descriptor_limit, streams_that_fit
from control_plane.transport import Exchange
from control_plane.types import ExecutionInstance

CHAT = "/v1/chat/completions"


# ---- probes


async def test_health_is_the_process_and_ready_is_the_fleet(stand: Any) -> None:
    instance = stand.manager.get_instances()[0]
    assert (await stand.ask("GET", "/health")).status == 200
    ready = await stand.ask("GET", "/ready")
    assert (ready.status, ready.json["usable_instances"]) == (200, 1)

    instance.is_available = False
    not_ready = await stand.ask("GET", "/ready")

    assert not_ready.status == 503
    assert not_ready.error["code"] == "no_instance_available"
    assert not_ready.header("retry-after")
    assert (await stand.ask("GET", "/health")).status == 200


async def test_metrics_are_those_handed_in(make_stand: Any) -> None:
    stand = await make_stand(gateway_options={"metrics": lambda: ("text/plain; version=1.0.0", b"up 1\n")})

    answer = await stand.ask("GET", "/metrics")

    assert (answer.status, answer.header("content-type"), answer.body) == (200, "text/plain; version=1.0.0", b"up 1\n")


async def test_without_metrics_that_path_is_not_there(stand: Any) -> None:
    assert (await stand.ask("GET", "/metrics")).status == 404


# ---- models


async def test_the_models_of_all_instances_are_listed_once(make_stand: Any) -> None:
    stand = await make_stand(engines=2, models=("m", "m-lora"))
    stand.manager.register_instance(ExecutionInstance("down", port=1, model_name="org/big", is_healthy=False))

    answer = await stand.ask("GET", "/v1/models")

    assert answer.json["object"] == "list"
    cards = {card["id"]: card for card in answer.json["data"]}
    assert sorted(cards) == ["m", "m-lora", "org/big"]
    assert len(answer.json["data"]) == 3
    assert cards["m-lora"]["parent"] == "m"
    assert all(card["object"] == "model" and isinstance(card["created"], int) for card in answer.json["data"])


async def test_a_cards_context_is_the_least_of_its_instances(make_stand: Any) -> None:
    stand = await make_stand(engines=2)
    lengths = (4096, 2048)
    for instance, length in zip(stand.manager.get_instances(), lengths, strict=True):
        instance.engine.max_model_len_tokens = length

    card = (await stand.ask("GET", "/v1/models/m")).json

    assert (card["id"], card["max_model_len"]) == ("m", 2048)


async def test_one_model_by_name_with_slashes(stand: Any) -> None:
    stand.manager.register_instance(ExecutionInstance("big", port=1, model_name="org/big"))

    for path in ("/v1/models/org/big", "/v1/models/org%2Fbig", "/v1/models/%6frg%2fbig"):
        assert (await stand.ask("GET", path)).json["id"] == "org/big"
    missing = await stand.ask("GET", "/v1/models/nobody")
    assert (missing.status, missing.error["code"]) == (404, "model_not_found")


# ---- methods and unknown paths


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("GET", CHAT, "POST"),
        ("DELETE", "/v1/completions", "POST"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("DELETE", "/health", "GET, HEAD"),
        ("POST", "/v1/responses/resp_1", "GET, DELETE"),
        ("GET", "/v1/responses/resp_1/cancel", "POST"),
        ("PUT", "/v1/models/m", "GET, HEAD"),
    ],
)
async def test_a_wrong_method_is_a_405_that_says_which_are_right(stand: Any, method: str, path: str, allow: str) -> None:
    answer = await stand.ask(method, path, b"" if method == "POST" else None)

    assert answer.status == 405
    assert answer.header("allow") == allow
    assert answer.error["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("GET", "/v1/nothing", None),
        ("GET", "/nothing", None),
        ("POST", "/nothing", b'{"model":"m"}'),
        ("POST", "/v1/nothing", b"{}"),
        ("OPTIONS", "/nothing", None),
        ("GET", "/v1/responses/..%2f", None),
        ("GET", "/v1/responses/a/b/c", None),
    ],
)
async def test_an_unknown_path_is_a_404_in_openais_shape(stand: Any, method: str, path: str, body: bytes | None) -> None:
    answer = await stand.ask(method, path, body)

    assert answer.status == 404
    assert answer.error["code"] == "not_found"
    assert stand.engine.seen == []


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/v1/models/m"])
async def test_head_is_get_without_the_body(stand: Any, path: str) -> None:
    full = await stand.ask("GET", path)
    head = await stand.ask("HEAD", path)

    assert (head.status, head.body) == (200, b"")
    assert head.header("content-length") == full.header("content-length")


# ---- CORS


async def test_without_cors_no_answer_speaks_of_it(stand: Any) -> None:
    answer = await stand.ask("GET", "/v1/models", origin="https://a.example")
    preflight = await stand.ask("OPTIONS", CHAT, origin="https://a.example", access_control_request_method="POST")

    assert answer.header("access-control-allow-origin") is None
    assert (preflight.status, preflight.header("access-control-allow-origin")) == (204, None)


async def test_an_allowed_origin_may_ask_and_another_may_not(make_stand: Any) -> None:
    stand = await make_stand(settings=GatewaySettings(access_log=False, cors_origins=("https://a.example",)))
    body = {"model": "m"}

    preflight = await stand.ask(
        "OPTIONS", CHAT, origin="https://a.example", access_control_request_method="POST", access_control_request_headers="x-priority"
    )
    allowed = await stand.ask("POST", CHAT, body, origin="https://a.example")
    refused = await stand.ask("POST", CHAT, body, origin="https://b.example")
    failing = await stand.ask("POST", CHAT, {"model": "nobody"}, origin="https://a.example")

    assert preflight.status == 204
    assert preflight.header("access-control-allow-origin") == "https://a.example"
    assert "POST" in (preflight.header("access-control-allow-methods") or "")
    assert preflight.header("access-control-allow-headers") == "x-priority"
    for answer in (allowed, failing):
        assert answer.header("access-control-allow-origin") == "https://a.example"
        assert "x-request-id" in (answer.header("access-control-expose-headers") or "")
        assert "Origin" in [value for name, value in answer.headers if name == "vary"]
    assert refused.header("access-control-allow-origin") is None


async def test_any_origin(make_stand: Any) -> None:
    stand = await make_stand(settings=GatewaySettings(access_log=False, cors_origins=("*",)))

    answer = await stand.ask("GET", "/v1/models", origin="https://whoever.example")

    assert answer.header("access-control-allow-origin") == "*"


# ---- client keys


@pytest.fixture
async def keyed(make_stand: Any) -> Any:
    return await make_stand(settings=GatewaySettings(access_log=False, api_keys=("sk-one", "sk-two")))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 401),
        ({"authorization": "Bearer wrong"}, 401),
        ({"authorization": "Basic sk-one"}, 401),
        ({"authorization": "Bearer "}, 401),
        ({"authorization": "Bearer sk-one"}, 200),
        ({"authorization": "bearer sk-two"}, 200),
        ({"x_api_key": "sk-two"}, 200),
        ({"x_api_key": "sk"}, 401),
    ],
)
@pytest.mark.parametrize(("method", "path"), [("POST", CHAT), ("GET", "/v1/models"), ("GET", "/v1/models/m")])
async def test_with_keys_on_only_their_holders_may_ask(keyed: Any, headers: dict[str, str], status: int, method: str, path: str) -> None:
    answer = await keyed.ask(method, path, {"model": "m"} if method == "POST" else None, **headers)

    assert answer.status == status
    if status == 401:
        assert answer.error["code"] == "unauthorized"
        assert answer.header("www-authenticate") == "Bearer"
        assert keyed.engine.seen == []


async def test_a_gateway_key_does_not_reach_the_engine(keyed: Any) -> None:
    await keyed.ask("POST", CHAT, {"model": "m"}, authorization="Bearer sk-one", x_api_key="sk-one")

    assert keyed.engine.header(b"authorization") is None
    assert keyed.engine.header(b"x-api-key") is None


async def test_anthropics_shape_for_a_missing_key(keyed: Any) -> None:
    answer = await keyed.ask("POST", "/v1/messages", {"model": "m"})

    assert (answer.status, answer.error["type"]) == (401, "authentication_error")


async def test_probes_need_no_key(keyed: Any) -> None:
    assert (await keyed.ask("GET", "/health")).status == 200
    assert (await keyed.ask("GET", "/ready")).status == 200


# ---- shutting down


async def test_while_it_shuts_down_the_open_end_and_the_new_are_refused(stand: Any, open_connection: Any, eventually: Any) -> None:
    held: list[Exchange] = []
    stand.engine.answer = held.append
    running = asyncio.create_task(stand.chat())
    await eventually(lambda: held)
    late = await open_connection(stand.gateway.url)

    stopping = asyncio.create_task(stand.gateway.stop(5.0))
    await eventually(lambda: stand.gateway.relay.open.draining)
    late.send("POST", CHAT, b'{"model":"m"}')
    refused = await late.answer()
    late.send("GET", "/ready")
    not_ready = await late.answer()
    held[0].respond(200, [(b"content-type", b"application/json")], b'{"late":true}')

    assert (refused.status, refused.error["code"]) == (503, "draining")
    assert refused.header("retry-after")
    assert not_ready.status == 503
    assert (await running).body == b'{"late":true}'
    await asyncio.wait_for(stopping, 5)


async def test_what_does_not_end_in_time_is_ended_with_an_error(stand: Any, eventually: Any) -> None:
    stand.engine.answer = lambda exchange: None
    running = asyncio.create_task(stand.chat(request_id="late"))
    await eventually(lambda: stand.engine.seen)

    await asyncio.wait_for(stand.gateway.stop(0.1), 5)

    answer = await running
    assert (answer.status, answer.error["code"]) == (503, "draining")
    await eventually(lambda: stand.engine.left == 1)
    assert stand.manager.explain("late")["state"] == "failed"


async def test_it_starts_again_after_a_stop(stand: Any) -> None:
    await stand.gateway.stop(0.0)
    with pytest.raises(RuntimeError):
        assert stand.gateway.url

    await stand.gateway.start("127.0.0.1", 0)

    assert (await stand.chat()).status == 200


# ---- settings, TLS, descriptors


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"max_streams": 0}, "max_streams"),
        ({"queue_keepalive_s": -1.0}, "queue_keepalive_s"),
        ({"api_keys": ("",)}, "api_keys"),
        ({"api_keys": "sk"}, "api_keys"),
        ({"admin_key": ""}, "admin_key"),
        ({"tls_cert_path": "cert.pem"}, "tls_cert_path"),
    ],
)
def test_wrong_settings_name_the_field(options: dict[str, Any], param: str) -> None:
    with pytest.raises(ConfigurationError) as raised:
        GatewaySettings(**options)

    assert raised.value.param == param


def test_a_certificate_that_is_none_is_named(tmp_path: Path) -> None:
    settings = GatewaySettings(tls_cert_path=str(tmp_path / "no.pem"), tls_key_path=str(tmp_path / "no.key"))

    with pytest.raises(ConfigurationError, match="certificate"):
        settings.tls_context()


async def test_it_serves_tls(make_stand: Any, tmp_path: Path) -> None:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256"]
    command += ["-nodes", "-days", "1", "-subj", "/CN=localhost"]
    files = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    made = subprocess.run([*command, *files], capture_output=True)  # noqa: ASYNC221
    if made.returncode:
        pytest.skip("openssl is not here to make a certificate")
    stand = await make_stand(settings=GatewaySettings(access_log=False, tls_cert_path=str(cert), tls_key_path=str(key)))
    assert stand.gateway.url.startswith("https://")
    context = ssl.create_default_context(cafile=str(cert))

    reader, writer = await asyncio.open_connection("127.0.0.1", int(stand.gateway.url.rpartition(":")[2]), ssl=context)
    writer.write(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
    assert (await asyncio.wait_for(reader.readline(), 5)).startswith(b"HTTP/1.1 200")
    writer.close()


def test_streams_that_fit() -> None:
    assert streams_that_fit(20_500) == 10_000
    assert streams_that_fit(1_000) == 375
    for limit in (2_000, 20_000, 1 << 20):  # all of them find a descriptor though other things are open, and engines find one beyond
        assert for_clients(limit) - 2 * streams_that_fit(limit) >= 100
        assert limit - for_clients(limit) >= 300
    assert streams_that_fit(100) == 37
    assert streams_that_fit(2) == 1
    assert raise_descriptor_limit() >= 256
