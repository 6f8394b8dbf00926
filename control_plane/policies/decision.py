"""From a router's placement to the full decision that is kept, shown and replayed."""

from __future__ import annotations

from functools import lru_cache

from control_plane.protocols import FleetView
from control_plane.router.base import Placement
from control_plane.types import (
    ExecutionInstance,
    ExecutionInstanceType,
    ParallelismConfig,
    ParallelismType,
    Plan,
    RequestMetadata,
    SchedulingDecision,
)


def make_decision(
    request: RequestMetadata,
    placement: Placement,
    view: FleetView,
    *,
    key: float = 0.0,
    policy: str = "",
    router: str = "",
    plan: Plan | None = None,
    phase: ExecutionInstanceType | None = None,
) -> SchedulingDecision:
    """``estimated_latency_ms`` is the wait for the first token's turn there plus the service; ``estimated_cost`` US dollars."""
    instance = placement.instance
    predictor = view.predictor
    where = f"{phase} on {instance.instance_id}" if phase is not None else instance.instance_id
    return SchedulingDecision(
        instance.instance_id,
        request.request_id,
        key,
        predictor.wait_ms(instance) + predictor.service_ms(request, instance),
        parallelism_of(instance),
        predictor.cost_usd(request, instance),
        f"{policy} order, {where}: {placement.reason}",
        confidence_of(placement),
        plan,
        placement.candidates,
        policy,
        router,
    )


def confidence_of(placement: Placement) -> float:
    """How clear the choice was, in [0, 1]: 1.0 without an alternative, 0.5 when the best other was predicted equal, towards 1.0 the
    worse it was, towards 0.0 the better it was (a router that does not go by milliseconds)."""
    chosen_id, own_ms = placement.instance.instance_id, placement.predicted_ms
    for instance_id, other_ms in placement.candidates:
        if instance_id != chosen_id:
            total_ms = own_ms + other_ms
            return other_ms / total_ms if total_ms > 0.0 else 0.5
    return 1.0


def parallelism_of(instance: ExecutionInstance) -> ParallelismConfig:
    """The layout that the instance runs, shared between decisions about it."""
    return _layout(
        instance.tensor_parallel_size,
        instance.pipeline_parallel_size,
        instance.data_parallel_size,
        instance.expert_parallel_size,
        instance.world_size,
    )


@lru_cache(maxsize=256)
def _layout(tp: int, pp: int, dp: int, ep: int, gpus: int) -> ParallelismConfig:
    used = [kind for kind, size in zip(ParallelismType, (tp, pp, dp, ep), strict=False) if size > 1]
    kind = used[0] if len(used) == 1 else ParallelismType.HYBRID if used else ParallelismType.TENSOR_PARALLEL
    return ParallelismConfig(kind, tp, pp, dp, ep, gpus, reason="the layout that the instance runs")
