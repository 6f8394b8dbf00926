"""Least observed response time, scaled by what is in flight."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from control_plane.protocols import FleetView
from control_plane.router.base import RoutingStrategy
from control_plane.router.placement import Placement, least, recorded, sample_note, sampled
from control_plane.types import ExecutionInstance, RequestMetadata


class LeastResponseTime(RoutingStrategy):
    """argmin of ``avg_latency_ms`` x (requests in flight + 1). An instance without an average yet counts with its predicted service."""

    name = "least_response_time"

    def __init__(self, rng: Random | None = None) -> None:
        self._rng = rng if rng is not None else Random(0)
        self._turn = 0

    def place(self, request: RequestMetadata, candidates: Sequence[ExecutionInstance], view: FleetView) -> Placement:
        seen = sampled(request, candidates, view, self._rng)
        service_ms = view.predictor.service_ms
        scores_ms = [(i.avg_latency_ms or service_ms(request, i)) * (i.active_requests + 1) for i in seen]
        chosen = least(scores_ms, 0.0, self._turn)
        self._turn += 1
        instance = seen[chosen]
        note = sample_note(len(seen), len(candidates))
        reason = f"least response time x in flight, {scores_ms[chosen]:.0f} ms with {instance.active_requests} there, of {len(seen)}{note}"
        return Placement(instance, scores_ms[chosen], recorded(seen, scores_ms, chosen), reason)
