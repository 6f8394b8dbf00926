"""A fleet view over a plain list, for whoever decides without a running fleet: the seed's calls, tests, replays."""

from __future__ import annotations

from collections.abc import Sequence

from control_plane.prediction import LatencyPredictor
from control_plane.protocols import Predictor, PrefixMatches
from control_plane.types import ExecutionInstance, RequestMetadata


class NoPrefixes:
    """Nothing is known of what is cached where."""

    def cached_tokens(self, request: RequestMetadata, instance: ExecutionInstance) -> int:
        return 0

    def cached_tokens_of(self, request: RequestMetadata, instances: Sequence[ExecutionInstance]) -> list[int]:
        return [0] * len(instances)

    def holders(self, request: RequestMetadata, limit: int) -> Sequence[ExecutionInstance]:
        return ()

    def lost_tokens(self, instance: ExecutionInstance, tokens: int) -> float:
        return 0.0


class StaticView:
    """Satisfies :class:`~control_plane.protocols.FleetView`. The instances are read as they are at the moment of a question."""

    __slots__ = ("_instances", "now_s", "predictor", "prefixes")

    def __init__(
        self,
        instances: Sequence[ExecutionInstance],
        *,
        now_s: float = 0.0,
        predictor: Predictor | None = None,
        prefixes: PrefixMatches | None = None,
    ) -> None:
        self._instances = instances
        self.now_s = now_s
        self.predictor: Predictor = predictor if predictor is not None else LatencyPredictor()
        self.prefixes: PrefixMatches = prefixes if prefixes is not None else NoPrefixes()

    def instances(self) -> Sequence[ExecutionInstance]:
        return self._instances

    def get(self, instance_id: str) -> ExecutionInstance | None:
        for instance in self._instances:
            if instance.instance_id == instance_id:
                return instance
        return None
