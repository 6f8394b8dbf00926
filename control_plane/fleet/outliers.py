"""Which failures of requests take an instance out, and for how long: one small state machine an instance, no I/O."""

from __future__ import annotations

from enum import StrEnum

from control_plane.errors import EngineError, InstanceFailed, OutOfDescriptors
from control_plane.fleet.settings import HealthSettings


class Failure(StrEnum):
    """What kind of failure a request met, as far as its instance is concerned."""

    UNREACHABLE = "unreachable"
    BROKEN = "broken"
    TIMED_OUT = "timed_out"
    ERROR = "error"
    NOT_ITS_FAULT = "not_its_fault"


def classify(error: InstanceFailed) -> Failure:
    """Whose fault a failure is: a 4xx is the caller's (408 and 429 are load), a 5xx, a hang or a lost connection the engine's; that no
    descriptor was left to ask it with is ours."""
    if isinstance(error, EngineError):
        return Failure.ERROR if error.is_engine_fault else Failure.NOT_ITS_FAULT
    if isinstance(error, OutOfDescriptors):
        return Failure.NOT_ITS_FAULT
    if error.timed_out:
        return Failure.TIMED_OUT
    return Failure.BROKEN if error.connected else Failure.UNREACHABLE


class Outliers:
    """Counts one instance's successes and failures and says when it stands out.

    Failures in a row catch an engine that has broken; the rate over two half windows catches one that fails every other request.
    Time limits are counted apart, because they alone must not eject more than half of a model's instances (the fleet sees to that).
    """

    __slots__ = ("_bad", "_good", "_old_bad", "_old_good", "_settings", "_window_s", "broken", "errors", "timeouts")

    def __init__(self, settings: HealthSettings) -> None:
        self._settings = settings
        self.reset()

    def reset(self) -> None:
        """Forget all: it starts again with a clean sheet."""
        self.errors = self.broken = self.timeouts = 0
        self._good = self._bad = self._old_good = self._old_bad = 0
        self._window_s = 0.0

    @property
    def failing(self) -> bool:
        """The last that was heard of it was a failure."""
        return bool(self.errors or self.broken or self.timeouts)

    def success(self, now_s: float) -> None:
        self.errors = self.broken = self.timeouts = 0
        if now_s >= self._window_s:
            self._turn(now_s)
        self._good += 1

    def failure(self, kind: Failure, now_s: float) -> bool:
        """Count one; True when it should be taken out for it. UNREACHABLE and NOT_ITS_FAULT are not counted here."""
        settings = self._settings
        if kind is Failure.TIMED_OUT:
            self.timeouts += 1
            return self.timeouts >= settings.timeouts_to_eject
        if now_s >= self._window_s:
            self._turn(now_s)
        self._bad += 1
        if kind is Failure.BROKEN:
            self.broken += 1
            return self.broken >= settings.broken_to_eject or self._rate_is_high()
        self.errors += 1
        return self.errors >= settings.errors_to_eject or self._rate_is_high()

    def _rate_is_high(self) -> bool:
        bad = self._bad + self._old_bad
        total = bad + self._good + self._old_good
        return total >= self._settings.error_rate_min_requests and bad >= total * self._settings.error_rate_to_eject

    def _turn(self, now_s: float) -> None:
        """Begin a new half window; the last one is remembered unless it ended long ago."""
        half_s = self._settings.error_window_s / 2
        recent = now_s < self._window_s + half_s
        self._old_good, self._old_bad = (self._good, self._bad) if recent else (0, 0)
        self._good = self._bad = 0
        self._window_s = now_s + half_s


def ejection_s(settings: HealthSettings, times: int) -> float:
    """How long the ``times``-th ejection in a row lasts (as Envoy's outlier detection counts it)."""
    return min(settings.ejection_max_s, settings.ejection_s * times)
