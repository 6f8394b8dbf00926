"""Admission: every field is checked by name, eligibility is by model, kind, health and room, budgets and deadlines refuse."""

from __future__ import annotations

import math

import pytest

from control_plane.admission import admit, affordable, eligible, kind_of, lateness_ms, preferred, validate_request
from control_plane.errors import BudgetExhausted, DeadlineUnreachable, InvalidRequest, ModelNotFound, NoInstanceAvailable
from control_plane.types import ExecutionInstance, HealthStatus, ParallelismType, RequestKind, RequestMetadata, RequestPriority
from control_plane.view import StaticView

WRONG = [
    ("request_id", 7),
    ("user_id", 7),
    ("model_name", ["m"]),
    ("session_id", b"s"),
    ("tenant_id", 1.0),
    ("preferred_instance_id", 3),
    ("billing_tier", None),
    ("slo_deadline_ms", -1),
    ("slo_deadline_ms", 0),
    ("slo_deadline_ms", math.nan),
    ("slo_deadline_ms", "soon"),
    ("slo_deadline_ms", True),
    ("ttft_slo_ms", math.inf),
    ("tpot_slo_ms", -0.5),
    ("cost_budget", -0.01),
    ("cost_budget", math.nan),
    ("temperature", -1.0),
    ("top_p", 0.0),
    ("top_p", 1.5),
    ("max_tokens", -1),
    ("max_tokens", 1.5),
    ("max_tokens", True),
    ("input_tokens", -1),
    ("prompt", 5),
    ("prompt", [1, "x"]),
    ("prompt", [-1]),
    ("messages", "hello"),
    ("messages", ["hello"]),
    ("messages", [{"content": "no role"}]),
    ("input", 5),
    ("extra_body", [1]),
    ("extra_body", {1: 2}),
    ("tags", "t"),
    ("prompt_head", "text"),
    ("priority", "urgent"),
    ("priority", 17),
    ("kind", "poem"),
    ("parallelism_hint", "xx"),
    ("when_late", "maybe"),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=[f"{name}={value!r}" for name, value in WRONG])
def test_a_wrong_field_is_named_with_what_would_be_right(name: str, value: object) -> None:
    request = RequestMetadata()
    setattr(request, name, value)
    with pytest.raises(InvalidRequest, match=name) as refused:
        validate_request(request)

    assert refused.value.param == name
    assert " must be " in str(refused.value) or " is not one of " in str(refused.value)


def test_what_is_right_passes_and_names_become_members() -> None:
    request = RequestMetadata(prompt=[1, 2], slo_deadline_ms=10, ttft_slo_ms=0.5, cost_budget=0, top_p=1, temperature=0, max_tokens=0)
    request.priority = "high"  # type: ignore[assignment]
    request.kind = "chat"  # type: ignore[assignment]
    request.parallelism_hint = "tp"  # type: ignore[assignment]
    validate_request(request)
    validate_request(RequestMetadata())
    validate_request(RequestMetadata(messages=[{"role": "user", "content": "hi"}], max_tokens=None))
    validate_request(RequestMetadata(input=["a", "b"]))

    assert request.priority is RequestPriority.HIGH
    assert request.kind is RequestKind.CHAT
    assert request.parallelism_hint is ParallelismType.TENSOR_PARALLEL


def test_one_of_prompt_messages_and_input() -> None:
    with pytest.raises(InvalidRequest, match="prompt and messages"):
        validate_request(RequestMetadata(prompt="a", messages=[]))
    with pytest.raises(InvalidRequest, match="leave one"):
        validate_request(RequestMetadata(messages=[], input="b"))


def test_the_kind_is_told_by_what_is_given() -> None:
    assert kind_of(RequestMetadata(prompt="a")) is RequestKind.COMPLETION
    assert kind_of(RequestMetadata(messages=[])) is RequestKind.CHAT
    assert kind_of(RequestMetadata(input="a")) is RequestKind.EMBEDDING
    assert kind_of(RequestMetadata(prompt="a", kind=RequestKind.SCORE)) is RequestKind.SCORE


def test_eligible_by_model_kind_health_and_room() -> None:
    right = ExecutionInstance("right", model_name="m")
    full = ExecutionInstance("full", model_name="m", max_concurrent_requests=1, active_requests=1)
    sick = ExecutionInstance("sick", model_name="m", is_healthy=False)
    other = ExecutionInstance("other", model_name="n")
    embedder = ExecutionInstance("embedder", model_name="m", instance_type="embedding")
    unknown = ExecutionInstance("unknown")
    fleet = [right, full, sick, other, embedder, unknown]

    assert eligible(RequestMetadata(prompt="x", model_name="m"), fleet) == [right, unknown]
    assert eligible(RequestMetadata(prompt="x", model_name="m"), [full, sick]) == [full], "where none has room it may wait there"
    with pytest.raises(ModelNotFound, match="m, n"):
        eligible(RequestMetadata(prompt="x", model_name="z"), fleet[:-1])
    with pytest.raises(NoInstanceAvailable, match="draining, unhealthy"):
        eligible(RequestMetadata(prompt="x"), [sick, ExecutionInstance("d", health_status=HealthStatus.DRAINING)])
    with pytest.raises(NoInstanceAvailable, match="chat"):
        eligible(RequestMetadata(messages=[]), [embedder])
    with pytest.raises(NoInstanceAvailable, match="register"):
        eligible(RequestMetadata(prompt="x"), [])


