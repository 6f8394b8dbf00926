"""What a router is: of the candidates, which one, and what the others would have cost. What they weigh is in ``placement``."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

from control_plane.errors import ConfigurationError
from control_plane.protocols import FleetView
from control_plane.router.placement import Placement, record_around
from control_plane.types import ExecutionInstance, RequestMetadata


class RoutingStrategy:
    """A subclass implements ``place``, or only the seed's coroutine ``select_instance``."""

    #: as in the table and in decisions; a subclass that sets none is called by its class's name
    name: str = ""

    #: prices what waits at an instance, so that it may be asked about those without room as well: a request waits for the one that it
    #: answers, where that is cheaper than to start elsewhere
    weighs_waiting = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = cls.__name__

    def place(self, request: RequestMetadata, candidates: Sequence[ExecutionInstance], view: FleetView) -> Placement:
        """One of ``candidates`` (not empty; all usable and with room). Reads the view, changes nothing but its own counters."""
        raise NotImplementedError(f"{type(self).__name__} implements neither place nor select_instance")

    async def select_instance(
        self, request: RequestMetadata, available_instances: Sequence[ExecutionInstance], phase: str | None = None
    ) -> ExecutionInstance:
        raise NotImplementedError(f"{type(self).__name__} implements neither place nor select_instance")

    @property
    def selects_async(self) -> bool:
        """True when the subclass brings only ``select_instance``: it is awaited instead of ``place``."""
        return type(self).place is RoutingStrategy.place


def placement_of(
    answer: object, request: RequestMetadata, candidates: Sequence[ExecutionInstance], view: FleetView, name: str
) -> Placement:
    """What the user's own ``place`` answered: a Placement, one of the candidates, or its id. Raises ConfigurationError for others."""
    if isinstance(answer, Placement):
        return answer
    return record_around(request, chosen_of(answer, candidates, name), candidates, view, f"chosen by {name}")


def chosen_of(answer: object, candidates: Sequence[ExecutionInstance], name: str) -> ExecutionInstance:
    for instance in candidates:
        if answer is instance or answer == instance.instance_id:
            return instance
    shown = getattr(answer, "instance_id", answer)
    raise ConfigurationError(f"the router {name} chose {shown!r}, which is not among the candidates", param="routing_strategy")


def accepts_phase(select: Any) -> bool:
    """Whether a ``select_instance`` of the user's own takes the phase; it may do without."""
    try:
        inspect.signature(select).bind(None, None, None)
    except TypeError:
        return False
    return True
