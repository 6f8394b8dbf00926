"""Another policy, chosen from what is measured, with hysteresis, and saying why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from control_plane.job import Job
from control_plane.policies.base import SchedulingPolicy
from control_plane.policies.fair_share import FairSharePolicy
from control_plane.policies.priority import PriorityPolicy
from control_plane.policies.slo_aware import SLOAwarePolicy
from control_plane.protocols import FleetView
from control_plane.queue_order import QueueState
from control_plane.types import ExecutionInstance, RequestMetadata


@dataclass(frozen=True, slots=True)
class AdaptiveSettings:
    """A condition begins at its ``enter_*`` and ends at its ``leave_*``; a chosen policy stays at least ``dwell_s``."""

    enter_wait_s: float = 1.0
    leave_wait_s: float = 0.25
    enter_utilisation: float = 0.9
    leave_utilisation: float = 0.7
    enter_deadline_share: float = 0.10
    leave_deadline_share: float = 0.02
    dwell_s: float = 10.0


class AdaptivePolicy(SchedulingPolicy):
    """Orders by one of the others:

    - under load, with deadlines among the waiting or targets missed lately: slo_aware
    - under load, with several priorities and no deadlines: priority
    - under load, with several tenants, one class and no deadlines: fair_share
    - else slo_aware, which without targets is first come first served with a head start for the urgent

    Never cost_optimized, which is asked for by name: what keeps to the cheapest instances leaves the caches and the speed of the others
    unused, and those are paid for all the same.

    Load is a predicted wait or a utilisation above its bound.
    """

    name: str = "adaptive"

    def __init__(self, settings: AdaptiveSettings | None = None) -> None:
        self.settings = settings if settings is not None else AdaptiveSettings()
        ours = (SLOAwarePolicy(), PriorityPolicy(), FairSharePolicy())
        self._policies: dict[str, SchedulingPolicy] = {policy.name: policy for policy in ours}
        self._active = self._policies[SLOAwarePolicy.name]
        self.relegates = self._active.relegates
        self._since_s: float | None = None
        self._loaded = False
        self._deadlines = False

    @property
    def active(self) -> str:
        """The name of the policy that orders now."""
        return self._active.name

    def key(self, request: RequestMetadata, arrival_s: float, view: FleetView) -> float:
        return self._active.key(request, arrival_s, view)

    @property
    def pulls_back(self) -> bool:  # type: ignore[override]
        return self._active.pulls_back

    @property
    def accounts(self) -> bool:  # type: ignore[override]
        return self._active.accounts

    def begin_accounts(self) -> None:
        self._active.begin_accounts()

    def charge(self, job: Job, view: FleetView) -> None:
        self._active.charge(job, view)

    def started(self, job: Job) -> None:
        self._active.started(job)

    def settle(self, job: Job) -> None:
        self._active.settle(job)

    def weigh(self, weights: Mapping[str, float]) -> None:
        self._policies[FairSharePolicy.name].weigh(weights)

    def work_ms(self, request: RequestMetadata, view: FleetView) -> float:
        return self._active.work_ms(request, view)

    def slack_s(self, job: Job, now_s: float, present_wait_s: float) -> float:
        return self._active.slack_s(job, now_s, present_wait_s)

    def narrow(
        self, request: RequestMetadata, candidates: list[ExecutionInstance], view: FleetView, arrival_s: float | None = None
    ) -> list[ExecutionInstance]:
        return self._active.narrow(request, candidates, view, arrival_s)

    @property
    def narrows(self) -> bool:
        """As the active one does, unless a subclass has a ``narrow`` of its own."""
        return self._active.narrows if type(self).narrow is AdaptivePolicy.narrow else super().narrows

    def review(self, state: QueueState) -> str | None:
        """Switches at most once in ``dwell_s``; returns why it did."""
        self._judge(state)
        wanted, why = self._wanted(state)
        if self._since_s is None:
            self._since_s = state.now_s - self.settings.dwell_s
        if wanted == self._active.name or state.now_s - self._since_s < self.settings.dwell_s:
            return None
        before, self._active, self._since_s = self._active.name, self._policies[wanted], state.now_s
        self.relegates = self._active.relegates
        return f"from {before} to {wanted}: {why}"

    def _judge(self, state: QueueState) -> None:
        s = self.settings
        if self._loaded:
            self._loaded = state.predicted_wait_s > s.leave_wait_s or state.utilisation > s.leave_utilisation
        else:
            self._loaded = state.predicted_wait_s >= s.enter_wait_s or state.utilisation >= s.enter_utilisation
        if state.queued:  # an empty queue says nothing about what comes
            bound = s.leave_deadline_share if self._deadlines else s.enter_deadline_share
            self._deadlines = state.deadline_share > bound

    def _wanted(self, state: QueueState) -> tuple[str, str]:
        load = f"predicted wait {state.predicted_wait_s:.2f} s, utilisation {state.utilisation:.2f}"
        if self._loaded:
            if self._deadlines or state.misses_lately:
                share = f"{state.deadline_share:.0%} of {state.queued} waiting have targets, {state.misses_lately} missed lately"
                return SLOAwarePolicy.name, f"{load}; {share}"
            if state.distinct_priorities > 1:
                return PriorityPolicy.name, f"{load}; {state.distinct_priorities} priorities wait and hardly any targets"
            if state.distinct_tenants > 1:
                return FairSharePolicy.name, f"{load}; {state.distinct_tenants} tenants of one class wait and hardly any targets"
            return SLOAwarePolicy.name, f"{load}; one class waits"
        return SLOAwarePolicy.name, f"{load}: no load"
