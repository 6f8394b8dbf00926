"""The command line: its vocabulary, its exit status, what it prints; and ``serve`` as a process, from start to signal."""

from __future__ import annotations

import asyncio
import http.client
import json
import re
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from child_environment import child_environment

from control_plane import ControlPlaneManager, ExecutionInstance
from control_plane.cli import main, operate
from control_plane.cli.flags import OWN_FLAGS, overrides_from
from control_plane.cli.startup import startup_warnings
from control_plane.config import ControlPlaneConfig, ServerConfig
from control_plane.errors import ConfigurationError, ControlPlaneError
from control_plane.gateway import Gateway, GatewaySettings
from control_plane.types import HealthStatus

COMMAND = (sys.executable, "-m", "control_plane.cli")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """Run the command in this process; its exit status."""
    monkeypatch.setattr(sys, "argv", ["control-plane", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


# ---- vocabulary


def test_the_commands_there_are(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--help") == 0

    listed = re.findall(r"^  ([a-z-]+)  +\S", capsys.readouterr().out.partition("Commands:")[2], re.MULTILINE)
    ours = "serve sim-engine calibrate demo compare check schema instances drain undrain explain top record"
    assert listed == ours.split()


def test_every_option_of_serve_is_a_field_of_the_configuration(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "serve", "--help") == 0

    options = set(re.findall(r"^  (--[a-z-]+)", capsys.readouterr().out, re.MULTILINE)) - set(OWN_FLAGS) - {"--help"}
    fields = {"--" + name.replace("_", "-") for name in (*ControlPlaneConfig.model_fields, *ServerConfig.model_fields)}
    assert options <= fields
    assert len(options) >= 7


@pytest.mark.parametrize(
    ("arguments", "tree"),
    [
        ("--queue-timeout-s 60", {"queue_timeout_s": "60"}),
        ("--queue-timeout-s=60 --max-streams 5", {"queue_timeout_s": "60", "server": {"max_streams": "5"}}),
        ("--server.max-streams 5", {"server": {"max_streams": "5"}}),
        ("--health.probe-interval-s 1", {"health": {"probe_interval_s": "1"}}),
        ("--no-enable-monitoring --ask-usage", {"enable_monitoring": False, "server": {"ask_usage": True}}),
        ("--default-model 8", {"default_model": "8"}),
        ("--first-byte-timeout-s null", {"first_byte_timeout_s": None}),
        ("--cors-origins [a,b]", {"server": {"cors_origins": ["a", "b"]}}),
    ],
)
def test_any_field_is_a_flag(arguments: str, tree: dict[str, Any]) -> None:
    assert overrides_from(arguments.split()) == tree


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--prot", "80"), "no such option: --prot; did you mean --port?"),
        (("--schedulng-policy", "fifo"), "did you mean --scheduling-policy?"),
        (("fifo",), "'fifo' is no option; options are --name value"),
        (("--cors-origins", "[a"), "--cors-origins: '[a' cannot be read"),
    ],
)
def test_a_wrong_flag_is_named_with_the_nearest(arguments: tuple[str, ...], said: str) -> None:
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        overrides_from(arguments)


# ---- exit status and output


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("serve", "--prot", "80"), "did you mean --port?"),
        (("serve", "--port", "80000"), "server.port: '80000' given; input should be less than or equal to 65535"),
        (("sim-engine", "--port", "80000"), "'--port': 80000 given; a whole number from 0 to 65535 would be right"),
        (("serve", "--port", "abc"), "server.port: 'abc' given; input should be a valid integer"),
        (("sim-engine", "--port", "abc"), "'--port': abc given; a whole number from 0 to 65535 would be right"),
        (("sim-engine", "--port", "0", "--speed", "fast"), "fast given; a number from 0.001 to 10000 would be right"),
        (("sim-engine", "--port", "0", "--max-model-len", "0"), "0 given; a whole number from 1 to"),
        (("sim-engine", "--port", "0", "--scheduling-policy", "lifo"), "scheduling_policy 'lifo' is not one of fcfs, priority"),
        (("top", "--count", "x"), "x given; a whole number"),
        (("instances", "--url", "http://h:99999"), "is not like http://HOST:PORT"),
        (("instances", "--url", "http://[h"), "is not like http://HOST:PORT"),
        (("serve", "--scheduling-policy", "fifoo"), "scheduling_policy: 'fifoo' given"),
        (("serve", "--config", "/not/there.yaml"), "cannot be read"),
        (("serve", "--log-level", "loud"), "log_level 'loud' is not one of"),
        (("serve", "--engine", "ftp://h"), "url 'ftp://h' is not like"),
        (("check",), "--config"),
        (("instances", "--url", "ftp://h"), "is not like http://HOST:PORT"),
        (("compare",), "compare"),
    ],
)
def test_wrong_usage_ends_with_2_and_says_what_is_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], said: str
) -> None:
    assert run(monkeypatch, *arguments) == 2

    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""


