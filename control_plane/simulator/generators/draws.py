"""What generators are made of: lengths and times drawn from a seed, arrivals, and block ids."""

from __future__ import annotations

import math
from collections.abc import Iterator
from random import Random
from typing import Final

from control_plane.errors import InvalidRequest

#: tokens of a block of a generated workload: a shared beginning ends somewhere, and what lies in the block with its end counts as not
#: shared, so blocks are smaller than those of the published traces; a multiple of the engines' usual 16
BLOCK_TOKENS: Final = 64
#: no prompt or answer is longer
MAX_PROMPT_TOKENS: Final = 120_000
MAX_OUTPUT_TOKENS: Final = 8_000
MAX_REQUESTS: Final = 20_000_000
#: spreads (sigma of the logarithm) as the published traces have them, roughly: p90 of a prompt is 3.6 times its median, of an answer 2.8
PROMPT_SIGMA: Final = 1.0
OUTPUT_SIGMA: Final = 0.8


def lognormal(rng: Random, median: float, sigma: float, most: float = math.inf) -> float:
    """Around ``median``; e to the ``sigma`` times it is one standard deviation up."""
    return min(most, median * math.exp(rng.gauss(0.0, sigma)))


def prompt_length(rng: Random, median_tokens: float) -> int:
    return max(1, round(lognormal(rng, median_tokens, PROMPT_SIGMA, MAX_PROMPT_TOKENS)))


def output_length(rng: Random, median_tokens: float) -> int:
    return max(1, round(lognormal(rng, median_tokens, OUTPUT_SIGMA, MAX_OUTPUT_TOKENS)))


def geometric(rng: Random, mean: float) -> int:
    """How many turns: 1 or more, ``mean`` on average, each further one as likely as the one before."""
    if mean <= 1.0:
        return 1
    return 1 + int(math.log(1.0 - rng.random()) / math.log(1.0 - 1.0 / mean))


def poisson_arrivals(rng: Random, rate_rps: float, duration_s: float, start_s: float = 0.0) -> Iterator[float]:
    """Independent of each other: gaps are exponential."""
    now_s = start_s + rng.expovariate(rate_rps)
    while now_s < start_s + duration_s:
        yield now_s
        now_s += rng.expovariate(rate_rps)


def gamma_arrivals(rng: Random, rate_rps: float, duration_s: float, cv: float) -> Iterator[float]:
    """Gaps are gamma with coefficient of variation ``cv``: 1 is Poisson, above they come in bursts, below evenly."""
    shape = 1.0 / (cv * cv)
    scale_s = 1.0 / (rate_rps * shape)
    now_s = rng.gammavariate(shape, scale_s)
    while now_s < duration_s:
        yield now_s
        now_s += rng.gammavariate(shape, scale_s)


def check_count(rate_rps: float, duration_s: float) -> None:
    """Raises InvalidRequest where more requests are asked for than fit in memory, or none."""
    count = rate_rps * duration_s
    if count > MAX_REQUESTS:
        raise InvalidRequest(f"{rate_rps:g} requests/s for {duration_s:g} s are {count:,.0f}; at most {MAX_REQUESTS:,}", param="trace")
    if count < 1:
        raise InvalidRequest(f"{rate_rps:g} requests/s for {duration_s:g} s are less than one request", param="trace")


class BlockIds:
    """Hands out ids that nobody else has."""

    __slots__ = ("_next",)

    def __init__(self) -> None:
        self._next = 0

    def shared(self, tokens: int) -> tuple[int, ...]:
        """Those of a beginning that many requests have: its whole blocks."""
        return self._take(tokens // BLOCK_TOKENS)

    def extended(self, ids: tuple[int, ...], tokens: int) -> tuple[int, ...]:
        """``ids`` and as many new ones as ``tokens`` from the beginning on need. A block keeps its id while it fills up."""
        return ids + self._take(-(-tokens // BLOCK_TOKENS) - len(ids))

    def _take(self, count: int) -> tuple[int, ...]:
        if count <= 0:
            return ()
        first = self._next
        self._next += count
        return tuple(range(first, self._next))
