"""A user's router that is no subclass of ours."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from control_plane.errors import InvalidRequest
from control_plane.protocols import FleetView
from control_plane.router.base import RoutingStrategy, accepts_phase, chosen_of, placement_of
from control_plane.router.placement import Placement
from control_plane.types import ExecutionInstance, RequestMetadata


class ForeignStrategy(RoutingStrategy):
    """Wraps an object with ``place(request, candidates, view)``, which may answer with a Placement, an instance or an instance's id,
    or with a coroutine ``select_instance(request, available_instances[, phase])``."""

    def __init__(self, router: Any) -> None:
        self._place = getattr(router, "place", None)
        self._select = getattr(router, "select_instance", None)
        if not callable(self._place) and not callable(self._select):
            raise InvalidRequest(
                f"{router!r} is no routing strategy: give a name, or an object with `place(request, candidates, view)` or "
                "`async select_instance(request, available_instances)`",
                param="routing_strategy",
            )
        self.router = router
        self.name = getattr(router, "name", None) or type(router).__name__
        self.weighs_waiting = bool(getattr(router, "weighs_waiting", False))
        self._takes_phase = callable(self._select) and accepts_phase(self._select)

    @property
    def selects_async(self) -> bool:
        return not callable(self._place)

    def place(self, request: RequestMetadata, candidates: Sequence[ExecutionInstance], view: FleetView) -> Placement:
        answer = self._place(request, candidates, view)  # type: ignore[misc]
        return placement_of(answer, request, candidates, view, self.name)

    async def select_instance(
        self, request: RequestMetadata, available_instances: Sequence[ExecutionInstance], phase: str | None = None
    ) -> ExecutionInstance:
        if not callable(self._select):
            return await super().select_instance(request, available_instances, phase)
        answer = self._select(request, available_instances, *((phase,) if self._takes_phase else ()))
        return chosen_of(await answer if inspect.isawaitable(answer) else answer, available_instances, self.name)
