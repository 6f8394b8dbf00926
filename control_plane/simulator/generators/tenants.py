"""Several tenants: with different deadlines, and one that takes more than its share."""

from __future__ import annotations

from random import Random
from typing import Final, NamedTuple

from control_plane.simulator.generators.draws import check_count, gamma_arrivals, output_length, poisson_arrivals, prompt_length
from control_plane.simulator.workload import TraceRequest


class Tenant(NamedTuple):
    """One tenant of the mix: its part of the requests, how bursty they are, how long, and what it is promised."""

    name: str
    share: float
    cv: float
    prompt_tokens: int
    output_tokens: int
    slo_class: str
    priority: str


#: the mix of :func:`tenants`; shares add up to 1
MIX: Final = (
    Tenant("chat", 0.5, 1.0, 500, 200, "interactive", "high"),
    Tenant("search", 0.3, 1.5, 2_500, 60, "interactive", "normal"),
    Tenant("reports", 0.2, 4.0, 6_000, 700, "batch", "low"),
)


def tenants(rng: Random, *, rate_rps: float = 10.0, duration_s: float = 600.0, batch_share: float = 0.2) -> list[TraceRequest]:
    """Three tenants with different deadlines on one fleet: what an order of the queue is for.

    ``chat`` (Poisson, prompts of 500 and answers of 200 tokens, class interactive, priority high), ``search`` (somewhat bursty, 2,500 and
    60, interactive, normal) and ``reports`` (bursts with cv 4, 6,000 and 700, class batch, priority low). ``batch_share`` of the requests
    are reports, of the rest five eighths chat. Lengths are lognormal around those medians as in ``poisson``.
    """
    check_count(rate_rps, duration_s)
    interactive = sum(one.share for one in MIX if one.slo_class == "interactive")
    found: list[TraceRequest] = []
    for one in MIX:
        share = batch_share if one.slo_class == "batch" else (1.0 - batch_share) * one.share / interactive
        if share > 0.0:
            arrivals = gamma_arrivals(rng, rate_rps * share, duration_s, one.cv)
            found += [_request(rng, at_s, one) for at_s in arrivals]
    found.sort(key=lambda one: one.arrival_s)
    return found


def greedy(
    rng: Random,
    *,
    rate_rps: float = 10.0,
    duration_s: float = 600.0,
    modest: int = 8,
    factor: float = 10.0,
    prompt_tokens: int = 1_000,
    output_tokens: int = 150,
) -> list[TraceRequest]:
    """One tenant takes ten shares: ``modest`` tenants and ``greedy`` send equally much, and in the middle third of the time ``greedy``
    sends ``factor`` times as much. What the others feel of it is a policy's fairness.

    Poisson arrivals; ``rate_rps`` is the rate of all of them outside that third. Lengths are lognormal as in ``poisson``.
    """
    check_count(rate_rps, duration_s)
    each_rps = rate_rps / (modest + 1)
    third_s = duration_s / 3.0
    names = [*(f"modest{number}" for number in range(1, modest + 1)), "greedy"]
    found = [
        _plain(rng, at_s, prompt_tokens, output_tokens, name) for name in names for at_s in poisson_arrivals(rng, each_rps, duration_s)
    ]
    if factor > 1.0:
        more = poisson_arrivals(rng, each_rps * (factor - 1.0), third_s, start_s=third_s)
        found += [_plain(rng, at_s, prompt_tokens, output_tokens, "greedy") for at_s in more]
    found.sort(key=lambda one: one.arrival_s)
    return found


def _request(rng: Random, at_s: float, tenant: Tenant) -> TraceRequest:
    prompt, output = prompt_length(rng, tenant.prompt_tokens), output_length(rng, tenant.output_tokens)
    return TraceRequest(at_s, prompt, output, tenant=tenant.name, slo_class=tenant.slo_class, priority=tenant.priority)


def _plain(rng: Random, at_s: float, prompt_tokens: int, output_tokens: int, tenant: str) -> TraceRequest:
    return TraceRequest(at_s, prompt_length(rng, prompt_tokens), output_length(rng, output_tokens), tenant=tenant)