def test_work_that_fails_ends_with_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        assert run(monkeypatch, "instances", "--url", url) == 1

    assert f"no gateway answers at {url}" in capsys.readouterr().err


def test_check_explains_a_good_file_and_json_goes_alone_to_standard_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "cp.yaml"
    file.write_text(yaml.safe_dump({"server": {"admin_key": "hidden"}, "instances": [{"url": "http://h:1", "instance_id": "first"}]}))

    assert run(monkeypatch, "check", "--config", str(file)) == 0
    text = capsys.readouterr().out
    assert "is good" in text
    assert "first" in text
    assert "\x1b" not in text

    assert run(monkeypatch, "check", "--config", str(file), "--json", "-") == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["server"]["admin_key"] == "***"
    assert shown["instances"][0]["instance_id"] == "first"


def test_check_says_what_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "cp.yaml").write_text("scheduling_polcy: fifo\nserver: {port: x}\n")

    assert run(monkeypatch, "check", "--config", str(tmp_path / "cp.yaml")) == 2
    said = capsys.readouterr().err
    assert "did you mean scheduling_policy?" in said
    assert "server.port: 'x' given" in said


def test_schema_is_json(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "schema") == 0

    assert "scheduling_policy" in json.loads(capsys.readouterr().out)["properties"]


# ---- warnings at the start


def test_what_is_said_of_the_surroundings_at_the_start() -> None:
    (few,) = startup_warnings(descriptors=256, instances=1)
    (empty,) = startup_warnings(descriptors=65_536, instances=0)

    assert "only 256 file descriptors" in few
    assert "no instances" in empty
    assert list(startup_warnings(descriptors=65_536, instances=1)) == []


# ---- operating a running gateway


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    manager = ControlPlaneManager()
    manager.register_instance(ExecutionInstance(instance_id="rack/one:8000", host="127.0.0.1", port=9, model_name="m"))
    gateway = Gateway(manager, GatewaySettings(admin_key="k", access_log=False))
    await gateway.start("127.0.0.1", 0)
    yield gateway
    await gateway.stop(0.0)
    await manager.stop(0.0)


async def test_instances_drain_undrain_and_explain(gateway: Gateway, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "key").write_text("k\n")
    client, stranger = operate.AdminClient(gateway.url, f"file:{tmp_path}/key"), operate.AdminClient(gateway.url)
    name = "rack/one:8000"
    (instance,) = gateway.manager.get_instances()

    await asyncio.to_thread(operate.drain, client, name)
    assert instance.health_status == HealthStatus.DRAINING
    await asyncio.to_thread(operate.show_instances, client, None)
    await asyncio.to_thread(operate.undrain, client, name)
    assert instance.health_status != HealthStatus.DRAINING
    await asyncio.to_thread(operate.top, client, 0.5, 1)
    printed = capsys.readouterr().out
    assert f"{name} gets no new work" in printed
    assert "draining" in printed
    assert "0 running, 0 queued" in printed

    await asyncio.to_thread(operate.show_instances, client, "-")
    assert json.loads(capsys.readouterr().out)["instances"][0]["instance_id"] == name
    with pytest.raises(ControlPlaneError, match="no request 'r'"):
        await asyncio.to_thread(operate.explain, client, "r", None)
    with pytest.raises(ControlPlaneError, match="admin API needs its key"):
        await asyncio.to_thread(operate.show_instances, stranger, None)
    client.close()
    stranger.close()


def test_explain_tells_where_a_request_went_and_why() -> None:
    decision = {"instance_id": "a", "router": "load_balanced", "policy": "fifo", "reason": "least work outstanding"}
    found = {
        "request_id": "r",
        "state": "completed",
        "queue_ms": 3.0,
        "e2e_ms": 1_234.5,
        "ttft_ms": None,
        "attempts": 2,
        "decision": decision,
    }

    assert list(operate.explain_lines(found)) == [
        "request r: completed",
        "waited 3.0 ms, end to end 1,234.5 ms",
        "went to a by load_balanced, ordered by fifo: least work outstanding",
        "tried 2 times",
    ]


def test_explain_shows_what_a_candidates_milliseconds_are_made_of() -> None:
    by_parts = {"instance_id": "a", "predicted_ms": 30.0, "parts": {"waiting": 10.0, "prefill": 20.0, "cached_tokens": 512.0}}
    plain = {"instance_id": "b", "predicted_ms": 40.0}

    assert operate.candidate_rows([by_parts, plain]) == (
        ("instance", "predicted ms", "waiting", "prefill", "cached tokens"),
        [("a", 30.0, 10.0, 20.0, 512.0), ("b", 40.0, None, None, None)],
    )
    assert operate.candidate_rows([plain]) == (("instance", "predicted ms"), [("b", 40.0)])


# ---- as processes


