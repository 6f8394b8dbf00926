"""A clairvoyant to compare with: a control plane that knows how long every answer will be.

Every request says as its ``max_tokens`` how long its answer gets, and the predictor takes that for certain. What is predicted of a request
(its service, when its batch has room again, what waits) is then right as far as lengths go; what is to arrive no planner of ours asks for.
"""

from __future__ import annotations

from typing import Final

from control_plane.predicting.lengths import LENGTH_SAMPLES, LengthClass, Lengths
from control_plane.prediction import LatencyPredictor

MAX_KNOWN: Final = 100_000


class KnownLengths(Lengths):
    """Answers are as long as their limits. Those without one are predicted as always."""

    def __init__(self) -> None:
        super().__init__()
        self._known: dict[int, LengthClass] = {}

    def of(self, model: str, tenant: str, prompt_tokens: int, limit: int | None) -> LengthClass:
        if limit is None:
            return super().of(model, tenant, prompt_tokens, limit)
        found = self._known.get(limit)
        if found is None:
            if len(self._known) >= MAX_KNOWN:
                self._known.clear()
            found = self._known[limit] = _always(limit)
        return found


def _always(tokens: int) -> LengthClass:
    """Answers that all have ``tokens``."""
    found = LengthClass()
    for _ in range(LENGTH_SAMPLES):
        found.observe(float(tokens))
    # a sketch's quantiles are right to some per cent only
    found.mean = found.p50 = found.p90 = float(tokens)
    return found


def know_lengths(predictor: LatencyPredictor) -> None:
    """From now on ``predictor`` takes limits for lengths."""
    predictor.sizes.lengths = KnownLengths()
