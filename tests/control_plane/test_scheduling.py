"""The scheduling policies, by the seed's calls: which of the waiting is next, and where it would go."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest

from control_plane import (
    AdaptivePolicy,
    CostOptimizedPolicy,
    ExecutionInstance,
    FIFOPolicy,
    PriorityPolicy,
    RequestMetadata,
    RequestPriority,
    SchedulingPolicy,
    SLOAwarePolicy,
)

START = datetime(2026, 1, 1, tzinfo=UTC)


def request(name: str, *, at_s: float = 0.0, **fields: object) -> RequestMetadata:
    return RequestMetadata(request_id=name, prompt="hello", arrival_time=START + timedelta(seconds=at_s), **fields)  # type: ignore[arg-type]


def order(policy: SchedulingPolicy, waiting: list[RequestMetadata], instances: list[ExecutionInstance]) -> list[str]:
    """The ids in the order in which the policy takes them."""
    left, taken = list(waiting), []
    while (found := policy.get_next_request(left, instances)) is not None:
        left.remove(found)
        taken.append(found.request_id)
    return taken


@pytest.fixture
def instances() -> list[ExecutionInstance]:
    return [
        ExecutionInstance(instance_id="cheap", model_name="m", price_per_gpu_hour_usd=1.0),
        ExecutionInstance(instance_id="dear", model_name="m", price_per_gpu_hour_usd=9.0),
    ]


async def test_fifo_takes_them_as_they_came(instances: list[ExecutionInstance]) -> None:
    waiting = [request("second", at_s=1, priority=RequestPriority.CRITICAL), request("first", at_s=0), request("third", at_s=2)]
    assert order(FIFOPolicy(), waiting, instances) == ["first", "second", "third"]
    decision = await FIFOPolicy().schedule(waiting[0], instances)
    assert decision.instance_id in {"cheap", "dear"}
    assert decision.request_id == "second"


async def test_priority_takes_the_urgent_first_and_lets_nobody_starve(instances: list[ExecutionInstance]) -> None:
    by_class = [request(priority.name, priority=priority) for priority in reversed(RequestPriority)]
    assert order(PriorityPolicy(), by_class, instances) == [priority.name for priority in RequestPriority]
    aged = [request("old-background", priority=RequestPriority.BACKGROUND), request("new-high", at_s=7200, priority=RequestPriority.HIGH)]
    assert order(PriorityPolicy(), aged, instances) == ["old-background", "new-high"]


async def test_slo_aware_takes_the_most_pressing_deadline_first(instances: list[ExecutionInstance]) -> None:
    waiting = [
        request("relaxed", slo_deadline_ms=600_000),
        request("late-but-tight", at_s=2, slo_deadline_ms=20_000),
        request("tight", slo_deadline_ms=20_000),
    ]
    assert order(SLOAwarePolicy(), waiting, instances) == ["tight", "late-but-tight", "relaxed"]


async def test_cost_optimized_places_on_the_cheapest_that_meets_the_deadline(instances: list[ExecutionInstance]) -> None:
    policy = CostOptimizedPolicy()
    decision = await policy.schedule(request("any"), instances)
    assert decision.instance_id == "cheap"
    assert 0 < decision.estimated_cost < 1
    instances[0].outstanding_ms = 60_000_000.0
    hurried = await policy.schedule(request("hurried", slo_deadline_ms=20_000), instances)
    assert hurried.instance_id == "dear"


async def test_adaptive_follows_what_waits_and_says_why(instances: list[ExecutionInstance]) -> None:
    from control_plane.queue_order import QueueState

    policy = AdaptivePolicy()
    reasons = []
    for now_s in range(1, 30):
        state = QueueState(now_s=float(now_s), queued=50, deadline_share=1.0, distinct_priorities=1, predicted_wait_s=5.0, utilisation=1.0)
        if (why := policy.review(state)) is not None:
            reasons.append(why)
    assert len(reasons) <= 1, "with the same state it does not go to and fro"
    waiting = [request("relaxed", slo_deadline_ms=600_000), request("tight", at_s=1, slo_deadline_ms=20_000)]
    assert order(policy, waiting, instances) == ["tight", "relaxed"]
    decision = await policy.schedule(waiting[0], instances)
    assert decision.policy == "adaptive"
    assert decision.reason
