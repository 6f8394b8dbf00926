"""The soonest first token: what is cached of the prompt against who is waiting for the same instance."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from control_plane.protocols import FleetView
from control_plane.router.base import RoutingStrategy
from control_plane.router.placement import SAMPLE_ABOVE, TIE_SHARE, Placement, sampled
from control_plane.router.pricing import PricedPlacement, priced
from control_plane.types import ExecutionInstance, RequestMetadata


class PrefixAware(RoutingStrategy):
    """argmin of the predicted milliseconds to the first token: waiting + prefill of what is not cached there.

    A prefix that many ask for is not queued behind: as soon as waiting for its holder takes longer than computing it elsewhere it is
    computed elsewhere, and from then on two hold it. Those that are about equal in that are told apart by the whole price.
    """

    name = "prefix_aware"
    weighs_waiting = True

    def __init__(self, rng: Random | None = None) -> None:
        self._rng = rng if rng is not None else Random(0)

    def place(self, request: RequestMetadata, candidates: Sequence[ExecutionInstance], view: FleetView) -> Placement:
        there_are = len(candidates)
        seen = candidates if there_are <= SAMPLE_ABOVE else sampled(request, candidates, view, self._rng)
        prices = priced(request, seen, view)
        scores_ms, totals_ms = prices.first_tokens(), prices.totals()
        # a prompt is computed from the next step on: what differs by less than a step comes at about the same time
        bound_ms = min(scores_ms) * (1.0 + TIE_SHARE) + min(prices.step)
        chosen = min((at for at, score_ms in enumerate(scores_ms) if score_ms <= bound_ms), key=totals_ms.__getitem__)
        return PricedPlacement(prices, scores_ms, chosen, there_are, "soonest first token")
