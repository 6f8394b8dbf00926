"""The most requests served per dollar: short work first, on the cheapest instance that is fast enough."""

from __future__ import annotations

from control_plane.admission import lateness_ms
from control_plane.errors import InvalidRequest
from control_plane.policies.base import SchedulingPolicy
from control_plane.protocols import FleetView
from control_plane.types import ExecutionInstance, RequestMetadata

AGEING = 4.0
MAX_OFFSET_S = 300.0
#: instances within this factor of the cheapest count as equally cheap
PRICE_TOLERANCE = 1.05
#: a class's worth relative to NORMAL: what is worth more is cheaper for what it brings
CLASS_WORTH = (4.0, 2.0, 1.0, 0.5, 0.25)


class CostOptimizedPolicy(SchedulingPolicy):
    """key = arrival + ageing x predicted service / worth of its class: shortest first, as service is what an instance's hour is spent
    on, at most ``max_offset_s`` behind its arrival and never behind its latest start, so nothing starves.

    It keeps, of the candidates predicted to meet the deadline (all, when none is), those within 5 % of the least price x service.
    """

    name: str = "cost_optimized"

    def __init__(self, ageing: float = AGEING, max_offset_s: float = MAX_OFFSET_S) -> None:
        for name, value in (("ageing", ageing), ("max_offset_s", max_offset_s)):
            if not 0.0 <= value < float("inf"):
                raise InvalidRequest(f"{name} {value!r} must be a finite number, 0 or more", param=name)
        self.ageing = ageing
        self.max_offset_s = max_offset_s

    def key(self, request: RequestMetadata, arrival_s: float, view: FleetView) -> float:
        service_s = self.guide.service_ms(request, view) / 1000.0
        offset_s = min(self.max_offset_s, self.ageing * service_s / CLASS_WORTH[request.priority])
        if request.slo_deadline_ms is not None:
            offset_s = min(offset_s, max(0.0, request.slo_deadline_ms / 1000.0 - service_s))
        if request.ttft_slo_ms is not None:
            offset_s = min(offset_s, max(0.0, (request.ttft_slo_ms - self.guide.prefill_ms(request, view)) / 1000.0))
        return arrival_s + offset_s

    def narrow(
        self, request: RequestMetadata, candidates: list[ExecutionInstance], view: FleetView, arrival_s: float | None = None
    ) -> list[ExecutionInstance]:
        if len(candidates) < 2 or not any(i.price_per_gpu_hour_usd for i in candidates):
            return candidates
        timely = candidates
        if request.slo_deadline_ms is not None or request.ttft_slo_ms is not None:
            elapsed_ms = 0.0 if arrival_s is None else 1000.0 * max(0.0, view.now_s - arrival_s)
            timely = [i for i in candidates if lateness_ms(request, i, view, elapsed_ms) <= 0.0]
        if not timely:
            return candidates
        service_ms = view.predictor.service_ms
        costs = [i.price_per_hour_usd * service_ms(request, i) for i in timely]
        bound = min(costs) * PRICE_TOLERANCE
        return [i for i, cost in zip(timely, costs, strict=True) if cost <= bound]