class Running:
    """A ``control-plane`` process and the address it said it listens on."""

    def __init__(self, *arguments: str) -> None:
        environment = child_environment()
        self.process = subprocess.Popen(
            [*COMMAND, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, env=environment
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.fullmatch(r"listening on (http://\S+:\d+)\n", line)
        self.url = found[1] if found else ""

    def end(self) -> tuple[int, str]:
        """Exit status and standard error, after a SIGTERM if it still runs."""
        if self.process.poll() is None:
            self.process.terminate()
        _, errors = self.process.communicate(timeout=20)
        return self.process.returncode, errors


@pytest.fixture
def started() -> Iterator[list[Running]]:
    processes: list[Running] = []
    yield processes
    for one in processes:
        if one.process.poll() is None:
            one.process.kill()
        one.process.communicate()


def ask(url: str, body: dict[str, Any] | None = None) -> http.client.HTTPResponse:
    """The answer's head; its body is still to be read."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=20)
    if body is None:
        connection.request("GET", parts.path, headers={"connection": "close"})
    else:
        connection.request("POST", parts.path, json.dumps(body), {"content-type": "application/json", "connection": "close"})
    return connection.getresponse()


def fetch(url: str, body: dict[str, Any] | None = None) -> tuple[int, bytes]:
    with ask(url, body) as response:
        return response.status, response.read()


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "sim", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4, "ignore_eos": True} | more


def test_serve_over_a_simulated_engine_from_start_to_signal(started: list[Running], capsys: pytest.CaptureFixture[str]) -> None:
    engine = Running("sim-engine", "--port", "0", "--model", "sim", "--speed", "50")
    started.append(engine)
    serve = Running("serve", "--engine", engine.url, "--engine", "http://127.0.0.1:9", "--port", "0", "--queue-timeout-s", "30")
    started.append(serve)

    assert engine.url
    assert serve.url
    listed = json.loads(fetch(f"{serve.url}/v1/models")[1])["data"]
    assert [card["id"] for card in listed] == ["sim"], "its models are known as soon as it says that it listens"
    with ask(f"{serve.url}/v1/chat/completions", chat()) as answer:
        assert (answer.status, json.load(answer)["object"]) == (200, "chat.completion")
        request_id = answer.headers["x-request-id"]
    status, page = fetch(f"{serve.url}/metrics")
    assert status == 200
    assert b'control_plane_requests_total{model="sim",outcome="completed",priority="normal"} 1.0' in page
    assert b"control_plane_loop_lag_seconds" in page
    status, config = fetch(f"{serve.url}/control/v1/config")
    assert (status, json.loads(config)["queue_timeout_s"]) == (200, 30.0)
    found: list[str] = []
    for _ in range(100):
        found = [one["health_status"] for one in json.loads(fetch(f"{serve.url}/control/v1/instances")[1])["instances"]]
        if "unhealthy" in found:
            break
        time.sleep(0.05)
    assert found == ["healthy", "unhealthy"]
    with closing(operate.AdminClient(serve.url)) as client:
        operate.explain(client, request_id, None)
    told = capsys.readouterr().out
    assert f"request {request_id}: completed" in told
    assert f"went to {engine.url.removeprefix('http://')} by adaptive, ordered by adaptive:" in told
    code, errors = serve.end()
    assert code == 0
    assert "stopping" in errors
    assert re.search(r"WARNING control_plane.events 127.0.0.1:9: .*event=instance_down", errors)
    assert '"status":200' in errors


def test_an_address_that_is_taken_ends_with_1(started: list[Running]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        serve = Running("serve", "--port", str(taken.getsockname()[1]))
        started.append(serve)
        code, errors = serve.end()

    assert (code, serve.url) == (1, "")
    assert "address already in use" in errors
    assert "Traceback" not in errors


def test_the_first_signal_lets_a_stream_end_and_refuses_the_new(started: list[Running]) -> None:
    engine = Running("sim-engine", "--port", "0", "--model", "sim")
    serve = Running("serve", "--engine", engine.url, "--port", "0", "--no-access-log")
    started += [engine, serve]
    with ask(f"{serve.url}/v1/chat/completions", chat(max_tokens=200, stream=True)) as stream:
        assert stream.status == 200
        serve.process.terminate()
        time.sleep(0.2)
        with pytest.raises(subprocess.TimeoutExpired):
            serve.process.wait(0.01)
        try:
            refused, _ = fetch(f"{serve.url}/v1/chat/completions", chat())
        except ConnectionError:
            refused = 503
        rest = stream.read()

    assert refused == 503
    assert rest.endswith(b"data: [DONE]\n\n")
    assert serve.process.wait(10) == 0


def test_a_second_signal_ends_what_runs_at_once(started: list[Running]) -> None:
    engine = Running("sim-engine", "--port", "0", "--model", "sim", "--speed", "0.05")
    serve = Running("serve", "--engine", engine.url, "--port", "0", "--no-access-log")
    started += [engine, serve]
    with ask(f"{serve.url}/v1/chat/completions", chat(max_tokens=2_000, stream=True)) as stream:
        assert stream.status == 200
        serve.process.terminate()
        with pytest.raises(subprocess.TimeoutExpired):
            serve.process.wait(0.5)
        serve.process.terminate()
        code = serve.process.wait(10)

    assert code == 1
