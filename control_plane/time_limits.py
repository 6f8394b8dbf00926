"""Limits that no event announces: how long a request may wait in the queue, and for any usable instance at all."""

from __future__ import annotations

from collections.abc import Callable

from control_plane.errors import ControlPlaneError, ModelNotFound, NoInstanceAvailable, RequestTimeout
from control_plane.fleet import Fleet
from control_plane.job import Job, LaneKey
from control_plane.queue import RequestQueue


class QueueTimeLimits:
    """Looked at once a tick. ``fail(job, error)`` ends what has waited too long.

    Args:
        queue_timeout_s: longest wait in the queue.
        no_instance_timeout_s: longest wait while no instance can serve the request's lane.
    """

    def __init__(
        self,
        queue: RequestQueue,
        fleet: Fleet,
        fail: Callable[[Job, ControlPlaneError], None],
        *,
        queue_timeout_s: float,
        no_instance_timeout_s: float,
    ) -> None:
        self._queue = queue
        self._fleet = fleet
        self._fail = fail
        self._queue_timeout_s = queue_timeout_s
        self._no_instance_timeout_s = no_instance_timeout_s
        self._unserved_since_s: dict[LaneKey, float] = {}

    def check(self, now_s: float) -> None:
        for job in self._queue.waiting_since(now_s - self._queue_timeout_s):
            self._fail(job, RequestTimeout(f"waited {self._queue_timeout_s:g} s in the queue"))
        unserved = {}
        for lane in list(self._queue.lanes):
            if not self._fleet.eligible(lane):
                since_s = unserved[lane] = self._unserved_since_s.get(lane, now_s)
                for job in self._queue.window(lane, self._queue.lane_length(lane)):
                    if now_s - max(since_s, job.arrival_s) >= self._no_instance_timeout_s:
                        self._fail(job, self._unserved_error(lane))
        self._unserved_since_s = unserved

    def _unserved_error(self, lane: LaneKey) -> ControlPlaneError:
        if not self._fleet.knows(lane.model) and all(instance.model_name for instance in self._fleet.instances()):
            return ModelNotFound(lane.model, tuple(self._fleet.models()))
        waited = f"{self._no_instance_timeout_s:g} s"
        if not lane.model:
            return NoInstanceAvailable(f"no server has told for {waited} which model it serves")
        failed = f", and it failed before on {', '.join(sorted(lane.avoid))}" if lane.avoid else ""
        return NoInstanceAvailable(f"no instance that can serve `{lane.model}` ({lane.kind}) for {waited}{failed}")
