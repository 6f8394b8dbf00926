"""A wrong value of an option is refused where it is given: a typed error that names the field and what would be right."""

from __future__ import annotations

import math

import pytest

from control_plane import (
    ConfigurationError,
    ControlPlaneManager,
    DecodingConfig,
    ExecutionInstance,
    InvalidRequest,
    ParallelismType,
    PDSeparationConfig,
    PrefillingConfig,
    RequestMetadata,
)

INSTANCES = [
    ("port", "8000"),
    ("port", -1),
    ("port", 65_536),
    ("host", ""),
    ("host", None),
    ("model_name", None),
    ("instance_id", 5),
    ("tensor_parallel_size", 0),
    ("data_parallel_size", "2"),
    ("gpu_count", True),
    ("gpu_memory_gb", -80),
    ("health_status", "well"),
    ("is_healthy", "yes"),
    ("is_available", None),
    ("max_concurrent_requests", "5"),
    ("max_concurrent_requests", 0),
    ("max_concurrent_requests", 2.5),
    ("price_per_gpu_hour_usd", math.nan),
    ("price_per_gpu_hour_usd", -1.0),
    ("metadata", None),
    ("served_models", "one-string"),
    ("served_models", [1]),
    ("supported_request_types", "chat"),
    ("supported_request_types", {"chatting"}),
    ("supported_request_types", 5),
    ("prefilling_config", {"target_batch_size": 1}),
    ("decoding_config", 5),
    ("api_key", 5),
]


@pytest.mark.parametrize(("field", "value"), INSTANCES)
def test_of_an_instance(field: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=f"{field} .*must be") as refused:
        ExecutionInstance(**{"instance_id": "i", field: value})  # type: ignore[arg-type]
    assert refused.value.param == field
    if field == "api_key":
        assert "5" not in str(refused.value)


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (PrefillingConfig, "target_batch_size", 0),
        (PrefillingConfig, "tensor_parallel_size", -1),
        (PrefillingConfig, "enable_chunked_prefill", "no"),
        (PrefillingConfig, "target_throughput_tokens_per_sec", 0),
        (DecodingConfig, "target_latency_ms", 0),
        (DecodingConfig, "max_parallel_requests", "many"),
        (DecodingConfig, "kv_cache_memory_fraction", 1.5),
        (PDSeparationConfig, "enabled", None),
        (PDSeparationConfig, "prefilling_threshold_input_tokens", "800"),
        (PDSeparationConfig, "prefilling_threshold_ratio", math.inf),
        (PDSeparationConfig, "decoding_min_instances", 9),
        (PDSeparationConfig, "max_transfer_latency_ms", -1),
    ],
)
def test_of_prefill_and_decode_options(kind: type, field: str, value: object) -> None:
    with pytest.raises(InvalidRequest, match=f"{field} is .*must be") as refused:
        kind(**{field: value})
    assert refused.value.param == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("queue_timeout_s", -1),
        ("queue_timeout_s", None),
        ("queue_timeout_s", math.nan),
        ("no_instance_timeout_s", "30"),
        ("drain_timeout_s", -1),
        ("connect_timeout_s", 0),
        ("engine_keepalive_s", math.inf),
        ("queue_max_requests", 0),
        ("queue_max_bytes", 0.5),
        ("max_body_memory_bytes", 0),
        ("history_max_requests", -1),
        ("history_max_age_s", 0),
        ("metrics_window_s", 0),
        ("metrics_window_s", "60"),
        ("dispatch_window", 0),
        ("max_attempts", 0),
        ("enable_pd_separation", "no"),
        ("default_model", 5),
        ("pd_config", {"enabled": False}),
        ("health", 5),
    ],
)
def test_of_the_manager(field: str, value: object) -> None:
    with pytest.raises(ConfigurationError, match=f"{field} is .*must be") as refused:
        ControlPlaneManager(**{field: value})  # type: ignore[arg-type]
    assert refused.value.param == field


def test_right_values_at_the_borders() -> None:
    ControlPlaneManager(
        queue_timeout_s=math.inf, no_instance_timeout_s=math.inf, drain_timeout_s=0, connect_timeout_s=None, history_max_requests=0
    )
    instance = ExecutionInstance(port=0, served_models=("a", "b"), supported_request_types=["chat"])  # type: ignore[arg-type]
    assert (instance.served_models, instance.supported_request_types) == (["a", "b"], {"chat"})
    PDSeparationConfig(prefilling_threshold_input_tokens=0, prefilling_min_instances=0, prefilling_max_instances=0)


def test_a_hint_is_a_member_or_refused() -> None:
    assert RequestMetadata(parallelism_hint="tp").parallelism_hint is ParallelismType.TENSOR_PARALLEL  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="tp, pp, dp, ep, hybrid") as refused:
        RequestMetadata(parallelism_hint="zz")  # type: ignore[arg-type]
    assert refused.value.param == "parallelism_hint"


@pytest.mark.parametrize("request_", [None, {"prompt": "x"}, "x"])
async def test_of_what_is_no_request_or_instance(request_: object) -> None:
    manager = ControlPlaneManager()
    instance, decision = ExecutionInstance(), None
    for call in (
        lambda: manager.submit_request(request_),  # type: ignore[arg-type]
        lambda: anext(manager.stream(request_)),  # type: ignore[call-overload]
        lambda: manager.executor.execute_request(request_, instance, decision),  # type: ignore[arg-type]
    ):
        with pytest.raises(InvalidRequest, match=r"must be a RequestMetadata") as refused:
            await call()
        assert refused.value.param == "request"
    with pytest.raises(InvalidRequest, match=r"must be an ExecutionInstance") as refused:
        manager.register_instance(request_)  # type: ignore[arg-type]
    assert refused.value.param == "instance"
    for where, what in ((request_, decision), (instance, request_)):
        with pytest.raises(InvalidRequest, match=r"must be an? (ExecutionInstance|SchedulingDecision)"):
            await manager.executor.execute_request(RequestMetadata(prompt="x"), where, what)  # type: ignore[arg-type]


def test_a_profile_that_is_in_no_catalogue_is_refused() -> None:
    manager = ControlPlaneManager()
    with pytest.raises(InvalidRequest, match=r"did you mean 'h100-llama3-8b'\?") as refused:
        manager.register_instance(ExecutionInstance(profile="h100-lama3-8b"))
    assert refused.value.param == "profile"
    assert manager.get_instances() == []
    with pytest.raises(ConfigurationError, match=r"instances\.0\.profile.*did you mean"):
        ControlPlaneManager.from_config({"instances": [{"url": "http://127.0.0.1:9000", "profile": "h100-lama3-8b"}]})
