"""LMetric (arXiv 2603.15202): two indicators multiplied, so that there is no weight to tune."""

from __future__ import annotations

from collections.abc import Sequence

from control_plane.protocols import FleetView
from control_plane.router.base import RoutingStrategy
from control_plane.router.placement import Placement, record_around
from control_plane.types import ExecutionInstance, RequestMetadata


class LMetric(RoutingStrategy):
    """argmin of (tokens to prefill there if the request is placed there) x (batch there + 1).

    Tokens to prefill are those queued there and the request's own uncached ones, batch is all in flight. Ties go to the smaller batch.
    """

    name = "rival:lmetric"

    def place(self, request: RequestMetadata, candidates: Sequence[ExecutionInstance], view: FleetView) -> Placement:
        inputs = view.predictor.input_tokens(request)
        cached = view.prefixes.cached_tokens_of(request, candidates)
        best: tuple[float, int, int] | None = None
        for at, instance in enumerate(candidates):
            tokens = view.predictor.queued(instance).prompt_tokens + max(1, inputs - cached[at])
            score = float(tokens * (instance.active_requests + 1))
            if best is None or (score, instance.active_requests) < best[:2]:
                best = score, instance.active_requests, at
        assert best is not None
        reason = f"{best[0]:.0f} = tokens to prefill x batch there, the least"
        return record_around(request, candidates[best[2]], candidates, view, reason)
