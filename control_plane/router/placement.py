"""A router's answer, and what routers weigh: predicted milliseconds of each candidate, a sample of many, what is recorded.

Everything is compared in predicted milliseconds. Above SAMPLE_ABOVE candidates a router that compares them all looks at a sample
(SAMPLE_SIZE at random, and up to MAX_HOLDERS that hold the request's prefix), so that a decision's cost has a bound; the reason says
so.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from random import Random
from typing import Any, Final

from mypy_extensions import mypyc_attr

from control_plane.live_state import LiveState
from control_plane.prediction import LatencyPredictor
from control_plane.protocols import FleetView
from control_plane.types import Candidate, ExecutionInstance, RequestMetadata

MAX_RECORDED: Final = 16
SAMPLE_ABOVE: Final = 64
SAMPLE_SIZE: Final = 32
MAX_HOLDERS: Final = 16
#: candidates that differ by less than this share of the request's own service count as equal and take turns
TIE_SHARE: Final = 0.05
#: makes a named tuple in a third of the time that its own constructor takes
_new: Final[Any] = tuple.__new__


@mypyc_attr(allow_interpreted_subclasses=True)
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

    @property
    def parts(self) -> dict[str, dict[str, float]]:
        """Of each recorded candidate what its milliseconds are made of, where the router went by parts."""
        return {}


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
    """Of each candidate (predicted work in flight there plus this request's own service and what its prompt delays those that decode there,
    the service alone), milliseconds.

    What is in flight is the fleet's own account where it has one; of an instance that only tells counts or a load, the request's
    service times the count, or by processor sharing load / (1 - load). Data-parallel ranks work side by side and share it.
    """
    predictor = view.predictor
    services: list[float]
    if isinstance(predictor, LatencyPredictor):  # one call for all; the protocol asks for one instance at a time
        services = predictor.services_ms(request, candidates)
        delays = predictor.delays_ms(request, candidates)
    else:
        services = [predictor.service_ms(request, instance) for instance in candidates]
        delays = [0.0] * len(services)
    totals: list[float] = []
    for at, instance in enumerate(candidates):
        service_ms = services[at]
        live: LiveState = instance
        in_flight_ms: float = live.outstanding_ms
        if not in_flight_ms and (live.active_requests or live.current_load):
            in_flight_ms = _unaccounted_ms(live, service_ms)
        if in_flight_ms:
            ranks: float = live.data_parallel_size
            totals.append(service_ms + delays[at] + in_flight_ms / ranks)
        else:
            totals.append(service_ms + delays[at])
    return totals, services


def _unaccounted_ms(instance: LiveState, service_ms: float) -> float:
    free: float = max(0.01, 1.0 - instance.current_load)
    active: float = instance.active_requests
    return service_ms * max(active, (1.0 - free) / free)


def recorded_order(scores_ms: Sequence[float], chosen: int) -> list[int]:
    """Which are recorded: the best MAX_RECORDED by score, ties in the order given, and the chosen one in the last place where it is not
    among them."""
    n = len(scores_ms)
    if n <= MAX_RECORDED:
        return sorted(range(n), key=scores_ms.__getitem__)
    order = heapq.nsmallest(MAX_RECORDED, range(n), key=scores_ms.__getitem__)
    if chosen not in order:
        order[-1] = chosen
    return order


def recorded(candidates: Sequence[ExecutionInstance], scores_ms: Sequence[float], chosen: int) -> tuple[Candidate, ...]:
    """What is kept of a decision, in :func:`recorded_order`."""
    found: list[Candidate] = []
    for k in recorded_order(scores_ms, chosen):
        live: LiveState = candidates[k]
        found.append(_new(Candidate, (live.instance_id, scores_ms[k])))
    return tuple(found)


def sampled(request: RequestMetadata, candidates: Sequence[ExecutionInstance], view: FleetView, rng: Random) -> Sequence[ExecutionInstance]:
    """The candidates to compare: all, or of more than SAMPLE_ABOVE a random SAMPLE_SIZE and up to MAX_HOLDERS that hold the prefix, those
    that hold the most of it first."""
    n = len(candidates)
    if n <= SAMPLE_ABOVE:
        return candidates
    random, chosen = rng.random, set[int]()
    while len(chosen) < SAMPLE_SIZE:
        chosen.add(int(random() * n))
    sample = [candidates[k] for k in sorted(chosen)]
    holders = view.prefixes.holders(request, MAX_HOLDERS)
    if holders:
        eligible, drawn = set(candidates), set(sample)
        sample += [instance for instance in holders if instance in eligible and instance not in drawn]
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


def least_work(request: RequestMetadata, candidates: Sequence[ExecutionInstance], view: FleetView, rng: Random, turn: int) -> Placement:
    """argmin of (predicted ms in flight there + this request's own service there); those that are about equal take turns."""
    there_are = len(candidates)
    seen = candidates if there_are <= SAMPLE_ABOVE else sampled(request, candidates, view, rng)
    scores_ms, services_ms = work_ms(request, seen, view)
    shortest_ms = services_ms[0]
    for service_ms in services_ms:
        shortest_ms = min(shortest_ms, service_ms)
    chosen = least(scores_ms, TIE_SHARE * shortest_ms, turn)
    return ScoredPlacement(seen, scores_ms, chosen, there_are, "least outstanding predicted work", services_ms[chosen])


def least(scores_ms: list[float], tolerance_ms: float, turn: int) -> int:
    """The index of the lowest score; those within ``tolerance_ms`` of it take turns."""
    lowest_ms = scores_ms[0]
    for score_ms in scores_ms:
        lowest_ms = min(lowest_ms, score_ms)
    bound_ms = lowest_ms + tolerance_ms
    ties = [k for k, score_ms in enumerate(scores_ms) if score_ms <= bound_ms]
    return ties[turn % len(ties)]
