"""From a router's placement to the full decision that is kept, shown and replayed."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from control_plane.protocols import FleetView
from control_plane.router.base import Placement
from control_plane.types import (
    ExecutionInstance,
    ExecutionInstanceType,
    Leg,
    ParallelismConfig,
    ParallelismType,
    Plan,
    RequestMetadata,
    SchedulingDecision,
)


class PlacedDecision(SchedulingDecision):
    """What dispatch decided. The parts that only people read (candidates, reason, confidence, layout) are written out when they are
    looked at, from the figures that the decision went by."""

    def __getattr__(self, name: str) -> Any:
        placement: Placement | None = self.__dict__.get("_placement")
        if placement is None or name not in _WRITTEN_OUT:
            raise AttributeError(f"{type(self).__name__!r} has no attribute {name!r}")
        self.__dict__[name] = value = _WRITTEN_OUT[name](self, placement)
        return value


def _reason(decision: SchedulingDecision, placement: Placement) -> str:
    role = decision.plan.answering.role
    name = placement.instance.instance_id
    where = name if role is ExecutionInstanceType.GENERAL else f"{role} on {name}"
    return f"{decision.policy} order, {where}: {placement.reason}"


_WRITTEN_OUT: dict[str, Callable[[SchedulingDecision, Placement], Any]] = {
    "candidates": lambda _, placement: placement.candidates,
    "reason": _reason,
    "confidence": lambda _, placement: confidence_of(placement),
    "parallelism_config": lambda _, placement: parallelism_of(placement.instance),
}


def make_decision(
    request: RequestMetadata,
    placement: Placement,
    view: FleetView,
    *,
    key: float = 0.0,
    policy: str = "",
    router: str = "",
    role: ExecutionInstanceType = ExecutionInstanceType.GENERAL,
) -> SchedulingDecision:
    """``estimated_latency_ms`` is the wait for the first token's turn there plus the service; ``estimated_cost`` US dollars."""
    instance = placement.instance
    predictor = view.predictor
    service_ms = placement.service_ms
    if service_ms is None:
        service_ms = predictor.service_ms(request, instance)
    decision: PlacedDecision = object.__new__(PlacedDecision)
    # one update of the instance dict: a frozen dataclass's own __init__ costs many times as much, and this is the hot path
    decision.__dict__.update(
        instance_id=instance.instance_id,
        request_id=request.request_id,
        priority=key,
        estimated_latency_ms=predictor.wait_ms(instance) + service_ms,
        service_ms=service_ms,
        estimated_cost=predictor.cost_usd(request, instance) if instance.price_per_gpu_hour_usd else 0.0,
        plan=one_leg(instance.instance_id, role),
        policy=policy,
        router=router,
        _placement=placement,
    )
    return decision


@lru_cache(maxsize=4096)
def one_leg(instance_id: str, role: ExecutionInstanceType) -> Plan:
    """The plan in which one instance does all."""
    return Plan((Leg(instance_id, role),))


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
