"""Configuration: one vocabulary, layers in order, everything wrong said at once and clearly."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from control_plane import ControlPlaneManager
from control_plane.config import ControlPlaneConfig, InstanceConfig, ServerConfig, json_schema, load_config, public_dict
from control_plane.errors import ConfigurationError
from control_plane.fleet import HealthSettings
from control_plane.gateway.settings import GatewaySettings
from control_plane.types import ExecutionInstance, ExecutionInstanceType

#: fields of an instance that the control plane writes, so that a configuration cannot
STATE_FIELDS = {
    "health_status", "gpu_utilization", "is_available", "is_healthy", "current_load", "avg_latency_ms", "throughput_tokens_per_sec",
    "active_requests", "prefilling_active_requests", "decoding_active_requests", "outstanding_ms", "learned_concurrency", "engine",
    "server", "data_parallel_rank", "ranks", "in_flight", "others_requests", "saturation",
    "ahead_requests", "ahead_ms", "dispatch_ahead_ms", "awaited_ms", "began_s", "held_back",
}  # fmt: skip


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("CONTROL_PLANE_"):
            monkeypatch.delenv(name)


def problems_of(source: Any, **overrides: Any) -> list[str]:
    with pytest.raises(ConfigurationError) as caught:
        load_config(source, overrides)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def defaults_of(cls: type) -> dict[str, Any]:
    return {name: info.get_default(call_default_factory=True) for name, info in cls.model_fields.items()}  # type: ignore[attr-defined]


def test_top_level_names_and_defaults_are_those_of_the_manager() -> None:
    parameters = inspect.signature(ControlPlaneManager).parameters
    handed_in = {"clock", "engine_factory"}
    config = ControlPlaneConfig()

    assert set(config.manager_arguments()) == set(parameters) - handed_in
    # the seed's manager balances load; who serves gets the router that measures best
    assert (config.routing_strategy, parameters["routing_strategy"].default) == ("adaptive", "load_balanced")
    config.routing_strategy = "load_balanced"
    given_as_objects = {"pd_config", "health", "prefix"}
    assert {name: value for name, value in config.manager_arguments().items() if name not in given_as_objects} == {
        name: one.default for name, one in parameters.items() if name not in handed_in | given_as_objects
    }
    ControlPlaneManager(**config.manager_arguments())


def test_instance_names_and_defaults_are_those_of_the_record() -> None:
    names = {field.name for field in dataclasses.fields(ExecutionInstance)} | {"is_healthy"}

    assert set(InstanceConfig.model_fields) == names - STATE_FIELDS
    record = ExecutionInstance()
    assert {name: getattr(record, name) for name in InstanceConfig.model_fields if name != "instance_id"} == {
        name: value for name, value in defaults_of(InstanceConfig).items() if name != "instance_id"
    }


def test_server_names_and_defaults_are_those_of_the_gateway() -> None:
    settings = {field.name: field.default for field in dataclasses.fields(GatewaySettings)}
    listeners = {"host", "port", "admin_host", "admin_port"}
    mine = {name: tuple(value) if isinstance(value, list) else value for name, value in defaults_of(ServerConfig).items()}

    assert {name: value for name, value in mine.items() if name not in listeners} == settings


def test_the_documented_file_loads(tmp_path: Path) -> None:
    file = tmp_path / "cp.yaml"
    file.write_text(
        """
        scheduling_policy: adaptive
        routing_strategy: load_balanced
        enable_pd_separation: true
        pd_config: {routing_policy: adaptive, prefilling_threshold_input_tokens: 2048}
        server: {host: 0.0.0.0, port: 8080, admin_port: 8081}
        instances:
          - {instance_id: a, host: 10.0.0.1, port: 8000, instance_type: prefilling, tensor_parallel_size: 4, gpu_count: 4,
             price_per_gpu_hour_usd: 2.5, prefilling_config: {target_batch_size: 8}}
          - {url: "http://10.0.0.2:8000"}
        health: {probe_interval_s: 0.5}
        """
    )
    config = load_config(file)
    first, second = config.make_instances()

    assert config.pd_config.prefilling_threshold_input_tokens == 2048
    assert config.pd_config.prefilling_threshold_ratio == 4.0
    assert (config.server.host, config.server.admin_port) == ("0.0.0.0", 8081)
    assert first.instance_type is ExecutionInstanceType.PREFILLING
    assert (first.price_per_hour_usd, first.prefilling_config.target_batch_size) == (10.0, 8)  # type: ignore[union-attr]
    assert (second.instance_id, second.base_url) == ("10.0.0.2:8000", "http://10.0.0.2:8000")
    assert config.health == HealthSettings(probe_interval_s=0.5)


def test_later_layers_win_key_by_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTROL_PLANE_SCHEDULING_POLICY", "priority")
    monkeypatch.setenv("CONTROL_PLANE_SERVER__PORT", "1111")
    monkeypatch.setenv("CONTROL_PLANE_INSTANCES", json.dumps([{"url": "http://h:1"}]))
    file = {"scheduling_policy": "fifo", "routing_strategy": "random", "server": {"host": "h", "port": 1, "max_streams": 5}}
    config = load_config(file, {"server": {"port": 2222}})

    assert (config.scheduling_policy, config.routing_strategy) == ("priority", "random")
    assert (config.server.host, config.server.port, config.server.max_streams) == ("h", 2222, 5)
    assert [one.instance_id for one in config.make_instances()] == ["h:1"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        pytest.param({"scheduling_polcy": "fifo"}, "scheduling_polcy: no such key; did you mean scheduling_policy?", id="misspelt"),
        pytest.param({"port": 80}, "port: no such key; did you mean server.port?", id="in the wrong place"),
        pytest.param({"server": {"prot": 80}}, "server.prot: no such key; did you mean port?", id="misspelt below"),
        pytest.param({"pd_config": {"enable": True}}, "pd_config.enable: no such key; did you mean enabled?", id="in a dataclass"),
        pytest.param({"instances": [{"ulr": "x"}]}, "instances.0.ulr: no such key; did you mean url?", id="in a list"),
        pytest.param({"discovery": {"dns": "x"}}, "discovery: instances from discovery are not available yet", id="not there yet"),
        pytest.param({"scheduling_policy": "fifoo"}, "scheduling_policy: 'fifoo' given; not one of fifo, priority", id="policy"),
        pytest.param({"routing_strategy": "randon"}, "did you mean random?", id="router"),
        pytest.param({"queue_timeout_s": 0}, "queue_timeout_s: 0 given; input should be greater than 0", id="bound"),
        pytest.param({"server": {"port": "http"}}, "server.port: 'http' given; input should be a valid integer", id="type"),
        pytest.param({"server": {"port": 70_000}}, "server.port: 70000 given; input should be less than or equal to 65535", id="port"),
        pytest.param({"enable_auto_scaling": True}, "enable_auto_scaling: True given; auto-scaling is not available yet", id="scaling"),
        pytest.param({"instances": [{"instance_type": "fast"}]}, "instance_type: 'fast' given; input should be 'general'", id="enum"),
        pytest.param({"instances": [{"url": "ftp://h"}]}, "instances.0: url 'ftp://h' is not like http://HOST:PORT", id="url"),
        pytest.param({"instances": [{"url": "h:1"}, {"host": "h", "port": 1}]}, "instance_id h:1 is given more than once", id="twice"),
        pytest.param({"health": {"probe_misses": 0}}, "health.probe_misses 0 is not above 0", id="health"),
        pytest.param({"pd_config": {"routing_policy": "x"}}, "pd_config.routing_policy 'x' is not one of", id="pd"),
        pytest.param({"server": {"tls_cert_path": "c.pem"}}, "tls_cert_path and tls_key_path are given together", id="tls"),
        pytest.param({"server": {"api_keys": [""]}}, "an empty key would let anyone in", id="empty key"),
        pytest.param({"default_model": "${NOT_THERE}"}, "default_model: ${NOT_THERE} given, but the environment has no", id="variable"),
        pytest.param({"server": {"admin_key": "file:/not/there"}}, "server.admin_key: file:/not/there given, but it", id="file"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_what_would_be_right(given: dict[str, Any], said: str) -> None:
    problems = problems_of(given)

    assert len(problems) == 1
    assert said in problems[0]


def test_everything_wrong_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTROL_PLANE_SCHEDULNG_POLICY", "fifo")
    monkeypatch.setenv("CONTROL_PLANE_PORT", "80")
    problems = problems_of({"queue_timeout_s": -1, "server": {"prot": 1}, "default_model": "${NOT_THERE}"})

    assert len(problems) == 5
    assert "CONTROL_PLANE_SCHEDULNG_POLICY: no such setting; did you mean CONTROL_PLANE_SCHEDULING_POLICY?" in problems
    assert "CONTROL_PLANE_PORT: no such setting; did you mean CONTROL_PLANE_SERVER__PORT?" in problems


def test_what_kubernetes_sets_for_a_service_called_control_plane_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {
        "SERVICE_HOST": "10.0.0.1", "SERVICE_PORT": "80", "SERVICE_PORT_HTTP": "80", "PORT": "tcp://10.0.0.1:80",
        "PORT_80_TCP": "tcp://10.0.0.1:80", "PORT_80_TCP_PROTO": "tcp", "PORT_80_TCP_PORT": "80", "PORT_80_TCP_ADDR": "10.0.0.1",
    }.items():  # fmt: skip
        monkeypatch.setenv(f"CONTROL_PLANE_{name}", value)

    assert load_config() == ControlPlaneConfig()


def test_a_value_of_the_environment_that_is_no_json(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTROL_PLANE_INSTANCES", "[{")

    (problem,) = problems_of({})
    assert problem == "CONTROL_PLANE_INSTANCES: '[{' given; lists and mappings are written as JSON"


def test_secrets_of_the_environment_may_be_files_and_text_is_taken_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("one\ntwo\n")
    monkeypatch.setenv("CONTROL_PLANE_SERVER__API_KEYS", f"file:{tmp_path / 'keys'}")
    monkeypatch.setenv("CONTROL_PLANE_SERVER__ADMIN_KEY", "off")
    monkeypatch.setenv("CONTROL_PLANE_SERVER__CORS_ORIGINS", '["https://a"]')
    monkeypatch.setenv("CONTROL_PLANE_SERVER", '{"port": 1, "host": "h"}')
    monkeypatch.setenv("CONTROL_PLANE_SERVER__PORT", "2")

    server = load_config({"server": {"max_streams": 3}}).server

    assert (server.api_keys, server.admin_key, server.cors_origins) == (["one", "two"], "off", ["https://a"])
    assert (server.host, server.port, server.max_streams) == ("h", 2, 3)


def test_a_secret_that_cannot_be_read_is_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONTROL_PLANE_SERVER__API_KEYS", "[hunter2")

    (problem,) = problems_of({})
    assert problem.startswith("CONTROL_PLANE_SERVER__API_KEYS: ")
    assert "hunter2" not in problem


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"prot": 80}, "prot: no such key; did you mean server.port?"),
        ({"zzz": 1}, "zzz: no such key; did you mean"),
        ({1: 2}, "1: no such key; did you mean"),
        ({"server": {True: 1}}, "server.True: no such key; did you mean"),
        ({"queue_timeout_s": True}, "queue_timeout_s: True given; a number is wanted"),
        ({"server": {"port": False}}, "server.port: False given; a number is wanted"),
        ({"instances": [{"url": "http://h:1", "host": "other"}]}, "instances.0: url and host name different servers; give one of them"),
        ({"instances": [{"url": "http://h:1", "port": 2}]}, "instances.0: url and port name different servers; give one of them"),
    ],
)
def test_what_is_wrong_is_told_with_what_would_be_right(content: dict[object, object], said: str) -> None:
    (problem,) = problems_of(content)
    assert problem.startswith(said)


def test_url_host_and_port_may_say_the_same() -> None:
    (instance,) = load_config({"instances": [{"url": "http://h:1", "host": "h", "port": 1}]}).make_instances()
    assert instance.base_url == "http://h:1"


def test_a_yaml_key_that_is_a_list_is_no_crash(tmp_path: Path) -> None:
    (tmp_path / "cp.yaml").write_text("? [a, b]\n: 1\n")
    with pytest.raises(ConfigurationError, match="not valid YAML"):
        load_config(tmp_path / "cp.yaml")


def test_a_manager_from_a_configuration_has_its_settings_and_instances(tmp_path: Path) -> None:
    (tmp_path / "cp.yaml").write_text("scheduling_policy: fifo\nqueue_max_requests: 7\ninstances: [{url: 'h:1', model_name: m}]\n")
    manager = ControlPlaneManager.from_config(tmp_path / "cp.yaml", scheduling_policy="priority")

    assert (manager.scheduling_policy.name, manager.queue.max_requests) == ("priority", 7)
    assert [one.instance_id for one in manager.get_instances()] == ["h:1"]
    loaded = load_config({"default_model": "m"})
    assert load_config(loaded) is loaded
    assert load_config(loaded, {"seed": 3}).manager_arguments() == loaded.manager_arguments() | {"seed": 3}


def test_secrets_come_from_files_and_variables_and_are_not_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_KEY", "engine-secret")
    (tmp_path / "keys").write_text("one\ntwo\n")
    (tmp_path / "admin").write_text("  admin-secret\n")
    source = {
        "server": {"api_keys": f"file:{tmp_path}/keys", "admin_key": f"file:{tmp_path}/admin"},
        "instances": [{"url": "http://h:1", "api_key": "${ENGINE_KEY}"}],
        "default_model": "file:/stays/as/it/is",
    }
    config = load_config(source)

    assert (config.server.api_keys, config.server.admin_key) == (["one", "two"], "admin-secret")
    assert config.make_instances()[0].api_key == "engine-secret"
    assert config.default_model == "file:/stays/as/it/is"
    shown = json.dumps(public_dict(config))
    assert "-secret" not in shown
    assert json.loads(shown)["server"]["api_keys"] == json.loads(shown)["instances"][0]["api_key"] == "***"


def test_a_wrong_secret_is_not_repeated_in_the_error() -> None:
    (problem,) = problems_of({"server": {"admin_key": 12345}})

    assert "server.admin_key" in problem
    assert "12345" not in problem


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param("a: b: c", "is not valid YAML", id="not YAML"),
        pytest.param("- fifo", "holds list, not `name: value` lines", id="a list"),
        pytest.param("default_model: a\ndefault_model: b", "the key 'default_model' is there twice", id="a key twice"),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "cp.yaml").write_text(text)

    with pytest.raises(ConfigurationError, match=re.escape(said)):
        load_config(tmp_path / "cp.yaml")
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_config(tmp_path / "missing.yaml")


def test_the_schema_describes_every_field_and_refuses_unknown_keys() -> None:
    schema = json_schema()
    definitions = schema["$defs"]

    assert set(schema["properties"]) == set(ControlPlaneConfig.model_fields)
    assert schema["additionalProperties"] is False
    assert definitions["ServerConfig"]["additionalProperties"] is False
    assert definitions["ServerConfig"]["properties"]["queue_keepalive_s"]["description"]
