"""The public API by its letters: names, fields, defaults, signatures, members, codes. What stands here does not change silently."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest

import control_plane
from control_plane import (
    AdaptivePolicy,
    ControlPlaneError,
    ControlPlaneManager,
    CostOptimizedPolicy,
    DecodingConfig,
    ExecutionCoordinator,
    ExecutionInstance,
    ExecutionInstanceType,
    FIFOPolicy,
    InvalidRequest,
    LoadBalancer,
    ParallelismConfig,
    ParallelismOptimizer,
    ParallelismStrategy,
    ParallelismType,
    PDMetrics,
    PDRoutingStrategy,
    PDSeparationConfig,
    PerformanceMetrics,
    PrefillingConfig,
    PriorityPolicy,
    RequestMetadata,
    RequestPriority,
    RequestRouter,
    RequestStatus,
    RequestStatusInfo,
    SchedulingDecision,
    SchedulingPolicy,
    SLOAwarePolicy,
    errors,
)

EXPORTED = [
    "AdaptivePolicy",
    "BodyMemoryFull",
    "BudgetExhausted",
    "ConfigurationError",
    "ControlPlaneError",
    "ControlPlaneManager",
    "CostOptimizedPolicy",
    "DataParallelStrategy",
    "DeadlineUnreachable",
    "DecodingConfig",
    "Draining",
    "EngineError",
    "ExecutionCoordinator",
    "ExecutionInstance",
    "ExecutionInstanceType",
    "ExpertParallelStrategy",
    "FIFOPolicy",
    "HybridParallelStrategy",
    "InstanceFailed",
    "InstanceNotFound",
    "InvalidRequest",
    "Leg",
    "LoadBalancer",
    "ModelDoesNotFit",
    "ModelNotFound",
    "NoInstanceAvailable",
    "PDMetrics",
    "PDRoutingStrategy",
    "PDSeparationConfig",
    "ParallelismConfig",
    "ParallelismOptimizer",
    "ParallelismStrategy",
    "ParallelismType",
    "PerformanceMetrics",
    "PipelineParallelStrategy",
    "Plan",
    "PrefillingConfig",
    "PriorityPolicy",
    "QueueFull",
    "RequestCancelled",
    "RequestKind",
    "RequestMetadata",
    "RequestNotFound",
    "RequestPriority",
    "RequestRouter",
    "RequestStatus",
    "RequestStatusInfo",
    "RequestTimeout",
    "RoutingStrategy",
    "SLOAwarePolicy",
    "SchedulingDecision",
    "SchedulingPolicy",
    "TensorParallelStrategy",
]

#: the names that users of the seed and of the earlier implementations import
SEED_NAMES = [
    "ControlPlaneManager",
    "ExecutionCoordinator",
    "RequestRouter",
    "LoadBalancer",
    "PDRoutingStrategy",
    "RequestMetadata",
    "RequestPriority",
    "RequestStatus",
    "ExecutionInstance",
    "ExecutionInstanceType",
    "SchedulingDecision",
    "PerformanceMetrics",
    "PDMetrics",
    "PDSeparationConfig",
    "PrefillingConfig",
    "DecodingConfig",
    "SchedulingPolicy",
    "FIFOPolicy",
    "PriorityPolicy",
    "SLOAwarePolicy",
    "CostOptimizedPolicy",
    "AdaptivePolicy",
    "ParallelismType",
    "ParallelismConfig",
    "ParallelismOptimizer",
    "ParallelismStrategy",
    "TensorParallelStrategy",
    "PipelineParallelStrategy",
    "DataParallelStrategy",
    "ExpertParallelStrategy",
    "HybridParallelStrategy",
]


def test_what_the_package_exports() -> None:
    assert sorted(control_plane.__all__) == sorted(EXPORTED)
    assert len(set(control_plane.__all__)) == len(control_plane.__all__)
    assert all(hasattr(control_plane, name) for name in control_plane.__all__)
    assert set(SEED_NAMES) <= set(control_plane.__all__)


FIELDS: dict[type, dict[str, Any]] = {
    RequestMetadata: {
        "request_id": "", "user_id": None, "priority": RequestPriority.NORMAL, "slo_deadline_ms": None, "max_tokens": 512, "prompt": "",
        "model_name": None, "cost_budget": None, "parallelism_hint": None, "temperature": None, "top_p": None, "arrival_time": None,
        "queue_time": None, "schedule_time": None, "start_time": None, "end_time": None, "preferred_instance_id": None,
        "billing_tier": "standard", "tags": {}, "messages": None, "input": None, "extra_body": {}, "session_id": None, "tenant_id": None,
        "ttft_slo_ms": None, "tpot_slo_ms": None, "when_late": "serve", "latency_ms": None, "queue_wait_ms": None,
    },
    ExecutionInstance: {
        "host": "localhost", "port": 8000, "model_name": "", "tensor_parallel_size": 1, "pipeline_parallel_size": 1,
        "data_parallel_size": 1, "expert_parallel_size": 1, "gpu_count": 1, "instance_type": "general", "health_status": "healthy",
        "gpu_memory_gb": 0.0, "gpu_utilization": None, "is_available": True, "is_healthy": True, "current_load": 0.0,
        "avg_latency_ms": 0.0, "throughput_tokens_per_sec": 0.0, "active_requests": 0, "max_concurrent_requests": None,
        "kv_connector": None, "prefilling_config": None, "decoding_config": None, "prefilling_active_requests": 0,
        "decoding_active_requests": 0, "metadata": {}, "url": None, "api_key": None, "price_per_gpu_hour_usd": 0.0, "zone": None,
        "machine_id": None, "served_models": [], "supported_request_types": None, "available_capacity": 1.0, "can_accept_request": True,
    },
    PDSeparationConfig: {
        "enabled": True, "routing_policy": "adaptive", "prefilling_threshold_input_tokens": 800, "prefilling_threshold_ratio": 4.0,
        "prefilling_min_instances": 1, "prefilling_max_instances": 5, "decoding_min_instances": 2, "decoding_max_instances": 8,
        "enable_dynamic_scaling": False, "enable_kv_cache_transfer": True, "max_transfer_latency_ms": 100.0,
    },
    PrefillingConfig: {
        "target_batch_size": 64, "target_throughput_tokens_per_sec": None, "tensor_parallel_size": 4, "pipeline_parallel_size": 1,
        "enable_chunked_prefill": True, "max_chunk_size_tokens": 4096,
    },
    DecodingConfig: {
        "target_latency_ms": 50.0, "target_tokens_per_sec_per_gpu": None, "tensor_parallel_size": 1, "pipeline_parallel_size": 1,
        "enable_prefix_caching": True, "max_parallel_requests": 200, "kv_cache_memory_fraction": 0.85,
    },
    ParallelismConfig: {
        "tensor_parallel_size": 1, "pipeline_parallel_size": 1, "data_parallel_size": 1, "expert_parallel_size": 1, "total_gpus": 1,
        "total_parallel_size": 1, "reason": "",
    },
    PerformanceMetrics: {
        "timestamp": None, "total_requests": 0, "completed_requests": 0, "failed_requests": 0, "active_requests": 0, "queued_requests": 0,
        "avg_latency_ms": 0.0, "p50_latency_ms": 0.0, "p95_latency_ms": 0.0, "p99_latency_ms": 0.0, "tokens_per_second": 0.0,
        "requests_per_second": 0.0, "slo_violations": 0, "slo_compliance_rate": 1.0, "gpu_utilization": None, "avg_gpu_utilization": 0.0,
        "total_gpu_memory_gb": 0.0, "used_gpu_memory_gb": 0.0, "total_cost": 0.0, "cost_per_token": 0.0,
    },
    PDMetrics: {"total_prefilling_requests": 0, "total_decoding_requests": 0, "active_prefilling_requests": 0},
}  # fmt: skip


@pytest.mark.parametrize("kind", FIELDS, ids=lambda kind: kind.__name__)
def test_fields_and_their_defaults(kind: type) -> None:
    made = kind()
    assert {name: getattr(made, name) for name in FIELDS[kind]} == FIELDS[kind]
    for name, default in FIELDS[kind].items():
        assert isinstance(getattr(made, name), type(default)), name
    # every listed field that is not derived can be given to the constructor
    derived = {name for name in FIELDS[kind] if isinstance(inspect.getattr_static(kind, name, None), property)} - {"is_healthy"}
    given = {name: value for name, value in FIELDS[kind].items() if name not in derived}
    assert set(given) <= set(inspect.signature(kind).parameters)


def test_no_two_records_share_a_container() -> None:
    for kind in (RequestMetadata, ExecutionInstance):
        one, other = kind(), kind()
        for field in dataclasses.fields(kind):
            if isinstance(value := getattr(one, field.name), dict | list | set):
                assert value is not getattr(other, field.name), field.name


def test_positions_are_those_of_the_seed() -> None:
    request = RequestMetadata("r", "u", RequestPriority.LOW, 5.0, 7, "text", "m", 0.5, ParallelismType.HYBRID)
    assert (request.user_id, request.priority, request.slo_deadline_ms, request.max_tokens) == ("u", 3, 5.0, 7)
    assert (request.prompt, request.model_name, request.cost_budget, request.parallelism_hint) == ("text", "m", 0.5, "hybrid")
    instance = ExecutionInstance("i", "h", 1, "m", 2, 3, 4, 5, 6, "decoding", "draining")
    assert (instance.tensor_parallel_size, instance.pipeline_parallel_size, instance.data_parallel_size) == (2, 3, 4)
    assert (instance.expert_parallel_size, instance.gpu_count, instance.instance_type) == (5, 6, ExecutionInstanceType.DECODING)
    assert instance.health_status == "draining"
    decision = SchedulingDecision("i", "r", 1.5, 20.0, ParallelismConfig())
    assert (decision.instance_id, decision.request_id, decision.priority, decision.estimated_latency_ms) == ("i", "r", 1.5, 20.0)
    assert decision.parallelism_config == ParallelismConfig()


def test_a_decision_has_the_earlier_names_too_and_does_not_change() -> None:
    decision = SchedulingDecision(instance_id="i", request_id="r")
    assert decision.target_instance_id == "i"
    assert (decision.estimated_cost, decision.reason, decision.confidence) == (0.0, "", 1.0)
    assert dataclasses.replace(decision, reason="because").reason == "because"
    with pytest.raises(dataclasses.FrozenInstanceError):
        decision.reason = "another"  # type: ignore[misc]


def test_what_a_status_tells() -> None:
    names = [field.name for field in dataclasses.fields(RequestStatusInfo)]
    assert names == ["request_id", "state", "output", "response", "error", "usage", "timings", "decision"]
    info = RequestStatusInfo("r", RequestStatus.COMPLETED)
    assert info == RequestStatus.COMPLETED
    assert info == "completed"
    assert info != RequestStatus.FAILED
    assert info.state in ["completed", "failed"]
    assert {info: 1}[info] == 1


MEMBERS = {
    RequestStatus: ["pending", "queued", "scheduled", "running", "completed", "failed", "cancelled"],
    ExecutionInstanceType: ["general", "prefilling", "decoding", "hybrid", "embedding", "llm_embedding"],
    RequestPriority: [0, 1, 2, 3, 4],
    ParallelismType: ["tp", "pp", "dp", "ep", "hybrid"],
}


@pytest.mark.parametrize("kind", MEMBERS, ids=lambda kind: kind.__name__)
def test_members_of_enums(kind: Any) -> None:
    assert list(kind) == MEMBERS[kind]


def test_names_of_members() -> None:
    assert [priority.name for priority in RequestPriority] == ["CRITICAL", "HIGH", "NORMAL", "LOW", "BACKGROUND"]
    assert [kind.name for kind in ExecutionInstanceType][:4] == ["GENERAL", "PREFILLING", "DECODING", "HYBRID"]
    assert [kind.name.removesuffix("_PARALLEL") for kind in ParallelismType] == ["TENSOR", "PIPELINE", "DATA", "EXPERT", "HYBRID"]


ERRORS = {
    "InvalidRequest": ("invalid_request", 400, ValueError),
    "ModelDoesNotFit": ("model_does_not_fit", 400, InvalidRequest),
    "ModelNotFound": ("model_not_found", 404, RuntimeError),
    "RequestNotFound": ("request_not_found", 404, LookupError),
    "InstanceNotFound": ("instance_not_found", 404, LookupError),
    "ResponseNotFound": ("response_not_found", 404, LookupError),
    "Unauthorized": ("unauthorized", 401, RuntimeError),
    "Forbidden": ("forbidden", 403, RuntimeError),
    "BudgetExhausted": ("budget_exhausted", 402, RuntimeError),
    "PayloadTooLarge": ("payload_too_large", 413, RuntimeError),
    "RateLimited": ("rate_limited", 429, RuntimeError),
    "QueueFull": ("queue_full", 429, RuntimeError),
    "BodyMemoryFull": ("body_memory_full", 503, RuntimeError),
    "NoInstanceAvailable": ("no_instance_available", 503, RuntimeError),
    "DeadlineUnreachable": ("deadline_unreachable", 503, RuntimeError),
    "Draining": ("draining", 503, RuntimeError),
    "InstanceFailed": ("instance_failed", 502, RuntimeError),
    "EngineError": ("instance_failed", 502, errors.InstanceFailed),
    "OutOfDescriptors": ("no_descriptors", 503, errors.InstanceFailed),
    "RequestTimeout": ("timeout", 504, RuntimeError),
    "RequestCancelled": ("cancelled", 499, RuntimeError),
    "ConfigurationError": ("configuration_error", 500, ValueError),
}


def test_errors_have_stable_codes_statuses_and_bases() -> None:
    found = {name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, ControlPlaneError)}
    assert set(found) == {*ERRORS, "ControlPlaneError"}
    assert issubclass(ControlPlaneError, RuntimeError)
    for name, (code, status, base) in ERRORS.items():
        assert (found[name].code, found[name].http_status) == (code, status), name
        assert issubclass(found[name], base), name
        assert issubclass(found[name], ControlPlaneError), name
    refusal = errors.QueueFull("the queue is full", retry_after_s=3.0)
    assert (str(refusal), refusal.code, refusal.retry_after_s) == ("the queue is full", "queue_full", 3.0)


SIGNATURES: dict[Any, str] = {
    ControlPlaneManager.submit_request: "(self, request)",
    ControlPlaneManager.get_request_status: "(self, request_id)",
    ControlPlaneManager.cancel_request: "(self, request_id)",
    ControlPlaneManager.result: "(self, request_id)",
    ControlPlaneManager.start: "(self)",
    ControlPlaneManager.get_metrics: "(self)",
    ControlPlaneManager.get_status: "(self)",
    ControlPlaneManager.get_instances: "(self)",
    ControlPlaneManager.get_instance_metrics: "(self, instance_id)",
    ControlPlaneManager.register_instance: "(self, instance)",
    ControlPlaneManager.unregister_instance: "(self, instance_id)",
    ControlPlaneManager.get_pd_metrics: "(self)",
    ExecutionCoordinator.register_instance: "(self, instance)",
    ExecutionCoordinator.unregister_instance: "(self, instance_id)",
    ExecutionCoordinator.execute_request: "(self, request, instance, decision)",
    ExecutionCoordinator.get_instance: "(self, instance_id)",
    ExecutionCoordinator.get_instance_info: "(self, instance)",
    ExecutionCoordinator.get_all_instances: "(self)",
    ExecutionCoordinator.get_available_instances: "(self)",
    ExecutionCoordinator.get_healthy_instances: "(self)",
    ExecutionCoordinator.get_metrics: "(self)",
    ExecutionCoordinator.initialize: "(self)",
    ExecutionCoordinator.cleanup: "(self)",
    RequestRouter.select_instance: "(self, request, available_instances, phase)",
    LoadBalancer.get_least_loaded_instance: "(self, instances)",
    LoadBalancer.weighted_round_robin: "(self, instances)",
    LoadBalancer.least_connections: "(self, instances)",
    LoadBalancer.least_response_time: "(self, instances)",
    LoadBalancer.power_of_two: "(self, instances)",
    SchedulingPolicy.schedule: "(self, request, instances)",
    SchedulingPolicy.get_next_request: "(self, pending_queue, available_instances)",
    PDRoutingStrategy.determine_request_phase: "(self, request)",
    PDRoutingStrategy.get_instance_specialization: "(self, instance)",
    PDRoutingStrategy.specialization_scores: "(self, instance)",
    ParallelismStrategy.optimize: "(self, request, instance, available_gpus)",
    ParallelismOptimizer.select_strategy: "(self, request, instance, available_gpus)",
    ParallelismOptimizer.compare_strategies: "(self, request, instance, available_gpus)",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__qualname__)
def test_calls_take_what_the_seed_gives(function: Any) -> None:
    assert f"({', '.join(inspect.signature(function).parameters)})" == SIGNATURES[function]


def test_coroutines_are_those_of_the_seed() -> None:
    awaited = (
        ControlPlaneManager.submit_request, ControlPlaneManager.start, ControlPlaneManager.stop, ControlPlaneManager.get_request_status,
        ControlPlaneManager.result, ControlPlaneManager.cancel_request, ExecutionCoordinator.execute_request,
        ExecutionCoordinator.health_check, ExecutionCoordinator.initialize, ExecutionCoordinator.cleanup, RequestRouter.select_instance,
        SchedulingPolicy.schedule,
    )  # fmt: skip
    assert all(inspect.iscoroutinefunction(function) for function in awaited)
    plain = (ControlPlaneManager.get_metrics, ControlPlaneManager.register_instance, PDRoutingStrategy.determine_request_phase)
    assert not any(inspect.iscoroutinefunction(function) for function in plain)


def test_the_managers_arguments_begin_as_in_the_seed_and_keep_its_defaults() -> None:
    parameters = inspect.signature(ControlPlaneManager).parameters
    begin = {name: parameters[name].default for name in list(parameters)[:5]}
    assert begin == {
        "scheduling_policy": "adaptive",
        "routing_strategy": "load_balanced",
        "enable_pd_separation": True,
        "enable_monitoring": True,
        "enable_auto_scaling": False,
    }
    defaults = {name: parameters[name].default for name in ("queue_timeout_s", "no_instance_timeout_s", "metrics_window_s", "pd_config")}
    assert defaults == {"queue_timeout_s": 600.0, "no_instance_timeout_s": 30.0, "metrics_window_s": 60.0, "pd_config": None}


def test_classes_stand_alone_without_a_loop() -> None:
    made = [
        ExecutionCoordinator(), RequestRouter(), RequestRouter("affinity"), PDRoutingStrategy(), PDRoutingStrategy(None), LoadBalancer(),
        FIFOPolicy(), PriorityPolicy(), SLOAwarePolicy(), CostOptimizedPolicy(), AdaptivePolicy(), ParallelismOptimizer(),
        ControlPlaneManager(),
    ]  # fmt: skip
    assert made[1].strategy == "load_balanced"  # type: ignore[attr-defined]
    assert made[2].strategy == "affinity"  # type: ignore[attr-defined]
    assert isinstance(made[3].config, PDSeparationConfig)  # type: ignore[attr-defined]
    assert all(isinstance(policy, SchedulingPolicy) for policy in made[6:11])


@pytest.mark.parametrize("name", ["fifo", "priority", "slo_aware", "cost_optimized", "adaptive"])
def test_policies_by_name(name: str) -> None:
    assert ControlPlaneManager(scheduling_policy=name).scheduling_policy.name == name


@pytest.mark.parametrize("name", ["load_balanced", "round_robin", "random", "power_of_two", "least_response_time", "affinity", "locality"])
def test_routers_by_name(name: str) -> None:
    manager = ControlPlaneManager(routing_strategy=name)
    assert manager.router.strategy == manager.get_status()["routing_strategy"] == name


def test_what_the_manager_shows_from_the_start() -> None:
    manager = ControlPlaneManager()
    assert isinstance(manager.executor, ExecutionCoordinator)
    assert isinstance(manager.router, RequestRouter)
    assert isinstance(manager.scheduling_policy, SchedulingPolicy)
    assert isinstance(manager.pd_router, PDRoutingStrategy)
    assert manager.pd_config is manager.pd_router.config
    assert isinstance(manager.load_balancer, LoadBalancer)
    assert isinstance(manager.parallelism_optimizer, ParallelismOptimizer)
    assert len(manager.pending_queue) == 0
    assert list(manager.pending_queue) == []
    assert dict(manager.running_requests) == {}
    assert manager.get_instances() == []


def test_the_package_can_be_star_imported() -> None:
    space: dict[str, object] = {}
    exec("from control_plane import *", space)
    assert set(EXPORTED) <= set(space)
