"""How fast requests have been coming, of late and in the last seconds: bursts go on for a while, and what comes next is what disturbs."""

from __future__ import annotations

import math
from typing import Final

#: time constants, seconds: what is usual, and what is now
SLOW_S: Final = 60.0
FAST_S: Final = 4.0


class Arrivals:
    """Exponentially weighted rates of one stream of events."""

    __slots__ = ("_began_s", "_fast", "_now_s", "_slow")

    def __init__(self, now_s: float) -> None:
        self._began_s = now_s
        self._now_s = now_s
        self._fast = self._slow = 0.0

    def add(self, now_s: float, weight: float = 1.0) -> None:
        span_s = now_s - self._now_s
        if span_s > 0.0:
            self._now_s = now_s
            self._fast *= math.exp(-span_s / FAST_S)
            self._slow *= math.exp(-span_s / SLOW_S)
        self._fast += weight
        self._slow += weight

    def rate(self, now_s: float) -> float:
        """Per second, as is usual lately; the first seconds count as if they had been going on."""
        seen_s = SLOW_S * (1.0 - math.exp(-max(1.0, now_s - self._began_s) / SLOW_S))
        return self._slow * math.exp((self._now_s - now_s) / SLOW_S) / seen_s

    def burst(self, now_s: float) -> float:
        """The rate of the last seconds over the usual one, drawn towards 1 by an event's worth of doubt."""
        usual = self.rate(now_s) * FAST_S * (1.0 - math.exp(-max(1.0, now_s - self._began_s) / FAST_S))
        return (self._fast * math.exp((self._now_s - now_s) / FAST_S) + 1.0) / (usual + 1.0)
