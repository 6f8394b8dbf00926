"""Any candidate, with equal chances."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from control_plane.protocols import FleetView
from control_plane.router.base import RoutingStrategy
from control_plane.router.placement import Placement, record_around
from control_plane.types import ExecutionInstance, RequestMetadata


class RandomChoice(RoutingStrategy):
    """A baseline: it needs no state, and loads differ by the square root of their size."""

    name = "random"

    def __init__(self, rng: Random | None = None) -> None:
        self._rng = rng if rng is not None else Random(0)

    def place(self, request: RequestMetadata, candidates: Sequence[ExecutionInstance], view: FleetView) -> Placement:
        chosen = candidates[int(self._rng.random() * len(candidates))]
        return record_around(request, chosen, candidates, view, f"drawn at random from {len(candidates)}")
