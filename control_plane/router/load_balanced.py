"""Least outstanding predicted work, weighted by what the instance can do."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from control_plane.protocols import FleetView
from control_plane.router.base import RoutingStrategy
from control_plane.router.placement import Placement, least_work
from control_plane.types import ExecutionInstance, RequestMetadata


class LoadBalanced(RoutingStrategy):
    """argmin of (predicted ms in flight there + this request's own service there + what its prompt delays those that decode there): a slow
    instance's milliseconds are longer, so each gets work in proportion to its speed. Blind to prefixes."""

    name = "load_balanced"

    def __init__(self, rng: Random | None = None) -> None:
        self._rng = rng if rng is not None else Random(0)
        self._turn = 0

    def place(self, request: RequestMetadata, candidates: Sequence[ExecutionInstance], view: FleetView) -> Placement:
        turn = self._turn
        self._turn = turn + 1
        return least_work(request, candidates, view, self._rng, turn)
