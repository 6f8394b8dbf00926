"""Preble's E2 (arXiv 2407.00023): exploit a cached prefix that outweighs the rest of the prompt, else explore by cost."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from control_plane.protocols import FleetView
from control_plane.router.base import RoutingStrategy
from control_plane.router.placement import Placement, record_around
from control_plane.types import ExecutionInstance, RequestMetadata

#: load is what was sent to an instance in this time
WINDOW_S = 180.0
#: an instance with so many times the load of the least loaded gives its exploiters to that one
REBALANCE = 2.0


class PrebleE2(RoutingStrategy):
    """If more of the prompt is cached somewhere than is to be computed, the holder of the most (the least loaded of several); else
    argmin of load + eviction cost + own prefill.

    Load is the predicted milliseconds of all requests sent there in the last 180 s. An exploited holder with more than twice the load of
    the least loaded instance hands the request on to that one, which then holds the prefix, too: their rebalancing and replication of hot
    prefixes. Eviction is the prefill of what the index expects to lose (at home: over the nodes of their radix tree, by hit rate).
    """

    name = "rival:preble"

    def __init__(self) -> None:
        self._sent: deque[tuple[float, str, float]] = deque()
        self._loads_ms: dict[str, float] = {}

    def place(self, request: RequestMetadata, candidates: Sequence[ExecutionInstance], view: FleetView) -> Placement:
        self._forget_old(view.now_s)
        loads_ms = [self._loads_ms.get(instance.instance_id, 0.0) for instance in candidates]
        inputs = view.predictor.input_tokens(request)
        cached = view.prefixes.cached_tokens_of(request, candidates)
        most = max(cached)
        if most > inputs - most:
            chosen = min((at for at in range(len(candidates)) if cached[at] == most), key=loads_ms.__getitem__)
            lightest = min(range(len(candidates)), key=loads_ms.__getitem__)
            reason = f"exploits {most} cached tokens of {inputs}"
            if loads_ms[chosen] > REBALANCE * loads_ms[lightest] and loads_ms[lightest] > 0.0:
                chosen, reason = lightest, f"the holder of {most} cached tokens has over {REBALANCE:g} times the least load"
        else:
            costs_ms = [loads_ms[at] + self._own_ms(inputs, cached[at], request, one, view) for at, one in enumerate(candidates)]
            chosen = costs_ms.index(min(costs_ms))
            reason = f"explores, {costs_ms[chosen]:.0f} ms of load, eviction and prefill there"
        placement = record_around(request, candidates[chosen], candidates, view, reason)
        self._count(view, request, candidates[chosen], inputs - cached[chosen])
        return placement

    def _own_ms(self, inputs: int, cached: int, request: RequestMetadata, instance: ExecutionInstance, view: FleetView) -> float:
        prefill_ms = view.predictor.prefill_ms(instance, max(1, inputs - cached))
        fixed_ms = view.predictor.prefill_ms(instance, 0)
        lost = view.prefixes.lost_tokens(instance, max(1, inputs - cached) + view.predictor.output_tokens(request))
        return prefill_ms + lost * (prefill_ms - fixed_ms) / max(1, inputs - cached)

    def _count(self, view: FleetView, request: RequestMetadata, instance: ExecutionInstance, uncached: int) -> None:
        # decode at the batch that shares each step
        tpot_ms = view.predictor.tpot_ms(instance) / (instance.active_requests + 1)
        ms = view.predictor.prefill_ms(instance, max(1, uncached)) + view.predictor.output_tokens(request) * tpot_ms
        self._sent.append((view.now_s, instance.instance_id, ms))
        self._loads_ms[instance.instance_id] = self._loads_ms.get(instance.instance_id, 0.0) + ms

    def _forget_old(self, now_s: float) -> None:
        sent = self._sent
        while sent and sent[0][0] < now_s - WINDOW_S:
            _, name, ms = sent.popleft()
            left_ms = self._loads_ms[name] - ms
            if left_ms > 1e-6:
                self._loads_ms[name] = left_ms
            else:
                del self._loads_ms[name]
