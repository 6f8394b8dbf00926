"""llm-d's weighted scorers: prefix match, queue depth and KV cache use, each in [0, 1], summed with weights."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from control_plane.protocols import FleetView
from control_plane.router.base import RoutingStrategy
from control_plane.router.placement import Placement, record_around
from control_plane.types import ExecutionInstance, RequestMetadata

#: of the guides' default profile
PREFIX_WEIGHT = 3.0
QUEUE_WEIGHT = 2.0
KV_CACHE_WEIGHT = 2.0


class WeightedScorers(RoutingStrategy):
    """argmax of 3 x (share of the prompt cached) + 2 x (1 - queue, between the shortest and the longest) + 2 x (1 - KV cache use).

    Queue depth is the requests sent there that have shown no token yet, known first hand (at home: vLLM's waiting requests, scraped
    every 50 ms); KV cache use is the engine's own last word. Ties by lot.
    """

    name = "rival:weighted"

    def __init__(self, rng: Random | None = None) -> None:
        self._rng = rng if rng is not None else Random(0)

    def place(self, request: RequestMetadata, candidates: Sequence[ExecutionInstance], view: FleetView) -> Placement:
        inputs = max(1, view.predictor.input_tokens(request))
        cached = view.prefixes.cached_tokens_of(request, candidates)
        queues = [view.predictor.queued(instance).prompts for instance in candidates]
        shortest, spread = min(queues), max(queues) - min(queues)
        scores: list[float] = []
        for at, instance in enumerate(candidates):
            queue = 1.0 - (queues[at] - shortest) / spread if spread else 1.0
            free = 1.0 - min(1.0, instance.engine.kv_cache_usage)
            scores.append(PREFIX_WEIGHT * min(1.0, cached[at] / inputs) + QUEUE_WEIGHT * queue + KV_CACHE_WEIGHT * free)
        best = max(scores)
        ties = [at for at, score in enumerate(scores) if score >= best - 1e-9]
        chosen = ties[int(self._rng.random() * len(ties))]
        return record_around(request, candidates[chosen], candidates, view, f"score {best:.2f} of at most 7, the highest")
