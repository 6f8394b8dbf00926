"""Tenants share what there is: start-time fair queueing over predicted token cost, with weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from control_plane.errors import InvalidRequest
from control_plane.job import Job
from control_plane.policies.base import SchedulingPolicy
from control_plane.protocols import FleetView
from control_plane.types import RequestMetadata

#: an output token costs so many input tokens (VTC's 1 : 2)
OUTPUT_WEIGHT: Final = 2.0
#: seconds of a key that one input token is: about what one busy GPU computes, so that keys stay near the axis of arrival times
TOKEN_S: Final = 1e-4
#: tenants of a model that are remembered; beyond it those who owe nothing are forgotten
MAX_TENANTS: Final = 10_000
MAX_MODELS: Final = 1024


class _Clock:
    """Virtual time of one model's queue, in seconds of a key."""

    __slots__ = ("finish_s", "latest_s", "open", "virtual_s")

    def __init__(self) -> None:
        #: start tag of the request that started last
        self.virtual_s = 0.0
        #: by tenant: the finish tag of what it asked for last
        self.finish_s: dict[str, float] = {}
        #: the latest of all finish tags
        self.latest_s = 0.0
        #: accepted and not ended
        self.open = 0

    def now_s(self, arrival_s: float) -> float:
        """Nothing is owed once all is done: then it goes on from the latest tag, and with real time."""
        return self.virtual_s if self.open else max(self.virtual_s, self.latest_s, arrival_s)


class FairSharePolicy(SchedulingPolicy):
    """key = start tag S = max(V, F of its tenant), and then F = S + cost / weight of the tenant.

    V is the start tag of what started last, cost the prompt's tokens plus twice those of the answer, as predicted. Tags are given when a
    request is accepted and stay. At its end the difference between predicted and real cost goes on F, so that it counts in the tenant's
    next tag; what was cancelled before it started costs nothing. Over any time in which two tenants both wait, what is started for them,
    each over its weight, differs by no more than the largest request of the one plus that of the other, however many instances there are
    (Goyal, Vin and Cheng, SIGCOMM 96).

    Args:
        weights: by tenant, above 0; 1.0 where none is given.
    """

    name: str = "fair_share"
    accounts = True

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self.weights: Mapping[str, float] = {}
        self.weigh(weights or {})
        self._clocks: dict[str, _Clock] = {}
        #: of what was accepted and has not ended: its tenant, its predicted cost in tokens, whether it has started
        self._charged: dict[Job, tuple[_Clock, str, float]] = {}
        self._started: set[Job] = set()

    def begin_accounts(self) -> None:
        self._clocks.clear()
        self._charged.clear()
        self._started.clear()

    def weigh(self, weights: Mapping[str, float]) -> None:
        for tenant, weight in weights.items():
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0.0 < weight < float("inf"):
                raise InvalidRequest(f"the weight of tenant {tenant!r} is {weight!r}; it must be a number above 0", param="tenant_weights")
        self.weights = dict(weights)

    def cost_tokens(self, request: RequestMetadata, view: FleetView) -> float:
        """Predicted: prompt tokens and OUTPUT_WEIGHT times those of the answer."""
        return view.predictor.input_tokens(request) + OUTPUT_WEIGHT * view.predictor.output_tokens(request)

    def key(self, request: RequestMetadata, arrival_s: float, view: FleetView) -> float:
        clock = self._clocks.get(request.model_name or "")
        if clock is None:
            return arrival_s
        now_s = clock.now_s(arrival_s)
        return max(now_s, clock.finish_s.get(request.tenant, now_s))

    def charge(self, job: Job, view: FleetView) -> None:
        request = job.request
        model, tenant = request.model_name or "", request.tenant
        clock = self._clocks.get(model)
        if clock is None:
            if len(self._clocks) >= MAX_MODELS:
                self._clocks.clear()
            clock = self._clocks[model] = _Clock()
        if not clock.open:
            clock.virtual_s = clock.now_s(job.arrival_s)
            clock.finish_s.clear()
        elif len(clock.finish_s) >= MAX_TENANTS:
            clock.finish_s = {name: finish_s for name, finish_s in clock.finish_s.items() if finish_s > clock.virtual_s}
        clock.open += 1
        cost = self.cost_tokens(request, view)
        self._charged[job] = clock, tenant, cost
        finish_s = clock.finish_s[tenant] = job.key + cost * TOKEN_S / self.weights.get(tenant, 1.0)
        clock.latest_s = max(clock.latest_s, finish_s)

    def started(self, job: Job) -> None:
        charged = self._charged.get(job)
        if charged is not None:
            charged[0].virtual_s = max(charged[0].virtual_s, job.key)
            self._started.add(job)

    def settle(self, job: Job) -> None:
        charged = self._charged.pop(job, None)
        if charged is None:
            return
        clock, tenant, cost = charged
        clock.open -= 1
        real = 0.0
        if job in self._started:
            self._started.discard(job)
            real = job.input_tokens + OUTPUT_WEIGHT * job.output_tokens
        if tenant in clock.finish_s:
            finish_s = clock.finish_s[tenant] + (real - cost) * TOKEN_S / self.weights.get(tenant, 1.0)
            clock.finish_s[tenant] = finish_s
            clock.latest_s = max(clock.latest_s, finish_s)
