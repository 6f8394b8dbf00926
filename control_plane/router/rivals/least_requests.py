"""The baseline of most load balancers: the fewest requests in flight."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from control_plane.protocols import FleetView
from control_plane.router.base import RoutingStrategy
from control_plane.router.placement import Placement, record_around
from control_plane.types import ExecutionInstance, RequestMetadata


class LeastRequests(RoutingStrategy):
    """argmin of requests in flight, ties by lot."""

    name = "rival:least_requests"

    def __init__(self, rng: Random | None = None) -> None:
        self._rng = rng if rng is not None else Random(0)

    def place(self, request: RequestMetadata, candidates: Sequence[ExecutionInstance], view: FleetView) -> Placement:
        fewest = min(instance.active_requests for instance in candidates)
        ties = [instance for instance in candidates if instance.active_requests == fewest]
        chosen = ties[int(self._rng.random() * len(ties))]
        return record_around(request, chosen, candidates, view, f"{fewest} requests in flight there, the fewest")
