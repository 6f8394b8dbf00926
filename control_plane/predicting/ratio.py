"""What predictions of one kind have been off by lately."""

from __future__ import annotations

import math
from typing import Final

#: the ratio remembers some 300 requests, begins as if 20 had been as predicted, and is at most this or one over it
RATIO_FADE: Final = 1.0 - 1.0 / 300.0
RATIO_PRIOR: Final = 20.0
MOST_RATIO: Final = 3.0


class Ratio:
    """Observed over predicted, as a ratio of means: what the form of a prediction leaves out (who comes later, steps that are not seen)."""

    __slots__ = ("_observed", "_predicted", "_weight", "value")

    def __init__(self) -> None:
        self._observed = self._predicted = self._weight = 0.0
        self.value = 1.0

    def observe(self, predicted: float, observed: float) -> None:
        if predicted <= 0.0 or not -math.inf < observed < math.inf:
            return
        observed = min(10.0 * predicted, max(-10.0 * predicted, observed))
        self._observed = RATIO_FADE * self._observed + observed
        self._predicted = RATIO_FADE * self._predicted + predicted
        self._weight = RATIO_FADE * self._weight + 1.0
        mean = self._predicted / self._weight
        value = (self._observed + RATIO_PRIOR * mean) / (self._predicted + RATIO_PRIOR * mean)
        self.value = min(MOST_RATIO, max(1.0 / MOST_RATIO, value))

    def forget(self) -> None:
        self._observed = self._predicted = self._weight = 0.0
        self.value = 1.0
