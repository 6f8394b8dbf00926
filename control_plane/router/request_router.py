"""The seed's face of a routing strategy, over a plain list of instances."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from random import Random

from control_plane.admission import eligible
from control_plane.pd_selection import for_phase
from control_plane.prediction import LatencyPredictor
from control_plane.protocols import FleetView
from control_plane.router.base import RoutingStrategy, accepts_phase, placement_of
from control_plane.router.placement import Placement
from control_plane.router.table import ROUTERS, create_strategy
from control_plane.types import ExecutionInstance, RequestMetadata
from control_plane.view import StaticView

ViewFactory = Callable[[Sequence[ExecutionInstance]], FleetView]


class RequestRouter(RoutingStrategy):
    """``RequestRouter("affinity")``. ``strategy`` is a name of the table, ``module:Class`` or an object.

    ``view_factory`` makes the view over given instances; a manager hands in its fleet's. Without one the instances are read as given,
    with a predictor of its own.
    """

    def __init__(self, strategy: object = "load_balanced", *, rng: Random | None = None, view_factory: ViewFactory | None = None) -> None:
        self._strategy = create_strategy(strategy, rng)
        if type(self) is RequestRouter:
            self.name = self._strategy.name
            self.weighs_waiting = self._strategy.weighs_waiting
        #: one of the table's own and not a subclass of this face: its answer is a Placement on one of the candidates
        self.is_ours = type(self) is RequestRouter and isinstance(strategy, str) and strategy in ROUTERS
        self._view_of = view_factory if view_factory is not None else self._static_view
        self._takes_phase = accepts_phase(self._strategy.select_instance)
        self._predictor = LatencyPredictor()

    @property
    def placer(self) -> Callable[[RequestMetadata, Sequence[ExecutionInstance], FleetView], Placement]:
        """What dispatch asks: the strategy itself where its answer needs no second look."""
        return self._strategy.place if self.is_ours else self.place

    @property
    def strategy(self) -> str:
        return self._strategy.name

    @property
    def selects_async(self) -> bool:
        overridden = type(self).select_instance is not RequestRouter.select_instance and type(self).place is RequestRouter.place
        return overridden or self._strategy.selects_async

    def place(self, request: RequestMetadata, candidates: Sequence[ExecutionInstance], view: FleetView) -> Placement:
        answer = self._strategy.place(request, candidates, view)
        return answer if isinstance(answer, Placement) else placement_of(answer, request, candidates, view, self.name)

    async def select_instance(
        self, request: RequestMetadata, available_instances: Sequence[ExecutionInstance], phase: str | None = None
    ) -> ExecutionInstance:
        """The instance for ``request``, of those that are usable, have room and serve its model and kind; ``phase`` ("prefilling",
        "decoding" or the enum) prefers those specialised in it. Raises NoInstanceAvailable, ModelNotFound."""
        candidates = eligible(request, available_instances)
        if phase is not None:
            candidates = for_phase(phase, candidates)[0] or candidates
        if self._strategy.selects_async:
            given = (phase,) if self._takes_phase else ()
            return await self._strategy.select_instance(request, candidates, *given)
        return self.place(request, candidates, self._view_of(available_instances)).instance

    def _static_view(self, instances: Sequence[ExecutionInstance]) -> FleetView:
        return StaticView(instances, predictor=self._predictor)
