"""What happened, told outwards: counters and quantiles, Prometheus text, an event log."""

from control_plane.observability.events import Event, EventLog
from control_plane.observability.metrics import MetricsRecorder

__all__ = ["Event", "EventLog", "MetricsRecorder"]