def test_a_budget_leaves_dear_instances_out() -> None:
    cheap = ExecutionInstance("cheap", model_name="m", price_per_gpu_hour_usd=1.0)
    dear = ExecutionInstance("dear", model_name="m", price_per_gpu_hour_usd=100.0)
    view = StaticView([cheap, dear])
    cost = view.predictor.cost_usd(RequestMetadata(prompt="x", model_name="m"), cheap)

    assert affordable(RequestMetadata(prompt="x", model_name="m", cost_budget=2 * cost), [cheap, dear], view) == [cheap]
    assert affordable(RequestMetadata(prompt="x", model_name="m"), [cheap, dear], view) == [cheap, dear]
    with pytest.raises(BudgetExhausted, match="cost_budget") as refused:
        admit(RequestMetadata(prompt="x", model_name="m", cost_budget=0.5 * cost), [cheap, dear], view)
    assert refused.value.param == "cost_budget"
    admit(RequestMetadata(prompt="x", cost_budget=0.0), [], view)


def test_hopeless_deadlines_are_refused_only_where_asked() -> None:
    fleet = [ExecutionInstance("a", model_name="m")]
    view = StaticView(fleet)
    service_ms = view.predictor.service_ms(RequestMetadata(prompt="x", model_name="m"), fleet[0])
    late = RequestMetadata(prompt="x", model_name="m", slo_deadline_ms=service_ms / 2)
    admit(late, fleet, view)
    late.when_late = "reject"
    with pytest.raises(DeadlineUnreachable, match="even with an empty queue") as refused:
        admit(late, fleet, view)
    assert refused.value.param == "slo_deadline_ms"
    assert refused.value.retry_after_s >= 1.0

    timely = RequestMetadata(prompt="x", model_name="m", slo_deadline_ms=2 * service_ms, when_late="reject")
    admit(timely, fleet, view, queue_wait_ms=0.5 * service_ms)
    with pytest.raises(DeadlineUnreachable, match="waiting requests"):
        admit(timely, fleet, view, queue_wait_ms=10 * service_ms)
    with pytest.raises(DeadlineUnreachable) as first:
        admit(RequestMetadata(prompt="x", model_name="m", ttft_slo_ms=0.001, when_late="reject"), fleet, view)
    assert first.value.param == "ttft_slo_ms"
    admit(late, [], view)


def test_lateness_counts_waiting_and_the_stricter_target() -> None:
    where = ExecutionInstance("a", model_name="m")
    view = StaticView([where])

    assert lateness_ms(RequestMetadata(prompt="x"), where, view) == -math.inf
    both = RequestMetadata(prompt="x", slo_deadline_ms=1e9, ttft_slo_ms=1.0)
    assert lateness_ms(both, where, view, 50.0) == pytest.approx(lateness_ms(both, where, view) + 50.0)
    assert lateness_ms(both, where, view) > lateness_ms(RequestMetadata(prompt="x", slo_deadline_ms=1e9), where, view)


def test_preferences_choose_among_those_that_meet_the_deadline() -> None:
    plain, wide = ExecutionInstance("plain", model_name="m"), ExecutionInstance("wide", model_name="m", tensor_parallel_size=4)
    mixed = ExecutionInstance("mixed", model_name="m", tensor_parallel_size=2, pipeline_parallel_size=2)
    fleet = [plain, wide, mixed]
    view = StaticView(fleet)

    assert preferred(RequestMetadata(prompt="x"), fleet, view) == fleet
    assert preferred(RequestMetadata(prompt="x", preferred_instance_id="wide"), fleet, view) == [wide]
    assert preferred(RequestMetadata(prompt="x", preferred_instance_id="gone"), fleet, view) == fleet
    assert preferred(RequestMetadata(prompt="x", parallelism_hint=ParallelismType.TENSOR_PARALLEL), fleet, view) == [wide, mixed]
    assert preferred(RequestMetadata(prompt="x", parallelism_hint=ParallelismType.HYBRID), fleet, view) == [mixed]
    assert preferred(RequestMetadata(prompt="x", parallelism_hint=ParallelismType.EXPERT_PARALLEL), fleet, view) == fleet
    assert preferred(RequestMetadata(prompt="x", preferred_instance_id="wide", slo_deadline_ms=0.01), fleet, view) == fleet
