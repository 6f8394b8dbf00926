"""By the latest moment at which starting still meets the deadline."""

from __future__ import annotations

from control_plane.errors import InvalidRequest
from control_plane.policies.base import SchedulingPolicy
from control_plane.protocols import FleetView
from control_plane.types import RequestMetadata, RequestPriority

_CRITICAL = RequestPriority.CRITICAL

DEFAULT_SLACK_S = 30.0
#: more slack than this does not put a request further back, so that a far deadline is no reason to starve; with the class's shift it
#: stays below the queue's own time limit
MAX_SLACK_S = 300.0
#: a request without a target: its slack by class, as a multiple of the default
CLASS_SLACK = (0.1, 1.0 / 3.0, 1.0, 2.0, 4.0)
#: a request with a target: what its class adds to or takes from its slack, as a share of it; of a CRITICAL one all
CLASS_SHIFT = (-1.0, -0.1, 0.0, 0.1, 0.2)
#: and a CRITICAL one goes that far before its arrival: where there is too much, those that start have waited until their own latest
#: start, and it goes before them, and not after them
CRITICAL_LEAD_S = 1.0


class SLOAwarePolicy(SchedulingPolicy):
    """key = latest start = arrival + deadline - predicted service, moved by at most a fifth of the slack for its class; a
    CRITICAL one's key is a second before its arrival.

    A TTFT target counts as a deadline for the start too. A request without a target has ``default_slack_s`` times its class's
    factor, so it ages as all others do; a deadline further off than ``MAX_SLACK_S`` counts as that. Earliest latest start first is
    the order that meets all deadlines when any order does; when none does, the queue's review (``RequestQueue.review``) keeps the
    largest set that still fits and relegates the rest behind it, instead of making all late by and by.
    """

    name: str = "slo_aware"
    relegates = True
    pulls_back = True

    def __init__(self, default_slack_s: float = DEFAULT_SLACK_S) -> None:
        if not 0.0 < default_slack_s < float("inf"):
            raise InvalidRequest(f"default_slack_s {default_slack_s!r} must be a finite number of seconds above 0", param="default_slack_s")
        self.default_slack_s = default_slack_s

    def key(self, request: RequestMetadata, arrival_s: float, view: FleetView) -> float:
        if request.slo_deadline_ms is None and request.ttft_slo_ms is None:
            return arrival_s + self.default_slack_s * CLASS_SLACK[request.priority]
        latest_s = min(self.latest_start_s(request, arrival_s, view), arrival_s + MAX_SLACK_S)
        key = latest_s + CLASS_SHIFT[request.priority] * max(0.0, latest_s - arrival_s)
        return key - CRITICAL_LEAD_S if request.priority is _CRITICAL else key
