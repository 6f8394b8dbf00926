"""The better of two drawn at random."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from control_plane.protocols import FleetView
from control_plane.router.base import RoutingStrategy
from control_plane.router.placement import Placement, recorded, work_ms
from control_plane.types import ExecutionInstance, RequestMetadata


class PowerOfTwo(RoutingStrategy):
    """Of two distinct random candidates the one with less predicted work in flight plus own service: constant cost in any fleet, and
    several control planes that decide at once do not all choose the same instance (Mitzenmacher 2001)."""

    name = "power_of_two"

    def __init__(self, rng: Random | None = None) -> None:
        self._rng = rng if rng is not None else Random(0)

    def place(self, request: RequestMetadata, candidates: Sequence[ExecutionInstance], view: FleetView) -> Placement:
        n, random = len(candidates), self._rng.random
        first = int(random() * n)
        pair = [candidates[first]]
        if n > 1:
            pair.append(candidates[(first + 1 + int(random() * (n - 1))) % n])
        scores_ms, _ = work_ms(request, pair, view)
        chosen = scores_ms.index(min(scores_ms))
        reason = f"the better of {len(pair)} drawn from {n}, {scores_ms[chosen]:.0f} ms of work with this request"
        return Placement(pair[chosen], scores_ms[chosen], recorded(pair, scores_ms, chosen), reason)
