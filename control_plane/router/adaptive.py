"""By predicted milliseconds while predictions hold, by hashing while they do not."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random
from typing import Final

from control_plane.prediction import LatencyPredictor
from control_plane.protocols import FleetView, Predictor
from control_plane.router.affinity import Affinity
from control_plane.router.base import RoutingStrategy
from control_plane.router.placement import Placement
from control_plane.router.predicted_latency import PredictedLatency
from control_plane.types import ExecutionInstance, RequestMetadata

#: median error of predicted milliseconds per token from which on they are no guide, and below which they are one again
DISTRUST_ABOVE: Final = 0.75
TRUST_BELOW: Final = 0.5
#: predictions that have to have been compared with what came. While a fleet fills up they err most, and prices are right all the same: the
#: prior is the same for equal instances; a few seconds of hashing at the beginning spread sessions in a way that lasts
LEAST_COMPARED: Final = 1000
#: decisions between two looks at the errors
LOOK_EVERY: Final = 128


class AdaptiveRouting(RoutingStrategy):
    """``predicted_latency`` while the median error of predicted milliseconds per token is below 75 %; above it ``affinity`` (which needs
    no prediction and keeps caches warm) until it is below 50 % again. The reason says which, and why. What single requests are off by is
    mostly what comes after them, which no router knows; half of them off by as much is a model that does not describe these engines.

    Prices that err differently for equal instances are worse than none: the one that looks cheapest draws all the load.
    """

    name = "adaptive"
    weighs_waiting = True

    def __init__(self, rng: Random | None = None) -> None:
        self._by_price = PredictedLatency(rng)
        self._by_hash = Affinity()
        self._until_look = 0
        self._error = 0.0
        self.trusts = True

    def place(self, request: RequestMetadata, candidates: Sequence[ExecutionInstance], view: FleetView) -> Placement:
        self._until_look -= 1
        if self._until_look < 0:
            self._until_look = LOOK_EVERY
            self._look(view.predictor)
        if self.trusts:
            return self._by_price.place(request, candidates, view)
        placed = self._by_hash.place(request, candidates, view)
        reason = f"{placed.reason} (predictions are off by {self._error:.0%}, so prices are no guide)"
        return Placement(placed.instance, placed.predicted_ms, placed.candidates, reason, placed.service_ms)

    def _look(self, predictor: Predictor) -> None:
        if not isinstance(predictor, LatencyPredictor):
            return
        errors = predictor.calibration["tpot_ms"].errors
        if errors.count < LEAST_COMPARED:
            return
        self._error = errors.quantile(0.5)
        self.trusts = self._error < (DISTRUST_ABOVE if self.trusts else TRUST_BELOW)
