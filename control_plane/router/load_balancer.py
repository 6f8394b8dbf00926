"""The seed's LoadBalancer: an instance of a list, without a request."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from control_plane.errors import NoInstanceAvailable
from control_plane.prediction import LatencyPredictor
from control_plane.router.base import RoutingStrategy
from control_plane.router.least_response_time import LeastResponseTime
from control_plane.router.power_of_two import PowerOfTwo
from control_plane.types import ExecutionInstance, RequestMetadata
from control_plane.view import StaticView


class LoadBalancer:
    """Each method answers with one of ``instances``: of those that can take a request, else of all. An empty list raises
    NoInstanceAvailable."""

    def __init__(self, rng: Random | None = None) -> None:
        self._power_of_two = PowerOfTwo(rng)
        self._least_response_time = LeastResponseTime(rng)
        self._predictor = LatencyPredictor()
        self._owed: dict[str, float] = {}

    def get_least_loaded_instance(self, instances: Sequence[ExecutionInstance]) -> ExecutionInstance:
        """The least ``current_load``, then the fewest ``active_requests``."""
        return min(_open(instances), key=lambda i: (i.current_load, i.active_requests))

    def least_connections(self, instances: Sequence[ExecutionInstance]) -> ExecutionInstance:
        """The fewest ``active_requests``, then the least ``current_load``."""
        return min(_open(instances), key=lambda i: (i.active_requests, i.current_load))

    def least_response_time(self, instances: Sequence[ExecutionInstance]) -> ExecutionInstance:
        return self._place(self._least_response_time, instances)

    def power_of_two(self, instances: Sequence[ExecutionInstance]) -> ExecutionInstance:
        return self._place(self._power_of_two, instances)

    def weighted_round_robin(self, instances: Sequence[ExecutionInstance]) -> ExecutionInstance:
        """In turn, as often as its weight says (``metadata["weight"]``, else its GPUs), evenly spread: smooth weighted round robin as
        in nginx. What is owed to instances that are not given now is forgotten."""
        given = _open(instances)
        owed = {i.instance_id: self._owed.get(i.instance_id, 0.0) + _weight(i) for i in given}
        chosen = max(given, key=lambda i: owed[i.instance_id])
        owed[chosen.instance_id] -= sum(map(_weight, given))
        self._owed = owed
        return chosen

    def _place(self, strategy: RoutingStrategy, instances: Sequence[ExecutionInstance]) -> ExecutionInstance:
        given = _open(instances)
        return strategy.place(RequestMetadata(), given, StaticView(given, predictor=self._predictor)).instance


def _open(instances: Sequence[ExecutionInstance]) -> list[ExecutionInstance]:
    if not instances:
        raise NoInstanceAvailable("there are no instances to choose from; register one first")
    return [i for i in instances if i.can_accept_request] or list(instances)


def _weight(instance: ExecutionInstance) -> float:
    weight = instance.metadata.get("weight")
    return float(weight) if isinstance(weight, int | float) and weight > 0 else float(instance.world_size)
