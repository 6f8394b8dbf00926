"""Requests that share nothing: Poisson, bursts, the course of a day."""

from __future__ import annotations

import math
from collections.abc import Iterable
from random import Random

from control_plane.simulator.generators.draws import check_count, gamma_arrivals, output_length, poisson_arrivals, prompt_length
from control_plane.simulator.workload import TraceRequest


def poisson(
    rng: Random, *, rate_rps: float = 10.0, duration_s: float = 600.0, prompt_tokens: int = 1_000, output_tokens: int = 150
) -> list[TraceRequest]:
    """Many users who know nothing of each other, at a constant rate: the arrivals of queueing theory, and the baseline of the others.

    Gaps are exponential with mean 1/rate. Lengths are lognormal with the medians given, sigma 1.0 for prompts and 0.8 for answers, which
    is about the spread of Azure's conversation trace.
    """
    check_count(rate_rps, duration_s)
    return _filled(rng, poisson_arrivals(rng, rate_rps, duration_s), prompt_tokens, output_tokens)


def gamma(
    rng: Random,
    *,
    rate_rps: float = 10.0,
    duration_s: float = 600.0,
    cv: float = 3.0,
    prompt_tokens: int = 1_000,
    output_tokens: int = 150,
) -> list[TraceRequest]:
    """Bursts: the same mean rate as Poisson's, but requests come in clumps with pauses between them, as behind a client that retries
    or works off lists.

    Gaps are gamma with coefficient of variation ``cv`` (shape 1/cv², 1 is Poisson). Lengths as in ``poisson``.
    """
    check_count(rate_rps, duration_s)
    return _filled(rng, gamma_arrivals(rng, rate_rps, duration_s, cv), prompt_tokens, output_tokens)


def diurnal(
    rng: Random,
    *,
    rate_rps: float = 10.0,
    duration_s: float = 3_600.0,
    period_s: float = 3_600.0,
    depth: float = 0.8,
    prompt_tokens: int = 1_000,
    output_tokens: int = 150,
) -> list[TraceRequest]:
    """A day, shortened to ``period_s``: it begins at night, and half a period later is the peak. For autoscaling and its delays.

    A Poisson process whose rate is ``rate_rps`` · (1 − ``depth`` · cos(2πt/period)): between 1 − depth and 1 + depth times the mean, the
    mean holding over whole periods. Lengths as in ``poisson``.
    """
    check_count(rate_rps, duration_s)
    peak_rps = rate_rps * (1.0 + depth)

    def kept(at_s: float) -> bool:
        return rng.random() * peak_rps < rate_rps * (1.0 - depth * math.cos(2.0 * math.pi * at_s / period_s))

    return _filled(rng, (at_s for at_s in poisson_arrivals(rng, peak_rps, duration_s) if kept(at_s)), prompt_tokens, output_tokens)


def _filled(rng: Random, arrivals: Iterable[float], prompt_tokens: int, output_tokens: int) -> list[TraceRequest]:
    return [TraceRequest(at_s, prompt_length(rng, prompt_tokens), output_length(rng, output_tokens)) for at_s in arrivals]
