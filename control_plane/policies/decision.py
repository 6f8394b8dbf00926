"""From a router's placement to the decision that dispatch goes by, and to the full one that is kept, shown and replayed."""

from __future__ import annotations

from functools import lru_cache
from typing import Final

from control_plane.live_state import LiveState
from control_plane.protocols import FleetView
from control_plane.router.placement import Placement
from control_plane.types import (
    Candidate,
    ExecutionInstance,
    ExecutionInstanceType,
    Leg,
    ParallelismConfig,
    ParallelismType,
    Plan,
    RequestMetadata,
    SchedulingDecision,
)

_GENERAL: Final = ExecutionInstanceType.GENERAL


class Decided:
    """What dispatch goes by. The :class:`SchedulingDecision` that people see is written out when somebody looks at it, from the figures
    that this went by."""

    __slots__ = (
        "_decision",
        "_placement",
        "estimated_cost",
        "estimated_latency_ms",
        "instance_id",
        "key",
        "leg",
        "policy",
        "router",
        "service_ms",
    )

    def __init__(
        self, instance_id: str, leg: Leg, estimated_latency_ms: float, service_ms: float | None, estimated_cost: float, key: float
    ) -> None:
        self.instance_id = instance_id
        #: the part of the plan that answers the client
        self.leg = leg
        self.estimated_latency_ms = estimated_latency_ms
        #: the request's own service there in predicted milliseconds, without waiting; None where only the sum was told
        self.service_ms = service_ms
        self.estimated_cost = estimated_cost
        self.key = key
        self.policy = ""
        self.router = ""
        self._placement: Placement | None = None
        self._decision: SchedulingDecision | None = None

    def written_out(self, request_id: str) -> SchedulingDecision:
        if self._decision is not None:
            return self._decision
        placement, leg = self._placement, self.leg
        assert placement is not None
        candidates = placement.candidates
        where = leg.instance_id if leg.role is _GENERAL else f"{leg.role} on {leg.instance_id}"
        self._decision = SchedulingDecision(
            instance_id=self.instance_id,
            request_id=request_id,
            priority=self.key,
            estimated_latency_ms=self.estimated_latency_ms,
            parallelism_config=parallelism_of(placement.instance),
            estimated_cost=self.estimated_cost,
            reason=f"{self.policy} order, {where}: {placement.reason}",
            confidence=confidence_of(placement, candidates),
            plan=Plan((leg,)),
            candidates=candidates,
            policy=self.policy,
            router=self.router,
            service_ms=self.service_ms,
            parts=placement.parts,
        )
        return self._decision


def decide(
    request: RequestMetadata,
    placement: Placement,
    view: FleetView,
    *,
    key: float = 0.0,
    policy: str = "",
    router: str = "",
    role: ExecutionInstanceType = _GENERAL,
) -> Decided:
    """``estimated_latency_ms`` is the wait for the first token's turn there plus the service; ``estimated_cost`` US dollars."""
    instance = placement.instance
    live: LiveState = instance
    predictor = view.predictor
    service_ms = placement.service_ms
    if service_ms is None:
        service_ms = predictor.service_ms(request, instance)
    instance_id: str = live.instance_id
    wait_ms = predictor.wait_ms(instance)
    cost_usd = predictor.cost_usd(request, instance) if live.price_per_gpu_hour_usd else 0.0
    decided = Decided(instance_id, leg_of(instance_id, role), wait_ms + service_ms, service_ms, cost_usd, key)
    decided.policy = policy
    decided.router = router
    decided._placement = placement
    return decided


def as_decided(decision: SchedulingDecision) -> Decided:
    """A decision that a policy or router of the user's own made."""
    decided = Decided(
        decision.instance_id,
        decision.plan.answering,
        decision.estimated_latency_ms,
        decision.service_ms,
        decision.estimated_cost,
        decision.priority,
    )
    decided._decision = decision
    return decided


@lru_cache(maxsize=4096)
def leg_of(instance_id: str, role: ExecutionInstanceType) -> Leg:
    """The leg of a plan in which one instance does all."""
    return Leg(instance_id, role)


def confidence_of(placement: Placement, candidates: tuple[Candidate, ...]) -> float:
    """How clear the choice was, in [0, 1]: 1.0 without an alternative, 0.5 when the best other was predicted equal, towards 1.0 the
    worse it was, towards 0.0 the better it was (a router that does not go by milliseconds)."""
    chosen_id, own_ms = placement.instance.instance_id, placement.predicted_ms
    for instance_id, other_ms in candidates:
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
