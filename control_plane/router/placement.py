"""A router's answer, and what routers weigh: predicted milliseconds of each candidate, a sample of many, what is recorded.

Everything is compared in predicted milliseconds. Above SAMPLE_ABOVE candidates a router that compares them all looks at a sample
(SAMPLE_SIZE at random, and up to MAX_HOLDERS that hold the request's prefix), so that a decision's cost has a bound; the reason says
so.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from random import Random

from control_plane.live_state import LiveState
from control_plane.protocols import FleetView
from control_plane.types import Candidate, ExecutionInstance, RequestMetadata

MAX_RECORDED = 16
SAMPLE_ABOVE = 64
SAMPLE_SIZE = 32
MAX_HOLDERS = 16


class Placement:
    """A router's answer. ``candidates``: at most 16, best first, the chosen one always among them. ``service_ms``: the request's own
    service on the chosen instance, where the router has worked it out anyway."""

    __slots__ = ("_candidates", "_reason", "instance", "predicted_ms", "service_ms")

    def __init__(
        self,
        instance: ExecutionInstance,
        predicted_ms: float,
        candidates: Sequence[Candidate] = (),
        reason: str = "",
        service_ms: float | None = None,
    ) -> None:
        self.instance = instance
        self.predicted_ms = predicted_ms
        self.service_ms = service_ms
        self._candidates = candidates
        self._reason = reason

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        return tuple(self._candidates)

    @property
    def reason(self) -> str:
        return self._reason


class ScoredPlacement(Placement):
    """One whose ``candidates`` and ``reason`` are written out when somebody looks at them, from the scores that it went by."""

    __slots__ = ("_at", "_rule", "_scores_ms", "_seen", "_there_are")

    def __init__(
        self, seen: Sequence[ExecutionInstance], scores_ms: Sequence[float], at: int, there_are: int, rule: str, service_ms: float
    ) -> None:
        """``at``: which of ``seen`` was chosen, of ``there_are`` candidates; ``rule``: the reason's beginning."""
        super().__init__(seen[at], scores_ms[at], service_ms=service_ms)
        self._seen = seen
        self._scores_ms = scores_ms
        self._at = at
        self._there_are = there_are
        self._rule = rule

    @property
    def candidates(self) -> tuple[Candidate, ...]:
        return recorded(self._seen, self._scores_ms, self._at)

    @property
    def reason(self) -> str:
        note = sample_note(len(self._seen), self._there_are)
        return f"{self._rule}, {self.predicted_ms:.0f} ms with this request, of {len(self._seen)}{note}"


def work_ms(request: RequestMetadata, candidates: Sequence[ExecutionInstance], view: FleetView) -> tuple[list[float], list[float]]:
    """Of each candidate (predicted work in flight there plus this request's own service, the service alone), milliseconds.

    What is in flight is the fleet's own account where it has one; of an instance that only tells counts or a load, the request's
    service times the count, or by processor sharing load / (1 - load). Data-parallel ranks work side by side and share it.
    """
    predictor = view.predictor
    # one call for all where the predictor offers it; the protocol asks for one instance at a time
    batch = getattr(predictor, "services_ms", None)
    services: list[float] = batch(request, candidates) if batch is not None else [predictor.service_ms(request, i) for i in candidates]
    totals: list[float] = []
    for at, instance in enumerate(candidates):
        service_ms = services[at]
        live: LiveState = instance
        in_flight_ms = live.outstanding_ms
        if not in_flight_ms and (live.active_requests or live.current_load):
            in_flight_ms = _unaccounted_ms(live, service_ms)
        totals.append(service_ms + in_flight_ms / live.data_parallel_size if in_flight_ms else service_ms)
    return totals, services


def _unaccounted_ms(instance: LiveState, service_ms: float) -> float:
    free: float = max(0.01, 1.0 - instance.current_load)
    active: float = instance.active_requests
    return service_ms * max(active, (1.0 - free) / free)


def recorded(candidates: Sequence[ExecutionInstance], scores_ms: Sequence[float], chosen: int) -> tuple[Candidate, ...]:
    """The best MAX_RECORDED by score, ties in the order given, and the chosen one in the last place where it is not among them."""
    n = len(candidates)
    if n <= MAX_RECORDED:
        order = sorted(range(n), key=scores_ms.__getitem__)
    else:
        order = heapq.nsmallest(MAX_RECORDED, range(n), key=scores_ms.__getitem__)
        if chosen not in order:
            order[-1] = chosen
    return tuple([Candidate(candidates[k].instance_id, scores_ms[k]) for k in order])


def sampled(request: RequestMetadata, candidates: Sequence[ExecutionInstance], view: FleetView, rng: Random) -> Sequence[ExecutionInstance]:
    """The candidates to compare: all, or of more than SAMPLE_ABOVE a random SAMPLE_SIZE and the holders of the prefix."""
    n = len(candidates)
    if n <= SAMPLE_ABOVE:
        return candidates
    random, chosen = rng.random, set[int]()
    while len(chosen) < SAMPLE_SIZE:
        chosen.add(int(random() * n))
    sample = [candidates[k] for k in sorted(chosen)]
    holders = getattr(view.prefixes, "holders", None)
    if holders is not None:
        sample += [i for i in list(holders(request))[:MAX_HOLDERS] if i in candidates and i not in sample]
    return sample


def sample_note(looked_at: int, there_are: int) -> str:
    return "" if looked_at == there_are else f" (sampled {looked_at} of {there_are})"


def record_around(
    request: RequestMetadata, chosen: ExecutionInstance, candidates: Sequence[ExecutionInstance], view: FleetView, reason: str
) -> Placement:
    """The placement of a router that does not go by milliseconds: what the chosen one and up to 15 others would cost is recorded."""
    at = candidates.index(chosen)
    seen = candidates if len(candidates) <= MAX_RECORDED else [chosen, *candidates[at + 1 : at + MAX_RECORDED]]
    if len(seen) < MAX_RECORDED < len(candidates):
        seen = [*seen, *candidates[: MAX_RECORDED - len(seen)]]
    index = at if seen is candidates else 0
    scores_ms, services_ms = work_ms(request, seen, view)
    return Placement(chosen, scores_ms[index], recorded(seen, scores_ms, index), reason, services_ms[index])


def least(scores_ms: list[float], tolerance_ms: float, turn: int) -> int:
    """The index of the lowest score; those within ``tolerance_ms`` of it take turns."""
    bound = min(scores_ms) + tolerance_ms
    ties = [k for k, score in enumerate(scores_ms) if score <= bound]
    return ties[turn % len(ties)]
