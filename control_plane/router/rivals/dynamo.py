"""NVIDIA Dynamo's KV router: blocks to prefill plus blocks that decode, the least or drawn by softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random

from control_plane.errors import InvalidRequest
from control_plane.protocols import FleetView
from control_plane.router.base import RoutingStrategy
from control_plane.router.placement import Placement, record_around
from control_plane.types import ExecutionInstance, RequestMetadata

#: tokens of a block where the engine does not tell
BLOCK_TOKENS = 16
#: of :class:`DynamoSoftmax`; the choice is ours
TEMPERATURE = 0.5


class DynamoCost(RoutingStrategy):
    """argmin of scale x (blocks being prefilled there + the request's uncached blocks) + blocks in use there with the request.

    With ``temperature`` above 0 an instance is drawn by softmax over the costs normalised to [0, 1], the lower the likelier; 0 is their
    default. Blocks being prefilled are known first hand; blocks in use are the contexts in flight, prompts and expected answers.
    """

    name = "rival:dynamo"

    def __init__(self, rng: Random | None = None, temperature: float = 0.0, prefill_scale: float = 1.0) -> None:
        for name, value in (("temperature", temperature), ("prefill_scale", prefill_scale)):
            if not 0.0 <= value < math.inf:
                raise InvalidRequest(f"{name} {value!r} must be a number from 0 on", param=name)
        self._rng = rng if rng is not None else Random(0)
        self.temperature = temperature
        self.prefill_scale = prefill_scale

    def place(self, request: RequestMetadata, candidates: Sequence[ExecutionInstance], view: FleetView) -> Placement:
        costs = self.costs(request, candidates, view)
        lowest = min(costs)
        if self.temperature > 0.0:
            chosen = self._drawn(costs)
        else:
            ties = [at for at, cost in enumerate(costs) if cost == lowest]
            chosen = ties[int(self._rng.random() * len(ties))]
        return record_around(request, candidates[chosen], candidates, view, f"{costs[chosen]:.0f} blocks, the least are {lowest:.0f}")

    def costs(self, request: RequestMetadata, candidates: Sequence[ExecutionInstance], view: FleetView) -> list[float]:
        """In blocks."""
        inputs = view.predictor.input_tokens(request)
        cached = view.prefixes.cached_tokens_of(request, candidates)
        found: list[float] = []
        for at, instance in enumerate(candidates):
            size = instance.engine.kv_block_size_tokens or BLOCK_TOKENS
            queued = view.predictor.queued(instance)
            prefill = math.ceil((queued.prompt_tokens + max(0, inputs - cached[at])) / size)
            found.append(self.prefill_scale * prefill + math.ceil((queued.context_tokens + inputs) / size))
        return found

    def _drawn(self, costs: list[float]) -> int:
        lowest, spread = min(costs), max(costs) - min(costs)
        weights = [math.exp(-((cost - lowest) / spread if spread else 0.0) / self.temperature) for cost in costs]
        left = self._rng.random() * sum(weights)
        for at, weight in enumerate(weights):
            left -= weight
            if left < 0.0:
                return at
        return len(costs) - 1


class DynamoSoftmax(DynamoCost):
    """The same cost, the instance drawn by softmax: their way of keeping several routers from choosing alike."""

    name = "rival:dynamo_softmax"

    def __init__(self, rng: Random | None = None) -> None:
        super().__init__(rng, TEMPERATURE)
