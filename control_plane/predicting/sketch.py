"""A distribution that forgets: counts in buckets that grow by a quarter of an octave, old values fading as new ones come."""

from __future__ import annotations

import math
from typing import Final

#: buckets an octave: the borders are 19 % apart, and within a bucket values count as evenly spread
PER_OCTAVE: Final = 4
#: weights grow by each value instead of all fading; beyond this all are scaled back
_HEAVY: Final = 1e12


class LogSketch:
    """Weighted quantiles of values from ``least`` on, over ``octaves`` doublings; smaller and larger ones count at the ends.

    ``memory`` values: a value's weight has fallen to 1/e after so many others. O(1) to add; a quantile looks at every bucket once.
    """

    __slots__ = ("_buckets", "_fade", "_least", "_total", "_weight", "count")

    def __init__(self, least: float, octaves: int, memory: float) -> None:
        self._least = least
        self._buckets: list[float] = [0.0] * (octaves * PER_OCTAVE + 1)
        self._fade = 1.0 + 1.0 / memory
        self._weight = 1.0
        self._total = 0.0
        #: values added so far, none of them forgotten
        self.count = 0

    def add(self, value: float) -> None:
        buckets = self._buckets
        at = 0
        if value > self._least:
            at = int(math.log2(value / self._least) * PER_OCTAVE) + 1
            if at >= len(buckets):
                at = len(buckets) - 1
        weight = self._weight
        buckets[at] += weight
        self._total += weight
        self.count += 1
        weight *= self._fade
        if weight > _HEAVY:
            scale = 1.0 / weight
            for k in range(len(buckets)):
                buckets[k] *= scale
            self._total *= scale
            weight = 1.0
        self._weight = weight

    def quantile(self, q: float) -> float:
        """The value below which a share ``q`` of the weight lies; 0.0 of nothing."""
        total = self._total
        if total <= 0.0:
            return 0.0
        wanted = q * total
        below = 0.0
        buckets = self._buckets
        for at in range(len(buckets)):
            weight = buckets[at]
            if weight > 0.0 and below + weight >= wanted:
                return self._inside(at, (wanted - below) / weight)
            below += weight
        return self._inside(len(buckets) - 1, 1.0)

    def share_below(self, value: float) -> float:
        """The share of the weight at or below ``value``; 0.0 of nothing."""
        total = self._total
        if total <= 0.0 or value < self._least:
            return 0.0
        place = math.log2(value / self._least) * PER_OCTAVE + 1.0
        at = int(place)
        buckets = self._buckets
        below = 0.0
        for k in range(min(at, len(buckets))):
            below += buckets[k]
        if at < len(buckets):
            low, high = self._border(at), self._border(at + 1)
            below += buckets[at] * (value - low) / (high - low)
        return min(1.0, below / total)

    def _border(self, at: int) -> float:
        """Where a bucket begins (but the first)."""
        return self._least * math.pow(2.0, (at - 1.0) / PER_OCTAVE)

    def _inside(self, at: int, share: float) -> float:
        if at == 0:
            return self._least
        low, high = self._border(at), self._border(at + 1)
        return low + min(1.0, max(0.0, share)) * (high - low)
