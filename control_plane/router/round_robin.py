"""In turn, fair even when candidates come and go."""

from __future__ import annotations

from collections.abc import Sequence

from control_plane.protocols import FleetView
from control_plane.router.base import RoutingStrategy
from control_plane.router.placement import SAMPLE_ABOVE, SAMPLE_SIZE, Placement, record_around, sample_note
from control_plane.types import ExecutionInstance, RequestMetadata

MAX_MODELS = 1024


class _Turns:
    __slots__ = ("count", "last")

    def __init__(self) -> None:
        self.count = 0
        #: instance id -> the turn in which it was last chosen
        self.last: dict[str, int] = {}


class RoundRobin(RoutingStrategy):
    """The candidate that was chosen longest ago, per model: over any fixed set of candidates the counts differ by at most one, and an
    instance that was away is not favoured for more than one turn.

    Of more than SAMPLE_ABOVE candidates it looks at the SAMPLE_SIZE that stand next in the order given.
    """

    name = "round_robin"

    def __init__(self) -> None:
        self._models: dict[str, _Turns] = {}

    def place(self, request: RequestMetadata, candidates: Sequence[ExecutionInstance], view: FleetView) -> Placement:
        turns = self._turns(request.model_name or "")
        seen = candidates if len(candidates) <= SAMPLE_ABOVE else _next_of(candidates, turns.count)
        last = turns.last
        chosen = min(seen, key=lambda instance: last.get(instance.instance_id, 0))
        turns.count += 1
        last[chosen.instance_id] = turns.count
        if len(last) > 4 * len(candidates) + SAMPLE_ABOVE:
            turns.last = {i.instance_id: last[i.instance_id] for i in candidates if i.instance_id in last}
        reason = f"its turn among {len(seen)}{sample_note(len(seen), len(candidates))}"
        return record_around(request, chosen, seen, view, reason)

    def _turns(self, model: str) -> _Turns:
        turns = self._models.get(model)
        if turns is None:
            if len(self._models) >= MAX_MODELS:
                del self._models[next(iter(self._models))]
            turns = self._models[model] = _Turns()
        return turns


def _next_of(candidates: Sequence[ExecutionInstance], count: int) -> list[ExecutionInstance]:
    start = count % len(candidates)
    seen = list(candidates[start : start + SAMPLE_SIZE])
    return seen + list(candidates[: SAMPLE_SIZE - len(seen)])
