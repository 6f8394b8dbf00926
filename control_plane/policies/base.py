"""What a scheduling policy is: an order over the waiting requests, with stated slack.

A policy gives each request a key that does not change while it waits, lower first. Keys are seconds on the axis of arrival times
(arrival, arrival plus an offset, latest start), so a change of policy at run time re-keys the queue sanely and a request that waits
ages by itself. Placing is the router's; ``schedule`` and ``get_next_request`` of the seed are written once, here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from control_plane.admission import affordable, eligible, kind_of, preferred
from control_plane.job import Job
from control_plane.policies.decision import decide
from control_plane.policies.service import ServiceGuide
from control_plane.prediction import LatencyPredictor
from control_plane.protocols import FleetView, Predictor
from control_plane.queue_order import QueueState, relative_slack_s
from control_plane.router.load_balanced import LoadBalanced
from control_plane.types import ExecutionInstance, RequestMetadata, SchedulingDecision
from control_plane.view import StaticView

ViewOf = Callable[[Sequence[ExecutionInstance]], FleetView]
PlaceWith = Callable[[RequestMetadata, list[ExecutionInstance], float], SchedulingDecision]


class SchedulingPolicy:
    """First come, first served, unless a subclass says otherwise. A subclass overrides ``key`` (and where it wants ``narrow``,
    ``slack_s``), or the seed's coroutine ``schedule`` alone: then it places each request itself, in order of arrival. One that overrides
    ``get_next_request`` is asked for the next request among all that could start, each time one may start.

    A manager sets ``view_of`` (the view over given instances) and ``place_with`` (its dispatcher's decision), so that ``schedule``
    answers as dispatch would; without them it reads the instances as given and balances load.
    """

    #: as in the table and in decisions; a subclass that sets none is called by its class's name
    name: str = ""
    #: requests whose latest start has passed go behind the others
    relegates: bool = False
    #: what was sent ahead and has shown nothing yet may be taken back for a more urgent request that this policy puts before it
    pulls_back: bool = False
    #: it keeps accounts: it is told of what was accepted, started and ended
    accounts: bool = False
    view_of: ViewOf | None = None
    place_with: PlaceWith | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "name" not in cls.__dict__:
            cls.name = cls.__name__

    # -- the order ---------------------------------------------------------------------------------------------------------------

    def key(self, request: RequestMetadata, arrival_s: float, view: FleetView) -> float:
        """Lower first; fixed while the request waits. ``arrival_s``: monotonic seconds."""
        return arrival_s

    def latest_start_s(self, request: RequestMetadata, arrival_s: float, view: FleetView) -> float:
        """Last moment at which starting is predicted to meet both the deadline and the TTFT target; inf without either."""
        latest_s = float("inf")
        if request.slo_deadline_ms is not None:
            latest_s = arrival_s + (request.slo_deadline_ms - self.guide.service_ms(request, view)) / 1000.0
        if request.ttft_slo_ms is not None:
            latest_s = min(latest_s, arrival_s + (request.ttft_slo_ms - self.guide.prefill_ms(request, view)) / 1000.0)
        return latest_s

    def work_ms(self, request: RequestMetadata, view: FleetView) -> float:
        """Predicted milliseconds of an instance that it takes up; what the queue adds up to see whether all can still start in time."""
        return self.guide.work_ms(request, view)

    def begin_accounts(self) -> None:
        """What waits is ordered anew: forget what was charged before. Where it ``accounts``."""

    def charge(self, job: Job, view: FleetView) -> None:
        """``job``, whose key was asked for just now, was accepted, or waits while this policy begins. Where it ``accounts``."""

    def started(self, job: Job) -> None:
        """It was sent to an engine, for the first time or again. Where it ``accounts``."""

    def settle(self, job: Job) -> None:
        """It ended, however that was. Where it ``accounts``."""

    def weigh(self, weights: Mapping[str, float]) -> None:
        """The tenants' weights; for policies that share between tenants. Raises InvalidRequest for one that is no number above 0."""

    def slack_s(self, job: Job, now_s: float, present_wait_s: float) -> float:
        """Seconds for which the dispatch window may still pass it; 0 or less: no more."""
        return relative_slack_s(job, now_s, present_wait_s)

    def narrow(
        self, request: RequestMetadata, candidates: list[ExecutionInstance], view: FleetView, arrival_s: float | None = None
    ) -> list[ExecutionInstance]:
        """The candidates among which the router may choose; never empty for a non-empty list. ``arrival_s`` None: it arrives now."""
        return candidates

    # -- the seed's calls --------------------------------------------------------------------------------------------------------

    @property
    def places_itself(self) -> bool:
        """True when the subclass brings a ``schedule`` of its own: what that answers is where a request goes."""
        return type(self).schedule is not SchedulingPolicy.schedule

    @property
    def picks_next(self) -> bool:
        """True when the subclass brings a ``get_next_request`` of its own: what that answers starts next."""
        own = self.get_next_request
        return getattr(own, "__func__", own) is not SchedulingPolicy.get_next_request

    @property
    def narrows(self) -> bool:
        """True when the subclass brings a ``narrow`` of its own. Asked when the policy is set, and after each :meth:`review` that
        changed the order."""
        own = self.narrow
        return getattr(own, "__func__", own) is not SchedulingPolicy.narrow

    async def schedule(self, request: RequestMetadata, instances: list[ExecutionInstance]) -> SchedulingDecision:
        """Where ``request`` would go now, of ``instances``, and why. Raises NoInstanceAvailable (none given, none usable),
        ModelNotFound and BudgetExhausted."""
        candidates = eligible(request, instances)
        view = self.view_of(instances) if self.view_of is not None else self._own_view(instances)
        key = self.key(request, view.now_s, view)
        if self.place_with is not None:
            return self.place_with(request, candidates, key)
        candidates = preferred(request, list(affordable(request, candidates, view)), view)
        candidates = self.narrow(request, candidates, view) or candidates
        placement = self._router.place(request, candidates, view)
        return decide(request, placement, view, key=key, policy=self.name, router=LoadBalanced.name).written_out(request.request_id)

    def get_next_request(
        self, pending_queue: Iterable[RequestMetadata], available_instances: Sequence[ExecutionInstance]
    ) -> RequestMetadata | None:
        """The request with the smallest key that a usable instance could serve; None when there is none. Takes nothing out.

        A request without ``arrival_time`` counts as arrived with the one before it; equal keys keep the order given.
        """
        usable = [i for i in available_instances if i.is_usable]
        if not usable:
            return None
        view = self.view_of(usable) if self.view_of is not None else self._own_view(usable)
        best: RequestMetadata | None = None
        best_key, arrival_s = 0.0, 0.0
        for request in pending_queue:
            if request.arrival_time is not None:
                arrival_s = request.arrival_time.timestamp()
            if not _could_serve(request, usable):
                continue
            key = self.key(request, arrival_s, view)
            if best is None or key < best_key:
                best, best_key = request, key
        return best

    def _own_view(self, instances: Sequence[ExecutionInstance]) -> FleetView:
        return StaticView(instances, predictor=self._predictor)

    # cached, not made in __init__: a user's subclass need not call ours
    @cached_property
    def guide(self) -> ServiceGuide:
        """What a request's service will be before it is placed."""
        return ServiceGuide()

    @cached_property
    def _predictor(self) -> Predictor:
        return LatencyPredictor()

    @cached_property
    def _router(self) -> LoadBalanced:
        return LoadBalanced()

    # -- hooks, all optional -----------------------------------------------------------------------------------------------------

    def on_request_completed(self, request: RequestMetadata, info: Any) -> None:
        """A request ended; ``info`` is its ``RequestStatusInfo``."""

    def on_instance_registered(self, instance: ExecutionInstance) -> None:
        """An instance joined the fleet."""

    def review(self, state: QueueState) -> str | None:
        """Look at the queue and change the order if that is due: the reason when it was changed, and then the queue is to be
        re-keyed; None otherwise."""
        return None


def _could_serve(request: RequestMetadata, usable: Sequence[ExecutionInstance]) -> bool:
    model, kind = request.model_name, kind_of(request)
    return any((not model or not i.model_name or i.serves(model)) and i.can_do(kind) for i in usable)
