"""Least outstanding predicted work, weighted by what the instance can do."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from control_plane.protocols import FleetView
from control_plane.router.base import RoutingStrategy
from control_plane.router.placement import SAMPLE_ABOVE, Placement, ScoredPlacement, least, sampled, work_ms
from control_plane.types import ExecutionInstance, RequestMetadata

#: candidates that differ by less than this share of the request's own service count as equal and take turns
TIE_SHARE = 0.05


class LoadBalanced(RoutingStrategy):
    """argmin of (predicted ms in flight there + this request's own service there): a slow instance's milliseconds are longer, so each
    gets work in proportion to its speed. Blind to prefixes."""

    name = "load_balanced"

    def __init__(self, rng: Random | None = None) -> None:
        self._rng = rng if rng is not None else Random(0)
        self._turn = 0

    def place(self, request: RequestMetadata, candidates: Sequence[ExecutionInstance], view: FleetView) -> Placement:
        seen = candidates if len(candidates) <= SAMPLE_ABOVE else sampled(request, candidates, view, self._rng)
        scores_ms, services_ms = work_ms(request, seen, view)
        chosen = least(scores_ms, TIE_SHARE * min(services_ms), self._turn)
        self._turn += 1
        return ScoredPlacement(seen, scores_ms, chosen, len(candidates), "least outstanding predicted work", services_ms[chosen])
