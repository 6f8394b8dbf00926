"""The least that all lose together: predicted milliseconds of the request, of those it delays, and of what it pushes out of the cache."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from control_plane.protocols import FleetView
from control_plane.router.base import RoutingStrategy
from control_plane.router.placement import SAMPLE_ABOVE, TIE_SHARE, Placement, least, sampled
from control_plane.router.pricing import PricedPlacement, priced
from control_plane.types import ExecutionInstance, RequestMetadata


class PredictedLatency(RoutingStrategy):
    """argmin of waiting + prefill + decode + delay + eviction (:mod:`~control_plane.router.pricing`); those about equal take turns."""

    name = "predicted_latency"
    weighs_waiting = True

    def __init__(self, rng: Random | None = None) -> None:
        self._rng = rng if rng is not None else Random(0)
        # several control planes do not take their turns in step
        self._turn = int(self._rng.random() * 1024)

    def place(self, request: RequestMetadata, candidates: Sequence[ExecutionInstance], view: FleetView) -> Placement:
        there_are = len(candidates)
        seen = candidates if there_are <= SAMPLE_ABOVE else sampled(request, candidates, view, self._rng)
        prices = priced(request, seen, view)
        scores_ms = prices.totals()
        chosen = least(scores_ms, TIE_SHARE * min(prices.prefill), self._turn)
        self._turn += 1
        return PricedPlacement(prices, scores_ms, chosen, there_are, "least predicted loss")
