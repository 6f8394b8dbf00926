"""Urgent classes first, and nobody waits for ever."""

from __future__ import annotations

from collections.abc import Mapping

from control_plane.errors import InvalidRequest
from control_plane.job import Job
from control_plane.policies.base import SchedulingPolicy
from control_plane.protocols import FleetView
from control_plane.queue_order import relative_slack_s
from control_plane.types import RequestMetadata, RequestPriority

#: seconds by which a class stands behind an arrival of the same moment that is CRITICAL; all below the queue's own time limit
DEFAULT_OFFSETS_S: Mapping[RequestPriority, float] = {
    RequestPriority.CRITICAL: 0.0,
    RequestPriority.HIGH: 30.0,
    RequestPriority.NORMAL: 120.0,
    RequestPriority.LOW: 300.0,
    RequestPriority.BACKGROUND: 540.0,
}
#: how patient a class is in the dispatch window, as a multiple of its lane's present wait
PATIENCE = (0.25, 0.5, 1.0, 2.0, 4.0)


class PriorityPolicy(SchedulingPolicy):
    """key = arrival + offset of its class.

    That is ageing without a timer: a request passes those of more urgent classes that arrive later than the difference of the
    offsets, so nothing starves: a NORMAL request is passed by CRITICAL ones for at most 120 seconds.
    """

    name: str = "priority"
    pulls_back = True

    def __init__(self, offsets_s: Mapping[RequestPriority, float] | None = None) -> None:
        given = {RequestPriority.parse(name): float(offset_s) for name, offset_s in (offsets_s or {}).items()}
        merged = {**DEFAULT_OFFSETS_S, **given}
        self.offsets_s = tuple(merged[priority] for priority in RequestPriority)
        if not all(0.0 <= offset_s < float("inf") for offset_s in self.offsets_s):
            raise InvalidRequest(f"offsets_s {dict(given)} must be finite numbers of seconds, 0 or more", param="offsets_s")
        if list(self.offsets_s) != sorted(self.offsets_s):
            raise InvalidRequest(f"offsets_s {merged} must not fall from critical to background", param="offsets_s")

    def key(self, request: RequestMetadata, arrival_s: float, view: FleetView) -> float:
        return arrival_s + self.offsets_s[request.priority]

    def slack_s(self, job: Job, now_s: float, present_wait_s: float) -> float:
        return relative_slack_s(job, now_s, present_wait_s, PATIENCE[job.request.priority])
