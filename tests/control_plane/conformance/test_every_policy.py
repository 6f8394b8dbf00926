"""What every scheduling policy of the table keeps: a new one is tested the day it is listed."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from control_plane.errors import NoInstanceAvailable
from control_plane.job import Job, LaneKey
from control_plane.policies import POLICIES, SchedulingPolicy, create_policy
from control_plane.protocols import WireRequest
from control_plane.queue import RequestQueue
from control_plane.queue_order import QueueState, set_key
from control_plane.types import ExecutionInstance, RequestKind, RequestMetadata, RequestPriority
from control_plane.view import StaticView

pytestmark = pytest.mark.parametrize("name", list(POLICIES))

FLEET = [
    ExecutionInstance("a", model_name="m", price_per_gpu_hour_usd=1.0),
    ExecutionInstance("b", model_name="m", tensor_parallel_size=4, price_per_gpu_hour_usd=2.0, active_requests=3),
]
TARGET = st.one_of(st.none(), st.floats(0.001, 1e7))
REQUESTS = st.builds(
    RequestMetadata,
    request_id=st.just("r"),
    model_name=st.sampled_from([None, "m", "unknown"]),
    prompt=st.text(max_size=20),
    priority=st.sampled_from(RequestPriority),
    slo_deadline_ms=TARGET,
    ttft_slo_ms=TARGET,
    input_tokens=st.one_of(st.none(), st.integers(0, 100_000)),
    max_tokens=st.one_of(st.none(), st.integers(0, 100_000)),
)
#: no request may be passed by ones that arrive later than this, whatever they are: the queue's own time limit
STARVATION_BOUND_S = 600.0


def test_it_is_listed_under_its_name(name: str) -> None:
    policy = create_policy(name)

    assert isinstance(policy, SchedulingPolicy)
    assert policy.name == name
    assert not policy.places_itself


@settings(max_examples=60, deadline=None)
@given(request_=REQUESTS, arrival_s=st.floats(0, 1e6))
def test_keys_and_slack_are_numbers(name: str, request_: RequestMetadata, arrival_s: float) -> None:
    policy, view = create_policy(name), StaticView(FLEET, now_s=arrival_s)
    key = policy.key(request_, arrival_s, view)
    job = Job(request_, LaneKey("m", RequestKind.COMPLETION), WireRequest("/", b""), None, arrival_s)
    set_key(job, policy, view)

    assert math.isfinite(key)
    assert job.key == key, "the key does not change by being asked for"
    assert (job.latest_start_s == math.inf) == (request_.slo_deadline_ms is None and request_.ttft_slo_ms is None)
    assert not math.isnan(policy.slack_s(job, arrival_s + 1.0, 2.0))


@settings(max_examples=60, deadline=None)
@given(request_=REQUESTS, other=REQUESTS)
def test_nothing_without_a_target_starves(name: str, request_: RequestMetadata, other: RequestMetadata) -> None:
    """A request that has waited long enough is passed by no newcomer that is not already late itself."""
    policy, view = create_policy(name), StaticView(FLEET)
    request_.slo_deadline_ms = request_.ttft_slo_ms = None
    other.slo_deadline_ms = other.ttft_slo_ms = None

    assert policy.key(request_, 0.0, view) < policy.key(other, STARVATION_BOUND_S, view) + 1e-9


@settings(max_examples=30, deadline=None)
@given(request_=REQUESTS, first_s=st.floats(0, 1e5), later_s=st.floats(0.001, 1e4))
def test_of_two_alike_the_earlier_goes_first(name: str, request_: RequestMetadata, first_s: float, later_s: float) -> None:
    policy, view = create_policy(name), StaticView(FLEET)

    assert policy.key(request_, first_s, view) < policy.key(request_, first_s + later_s, view)


@settings(max_examples=40, deadline=None)
@given(request_=REQUESTS)
def test_narrowing_leaves_some_of_the_candidates(name: str, request_: RequestMetadata) -> None:
    kept = create_policy(name).narrow(request_, list(FLEET), StaticView(FLEET))

    assert kept
    assert set(kept) <= set(FLEET)


def test_an_empty_fleet_is_no_obstacle_to_queueing(name: str) -> None:
    policy, view = create_policy(name), StaticView([])
    request = RequestMetadata(prompt="x", slo_deadline_ms=1000.0, ttft_slo_ms=100.0)

    assert math.isfinite(policy.key(request, 5.0, view))
    assert policy.latest_start_s(request, 5.0, view) == pytest.approx(5.1)


@settings(max_examples=25, deadline=None)
@given(requests=st.lists(REQUESTS, min_size=1, max_size=12), switch=st.sampled_from(list(POLICIES)))
def test_switching_at_run_time_loses_and_reorders_nothing_wrongly(name: str, requests: list[RequestMetadata], switch: str) -> None:
    view, lane = StaticView(FLEET), LaneKey("m", RequestKind.COMPLETION)
    here, there, queue = create_policy(name), create_policy(switch), RequestQueue()
    for n, request in enumerate(requests):
        job = Job(request, lane, WireRequest("/", b""), None, float(n // 3))
        set_key(job, here, view)
        queue.push(job)
        if here.accounts:
            here.charge(job, view)
    before = queue.jobs()
    queue.rekey(there, view)
    assert sorted(map(id, queue.jobs())) == sorted(map(id, before))
    queue.rekey(here, view)

    assert queue.jobs() == before


async def test_schedule_and_get_next_request(name: str) -> None:
    policy, request = create_policy(name), RequestMetadata(request_id="r", prompt="x", model_name="m")
    decision = await policy.schedule(request, FLEET)

    assert decision.instance_id in {"a", "b"}
    assert decision.policy == name
    assert decision.request_id == "r"
    assert 0.0 < decision.estimated_latency_ms < math.inf
    assert 0.0 <= decision.confidence <= 1.0
    assert decision.priority == policy.key(request, 0.0, StaticView(FLEET))
    assert policy.get_next_request([request], FLEET) is request
    with pytest.raises(NoInstanceAvailable):
        await policy.schedule(request, [])


def test_hooks_and_review_may_be_called(name: str) -> None:
    policy = create_policy(name)
    policy.on_instance_registered(FLEET[0])
    policy.on_request_completed(RequestMetadata(), None)

    assert policy.review(QueueState(now_s=0.0)) is None
