"""How often engines are asked how they are, and how much failure takes one out of service."""

from __future__ import annotations

from dataclasses import dataclass, fields

from control_plane.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class HealthSettings:
    """Every interval, limit and threshold of the fleet's health checks.

    Raises:
        ConfigurationError: names a field that is not above zero (``jitter`` may be zero) or a share that is above one.
    """

    #: seconds between probes of a healthy engine
    probe_interval_s: float = 2.0
    #: an engine that does not answer ``/health`` within this time has missed a probe
    probe_timeout_s: float = 2.0
    #: probes missed in a row (timed out, or answered with a 5xx) until it is unhealthy; a refused connection counts at once
    probe_misses: int = 2
    #: seconds between probes of an engine that is down: from the first, growing by ``down_backoff``, up to the second
    down_interval_s: float = 1.0
    down_interval_max_s: float = 10.0
    down_backoff: float = 1.5
    #: an engine that has been down this long (its port closed, its health check failing) will not answer what it still holds: requests
    #: of which nothing has come are tried elsewhere. Until then it may be a server that finishes its work before it ends
    lost_after_s: float = 30.0
    #: share by which each pause is made longer or shorter at random, so that a thousand probes do not come together
    jitter: float = 0.1
    #: scrape ``/metrics`` for load, cache and restarts (``enable_monitoring``)
    monitoring: bool = True
    scrape_interval_s: float = 2.0
    scrape_timeout_s: float = 2.0
    #: seconds between looks at ``/v1/models`` of a healthy engine
    models_interval_s: float = 10.0
    warmup_timeout_s: float = 60.0
    #: 5xx answers in a row until it is ejected
    errors_to_eject: int = 5
    #: connections lost under a request, in a row, until it is ejected
    broken_to_eject: int = 2
    #: requests in a row that met a time limit until it is ejected
    timeouts_to_eject: int = 3
    #: share of failed requests within ``error_window_s``, of at least ``error_rate_min_requests``, that ejects it
    error_rate_to_eject: float = 0.5
    error_rate_min_requests: int = 20
    error_window_s: float = 10.0
    #: an ejection lasts this long times the number of ejections in a row, up to the maximum
    ejection_s: float = 5.0
    ejection_max_s: float = 60.0
    #: requests in flight at most on an engine that is back from an ejection, until one succeeds
    trial_requests: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int | float) or value < 0 or (value == 0 and field.name not in ("jitter", "monitoring")):
                raise ConfigurationError(f"health.{field.name} {value!r} is not above 0", param=f"health.{field.name}")
            if value > 1 and field.name in ("jitter", "error_rate_to_eject"):
                raise ConfigurationError(f"health.{field.name} {value!r} is a share and not above 1", param=f"health.{field.name}")
