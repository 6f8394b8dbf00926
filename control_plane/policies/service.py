"""How long a request will take wherever it ends up: its service before an instance is chosen."""

from __future__ import annotations

from control_plane.protocols import FleetView
from control_plane.types import ExecutionInstance, RequestMetadata

#: instances looked at, and instances of the model compared, to find one that stands for the others
MAX_LOOKED_AT = 64
MAX_COMPARED = 4
#: questions after which it is looked for anew, so that faster instances that joined are noticed
QUESTIONS_PER_SEARCH = 256
MAX_MODELS = 1024
#: requests that share a decode step on a busy instance
SHARED_BY = 32.0


class ServiceGuide:
    """For each model an instance that stands for those that serve it: the quickest at prefill of the first few that are usable.

    The search is bounded and its answer kept a while, so that the cost of a key does not grow with the fleet.
    """

    __slots__ = ("_questions", "_standing")

    def __init__(self) -> None:
        self._standing: dict[str, ExecutionInstance] = {}
        self._questions = 0

    def service_ms(self, request: RequestMetadata, view: FleetView) -> float:
        """Prefill and decode, without waiting; 0.0 in an empty fleet."""
        instance = self.instance(request.model_name or "", view)
        return 0.0 if instance is None else view.predictor.service_ms(request, instance)

    def prefill_ms(self, request: RequestMetadata, view: FleetView) -> float:
        """Prefill, without waiting; 0.0 in an empty fleet."""
        instance = self.instance(request.model_name or "", view)
        return 0.0 if instance is None else view.predictor.prefill_ms(instance, view.predictor.input_tokens(request))

    def work_ms(self, request: RequestMetadata, view: FleetView) -> float:
        """What it takes of an instance's time: its prefill, and its share of decode steps that SHARED_BY requests make together."""
        instance = self.instance(request.model_name or "", view)
        if instance is None:
            return 0.0
        prefill_ms = view.predictor.prefill_ms(instance, view.predictor.input_tokens(request))
        return prefill_ms + max(0.0, view.predictor.service_ms(request, instance) - prefill_ms) / SHARED_BY

    def instance(self, model: str, view: FleetView) -> ExecutionInstance | None:
        """None in an empty fleet; any instance where none of the model is found."""
        self._questions += 1
        standing = self._standing.get(model)
        fresh = self._questions % QUESTIONS_PER_SEARCH != 0
        if standing is not None and fresh and standing.health_status == "healthy" and view.get(standing.instance_id) is standing:
            return standing
        standing = _search(model, view)
        if standing is None or (len(self._standing) >= MAX_MODELS and model not in self._standing):
            self._standing.clear()
        if standing is not None:
            self._standing[model] = standing
        return standing


def _search(model: str, view: FleetView) -> ExecutionInstance | None:
    instances = view.instances()
    found: list[ExecutionInstance] = []
    for instance in instances[:MAX_LOOKED_AT]:
        if instance.is_usable and (not model or instance.serves(model)):
            found.append(instance)
            if len(found) == MAX_COMPARED:
                break
    if len(found) > 1:
        prefill_ms = view.predictor.prefill_ms
        return min(found, key=lambda instance: prefill_ms(instance, 1024))
    if found:
        return found[0]
    return instances[0] if instances else None
