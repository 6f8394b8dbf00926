"""What the queue asks of a policy and tells it, and the choice within the dispatch window: pure."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

from control_plane.errors import ConfigurationError, ControlPlaneError
from control_plane.job import Job
from control_plane.protocols import FleetView
from control_plane.types import ExecutionInstance, RequestMetadata


class QueueOrder(Protocol):
    """The part of a scheduling policy that the queue needs."""

    @property
    def accounts(self) -> bool: ...
    def begin_accounts(self) -> None: ...
    def charge(self, job: Job, view: FleetView) -> None: ...
    def key(self, request: RequestMetadata, arrival_s: float, view: FleetView) -> float: ...
    def latest_start_s(self, request: RequestMetadata, arrival_s: float, view: FleetView) -> float: ...
    def slack_s(self, job: Job, now_s: float, present_wait_s: float) -> float: ...
    def work_ms(self, request: RequestMetadata, view: FleetView) -> float: ...


@dataclass(frozen=True, slots=True)
class QueueState:
    """What an adaptive policy looks at. Shares are in [0, 1]. ``predicted_wait_s``: here, and then at the instance where it is shortest.
    ``utilisation``: of the usable instances, the greater of their load and their saturation, on average."""

    now_s: float
    queued: int = 0
    oldest_wait_s: float = 0.0
    deadline_share: float = 0.0
    distinct_priorities: int = 0
    distinct_tenants: int = 0
    predicted_wait_s: float = 0.0
    utilisation: float = 0.0
    misses_lately: int = 0


def set_key(job: Job, policy: QueueOrder, view: FleetView) -> None:
    """Give a job the policy's key and its latest start, before it is pushed. Raises ConfigurationError for a key that is no number."""
    job.key, job.latest_start_s = _ordered_by(job, policy, view)


def _ordered_by(job: Job, policy: QueueOrder, view: FleetView) -> tuple[float, float]:
    """(key, latest start) by a policy, which may be the user's own."""
    try:
        key = float(policy.key(job.request, job.arrival_s, view))
        latest_start_s = float(policy.latest_start_s(job.request, job.arrival_s, view))
    except ControlPlaneError:
        raise
    except Exception as error:
        message = f"the scheduling policy failed at the key of request {job.request_id}: {error!r}"
        raise ConfigurationError(message, param="scheduling_policy") from error
    if key != key:
        raise ConfigurationError(f"the policy's key of request {job.request_id} is not a number", param="scheduling_policy")
    return key, latest_start_s


def all_ordered_by(jobs: list[Job], policy: QueueOrder, view: FleetView) -> list[tuple[Job, float, float]]:
    """Each job with its key and latest start. Where keys depend on those given before, they are given in the order of acceptance."""
    if not policy.accounts:
        return [(job, *_ordered_by(job, policy, view)) for job in jobs]
    policy.begin_accounts()
    fresh = []
    for job in sorted(jobs, key=lambda job: job.seq):
        key, latest_start_s = _ordered_by(job, policy, view)
        before, job.key = job.key, key
        try:
            policy.charge(job, view)
        finally:
            job.key = before
        fresh.append((job, key, latest_start_s))
    return fresh


def relative_slack_s(job: Job, now_s: float, present_wait_s: float, patience: float = 1.0) -> float:
    """How long a job may still be passed: until its latest start, without one until it has waited ``1 + patience`` times the wait
    that its lane's requests have at present, so the bound grows and shrinks with the queue."""
    if job.latest_start_s < math.inf:
        return job.latest_start_s - now_s
    return job.arrival_s + (1.0 + patience) * present_wait_s - now_s


def best_of(jobs: list[Job], wait_s: float, policy: QueueOrder, instance: ExecutionInstance, view: FleetView) -> Job | None:
    best: Job | None = None
    best_gain_ms = -math.inf
    now_s = view.now_s
    # sum over those before of 1 / slack: passing all of them with d ms of work costs d * d times this
    pressure_per_ms = 0.0
    for job in jobs:
        gain_ms = _gain_ms(job.request, instance, view, pressure_per_ms)
        if gain_ms > best_gain_ms:
            best, best_gain_ms = job, gain_ms
        slack_s = policy.slack_s(job, now_s, wait_s)
        if slack_s <= 0.0:
            break
        pressure_per_ms += 1.0 / (1000.0 * slack_s)
    return best


def _gain_ms(request: RequestMetadata, instance: ExecutionInstance, view: FleetView, pressure_per_ms: float) -> float:
    cached = view.prefixes.cached_tokens(request, instance)
    if not cached:
        return 0.0 if pressure_per_ms == 0.0 else -math.inf
    predictor = view.predictor
    tokens = predictor.input_tokens(request)
    work_ms = predictor.prefill_ms(instance, max(0, tokens - cached))
    saved_ms = predictor.prefill_ms(instance, tokens) - work_ms
    work_ms += predictor.output_tokens(request) * predictor.tpot_ms(instance) / (instance.active_requests + 1)
    return saved_ms - work_ms * work_ms * pressure_per_ms
