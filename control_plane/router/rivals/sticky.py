"""llm-d's "sticky until saturated": stay where the prefix is until the wait there is too long."""

from __future__ import annotations

from collections.abc import Sequence

from control_plane.errors import InvalidRequest
from control_plane.protocols import FleetView
from control_plane.router.base import RoutingStrategy
from control_plane.router.placement import Placement, record_around
from control_plane.types import ExecutionInstance, RequestMetadata

#: share of the prompt that a holder has to have cached
STICKY_HIT = 0.8
#: by how much the predicted time to the first token on a holder may exceed that on the best of the others
MAX_EXTRA_MS = 1000.0


class StickyUntilSaturated(RoutingStrategy):
    """Only those with at least 80 % of the prompt cached compete, by uncached tokens in flight + own uncached tokens, unless the time to
    the first token there (those tokens over the peak prefill rate) exceeds that of the best of all by ``max_extra_ms``; then, and where
    nobody holds so much, all compete by the same score.

    The peak rate is one over the slope of the predictor's prefill line (at home: chunk size over the time of a step with a full chunk).
    """

    name = "rival:sticky"

    def __init__(self, max_extra_ms: float = MAX_EXTRA_MS) -> None:
        if not max_extra_ms >= 0.0:
            raise InvalidRequest(f"max_extra_ms {max_extra_ms!r} must be at least 0", param="max_extra_ms")
        self.max_extra_ms = max_extra_ms

    def place(self, request: RequestMetadata, candidates: Sequence[ExecutionInstance], view: FleetView) -> Placement:
        inputs = view.predictor.input_tokens(request)
        cached = view.prefixes.cached_tokens_of(request, candidates)
        scores: list[int] = []
        first_ms: list[float] = []
        for at, instance in enumerate(candidates):
            tokens = round(view.predictor.queued(instance).prompt_tokens) + max(1, inputs - cached[at])
            scores.append(tokens)
            first_ms.append(view.predictor.prefill_ms(instance, tokens) - view.predictor.prefill_ms(instance, 0))
        everyone = range(len(candidates))
        holders = [at for at in everyone if inputs and cached[at] >= STICKY_HIT * inputs]
        coldest_ms = min(first_ms)
        sticky = [at for at in holders if first_ms[at] <= coldest_ms + self.max_extra_ms]
        chosen = min(sticky or everyone, key=lambda at: (scores[at], candidates[at].active_requests))
        if sticky:
            reason = f"holds {cached[chosen]} of {inputs} tokens, {scores[chosen]} to prefill there"
        elif holders:
            reason = f"every holder is saturated; {scores[chosen]} tokens to prefill there"
        else:
            reason = f"nobody holds enough of it; {scores[chosen]} tokens to prefill there"
        return record_around(request, candidates[chosen], candidates, view, reason)
