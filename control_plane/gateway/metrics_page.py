"""What ``/metrics`` shows of a manager: joins its recorder, queue, fleet and events to the Prometheus exporter."""

from __future__ import annotations

from control_plane.manager import ControlPlaneManager
from control_plane.observability.loop_lag import LoopLag
from control_plane.observability.prometheus import PrometheusExporter, Readings


def make_exporter(manager: ControlPlaneManager, loop_lag: LoopLag | None = None) -> PrometheusExporter:
    """Its ``render`` is what :class:`~control_plane.gateway.Gateway` takes as ``metrics``."""

    def read() -> Readings:
        return Readings(
            instances=manager.fleet.instances(),
            queued_requests=manager.queued_requests,
            queued_bytes=manager.queue.bytes,
            body_memory_bytes=manager.body_memory.held_bytes,
            body_memory_max_bytes=manager.body_memory.max_bytes,
            running_requests=len(manager.running_requests),
            scheduling_policy=manager.scheduling_policy.name,
            routing_strategy=manager.router.name,
            calibration=manager.predictor.calibration,
            prefix=manager.get_prefix_report(),
        )

    return PrometheusExporter(manager.metrics, read, manager.clock, events=manager.events, loop_lag=loop_lag)
