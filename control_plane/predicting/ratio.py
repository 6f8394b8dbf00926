"""What predictions of one kind have been off by lately."""

from __future__ import annotations

import math
from typing import Final

#: the ratio remembers some 300 requests, begins as if 20 had been as predicted, and is at most this or one over it
RATIO_MEMORY: Final = 300.0
RATIO_PRIOR: Final = 20.0
MOST_RATIO: Final = 3.0
#: what a deviation has to be beyond: so many standard errors (samples of one engine overlap in time), and this in any case
SIGMAS: Final = 4.0
LEAST_OFF: Final = 0.02
LEAST_VARIANCE: Final = 0.02 * 0.02
LEAST_WEIGHT: Final = 4.0


class Ratio:
    """Observed over predicted, as a ratio of means: what the form of a prediction leaves out (who comes later, steps that are not seen)."""

    __slots__ = ("_observed", "_predicted", "_weight", "value")

    def __init__(self) -> None:
        self._observed = self._predicted = self._weight = 0.0
        self.value = 1.0

    def observe(self, predicted: float, observed: float) -> None:
        if predicted <= 0.0 or not -math.inf < observed < math.inf:
            return
        fade = 1.0 - 1.0 / RATIO_MEMORY
        observed = min(10.0 * predicted, max(-10.0 * predicted, observed))
        self._observed = fade * self._observed + observed
        self._predicted = fade * self._predicted + predicted
        self._weight = fade * self._weight + 1.0
        mean = self._predicted / self._weight
        value = (self._observed + RATIO_PRIOR * mean) / (self._predicted + RATIO_PRIOR * mean)
        self.value = min(MOST_RATIO, max(1.0 / MOST_RATIO, value))

    def take(self, other: Ratio) -> None:
        self._observed, self._predicted, self._weight = other._observed, other._predicted, other._weight
        self.value = other.value


class Deviation:
    """Of one among equals: by what factor it is off from what is true of all, as far as its evidence says so.

    The mean of what it was off by, in logarithms or in shares of what was expected, is shrunk to none by how sure it is (positive-part
    shrinkage, James and Stein, 1961): noise leaves equals equal, and what is far beyond its noise counts nearly whole.
    """

    __slots__ = ("_fade", "_variance", "mean", "weight")

    def __init__(self, memory: float) -> None:
        self._fade = 1.0 - 1.0 / memory
        self.mean = self._variance = self.weight = 0.0

    def observe(self, off: float, weight: float = 1.0) -> None:
        self.weight = self._fade * self.weight + weight
        share = weight / self.weight
        was = off - self.mean
        self.mean += share * was
        self._variance += share * (was * (off - self.mean) - self._variance)

    @property
    def earned(self) -> float:
        """The mean as far as it is earned; 0.0 where it may be noise."""
        if self.weight < LEAST_WEIGHT:
            return 0.0
        noise = LEAST_OFF * LEAST_OFF + SIGMAS * SIGMAS * max(LEAST_VARIANCE, self._variance) / self.weight
        square = self.mean * self.mean
        return 0.0 if square <= noise else self.mean * (1.0 - noise / square)

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        return math.sqrt(self._variance / self.weight) if self.weight > 0.0 else 0.0

    def forget(self) -> None:
        self.mean = self._variance = self.weight = 0.0


class OwnRatio:
    """Of one among equals: by what ``factor`` its predictions are off beyond the ratio of all."""

    __slots__ = ("_deviation", "_mean", "factor")

    def __init__(self) -> None:
        self._deviation = Deviation(RATIO_MEMORY)
        self._mean = 0.0
        self.factor = 1.0

    def observe(self, predicted: float, observed: float) -> None:
        """``predicted`` as corrected by the ratio of all."""
        if predicted <= 0.0 or not -math.inf < observed < math.inf:
            return
        deviation = self._deviation
        self._mean += (predicted - self._mean) / min(RATIO_MEMORY, deviation.weight + 1.0)
        deviation.observe(max(-MOST_RATIO, min(MOST_RATIO, (observed - predicted) / self._mean)))
        self.factor = min(MOST_RATIO, max(1.0 / MOST_RATIO, 1.0 + deviation.earned))

    def forget(self) -> None:
        self._deviation.forget()
        self._mean = 0.0
        self.factor = 1.0
