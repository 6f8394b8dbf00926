"""How right predictions are: predicted against observed, at the middle and at the high end.

Of each quantity the last MEMORY or so requests weigh: P50 and P90 of what was predicted and of what came, of the error of a single
request, pinball loss, and how often the predicted P90 was not exceeded (0.9 is right).
"""

from __future__ import annotations

from typing import Final

from control_plane.predicting.sketch import LogSketch

MEMORY: Final = 2000.0
#: the quantities, in the order of :attr:`Calibration.of`
QUANTITIES: Final = ("ttft_ms", "tpot_ms", "output_tokens", "cost_usd")
_LEAST: Final[list[float]] = [0.1, 0.01, 1.0, 1e-9]
_OCTAVES: Final[list[int]] = [26, 24, 18, 40]


class Calibration:
    """One quantity. Errors are shares of what was observed."""

    __slots__ = (
        "_fade",
        "_mean_observed",
        "_mean_predicted",
        "_weight",
        "covered",
        "errors",
        "observed",
        "pinball_p50",
        "pinball_p90",
        "predicted",
        "ratios",
    )

    def __init__(self, least: float, octaves: int) -> None:
        self.predicted = LogSketch(least, octaves, MEMORY)
        self.observed = LogSketch(least, octaves, MEMORY)
        self.errors = LogSketch(0.001, 16, MEMORY)
        #: observed over predicted, whose P90 makes a P90 of a prediction
        self.ratios = LogSketch(0.01, 14, MEMORY)
        self._fade = 1.0 - 1.0 / MEMORY
        self._weight = self._mean_predicted = self._mean_observed = 0.0
        self.pinball_p50 = self.pinball_p90 = 0.0
        self.covered = 0.0

    @property
    def count(self) -> int:
        return self.observed.count

    def observe(self, predicted: float, p90: float, observed: float) -> None:
        """``predicted`` (its middle) and ``p90`` were said, ``observed`` came."""
        if not (predicted > 0.0 and observed > 0.0):
            return
        self.predicted.add(predicted)
        self.observed.add(observed)
        self.errors.add(abs(predicted - observed) / observed)
        self.ratios.add(observed / predicted)
        self._weight = self._fade * self._weight + 1.0
        share = 1.0 / self._weight
        self._mean_predicted += share * (predicted - self._mean_predicted)
        self._mean_observed += share * (observed - self._mean_observed)
        self.pinball_p50 += share * (pinball(0.5, predicted, observed) - self.pinball_p50)
        self.pinball_p90 += share * (pinball(0.9, p90, observed) - self.pinball_p90)
        self.covered += share * ((1.0 if observed <= p90 else 0.0) - self.covered)

    @property
    def mean_error(self) -> float:
        """Mean predicted over mean observed, less 1; 0.0 of nothing."""
        return self._mean_predicted / self._mean_observed - 1.0 if self._mean_observed > 0.0 else 0.0

    def high(self, predicted: float) -> float:
        """A value that nine of ten stay below where ``predicted`` is what is expected."""
        return predicted * (self.ratios.quantile(0.9) if self.ratios.count >= 24 else 2.0)


def pinball(q: float, predicted: float, observed: float) -> float:
    """Quantile loss (Koenker and Bassett, 1978), in the unit of the quantity: least where ``predicted`` is the ``q``-quantile."""
    off = observed - predicted
    return q * off if off >= 0.0 else (q - 1.0) * off


def calibrations() -> dict[str, Calibration]:
    """One for each of QUANTITIES."""
    return {name: Calibration(least, octaves) for name, least, octaves in zip(QUANTITIES, _LEAST, _OCTAVES, strict=True)}
