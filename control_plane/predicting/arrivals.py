"""How fast things have been coming: over ten minutes, of late, and in the last seconds. Bursts go on for a while."""

from __future__ import annotations

import math
from typing import Final

#: time constants, seconds: what is known well, what is usual of late, and what is now
LONG_S: Final = 600.0
SLOW_S: Final = 60.0
FAST_S: Final = 4.0
#: events of late that weigh as much as the long mean: few, or of very different weights, they say little
EVENTS: Final = 20.0
#: a burst of so many events more is drawn half way to none
BURST_EVENTS: Final = 8.0


class Arrivals:
    """Exponentially weighted rates of one stream of events, each with a weight."""

    __slots__ = ("_began_s", "_events", "_fast", "_long", "_now_s", "_slow")

    def __init__(self, now_s: float) -> None:
        self._began_s = now_s
        self._now_s = now_s
        self._fast = self._slow = self._long = self._events = 0.0

    def add(self, now_s: float, weight: float = 1.0) -> None:
        span_s = now_s - self._now_s
        if span_s > 0.0:
            self._now_s = now_s
            self._fast *= math.exp(-span_s / FAST_S)
            slow = math.exp(-span_s / SLOW_S)
            self._slow *= slow
            self._events *= slow
            self._long *= math.exp(-span_s / LONG_S)
        self._fast += weight
        self._slow += weight
        self._long += weight
        self._events += 1.0

    def rate(self, now_s: float) -> float:
        """Weight per second, as is usual of late; the first seconds count as if they had been going on."""
        since_s = max(1.0, now_s - self._began_s)
        idle_s = self._now_s - now_s
        slow = math.exp(idle_s / SLOW_S)
        late = self._slow * slow / (SLOW_S * (1.0 - math.exp(-since_s / SLOW_S)))
        long = self._long * math.exp(idle_s / LONG_S) / (LONG_S * (1.0 - math.exp(-since_s / LONG_S)))
        events = self._events * slow
        return (events * late + EVENTS * long) / (events + EVENTS)

    def burst(self, now_s: float) -> float:
        """The rate of the last seconds over the usual one."""
        usual = self.rate(now_s) * FAST_S * (1.0 - math.exp(-max(1.0, now_s - self._began_s) / FAST_S))
        return (self._fast * math.exp((self._now_s - now_s) / FAST_S) + BURST_EVENTS) / (usual + BURST_EVENTS)
