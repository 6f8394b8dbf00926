"""``cache_aware`` of vllm-router and SGLang's gateway: the longest match while loads are even, the least loaded where they are not."""

from __future__ import annotations

from collections.abc import Sequence

from control_plane.protocols import FleetView
from control_plane.router.base import RoutingStrategy
from control_plane.router.placement import Placement, record_around
from control_plane.types import ExecutionInstance, RequestMetadata

#: their defaults
CACHE_THRESHOLD = 0.3
BALANCE_ABS = 64
BALANCE_REL = 1.5
MAX_INSTANCES = 16_384


class CacheAware(RoutingStrategy):
    """Where the busiest has more than 64 requests over the idlest and more than 1.5 times as many, the fewest requests in flight. Else the
    longest match, if it is over 0.3 of the prompt; else the one with the smallest tree.

    At home matches come from a radix tree of texts for each instance. Here they come from our prefix index, which knows whole pieces
    only and forgets as the engine's cache does; the size of a tree is what was sent there and was no match.
    """

    name = "rival:cache_aware"

    def __init__(self) -> None:
        self._tree_tokens: dict[str, int] = {}

    def place(self, request: RequestMetadata, candidates: Sequence[ExecutionInstance], view: FleetView) -> Placement:
        inputs = max(1, view.predictor.input_tokens(request))
        cached = view.prefixes.cached_tokens_of(request, candidates)
        loads = [instance.active_requests for instance in candidates]
        least, most = min(loads), max(loads)
        longest = max(cached)
        if most - least > BALANCE_ABS and most > BALANCE_REL * least:
            chosen, reason = loads.index(least), f"loads of {least} to {most} are uneven; the least"
        elif longest / inputs > CACHE_THRESHOLD:
            chosen, reason = cached.index(longest), f"longest match, {longest} of {inputs} tokens"
        else:
            trees = [self._tree_tokens.get(instance.instance_id, 0) for instance in candidates]
            chosen = trees.index(min(trees))
            reason = f"no match over {CACHE_THRESHOLD:g} of the prompt; the smallest tree"
        name = candidates[chosen].instance_id
        if name not in self._tree_tokens and len(self._tree_tokens) >= MAX_INSTANCES:
            del self._tree_tokens[next(iter(self._tree_tokens))]
        self._tree_tokens[name] = self._tree_tokens.get(name, 0) + max(0, inputs - cached[chosen])
        return record_around(request, candidates[chosen], candidates, view, reason)
