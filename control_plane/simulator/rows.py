"""What is reported of a run: one row of figures, and the curves behind them."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, NotRequired, TypedDict

from control_plane.simulator.outcome import BEGIN_S, COMPLETED, FAILED, REJECTED, RunResult

#: points of a distribution that are kept, as shares
CDF_POINTS = tuple(point / 100 for point in range(101))


class Quantiles(TypedDict):
    p50: float
    p90: float
    p99: float


class Row(TypedDict):
    """One run of one arm, as ``compare --json`` writes it. Times in milliseconds of virtual time, rates per virtual second of the
    judged window; shares 0 to 1.

    ``rate`` is as asked for (a share of the capacity, or a text such as ``20rps``), ``rate_rps`` what was offered. ``requests``
    arrived in the window; ``rejected`` were refused (429, 503),
    ``failed`` broke otherwise. ``goodput_rps``: those that met all targets of their class; ``slo_attainment``: their share of all.
    ``fairness_jain``: Jain's index (1984) over tenants of the share of each one's requests that met their targets; 1.0 with one tenant.
    ``cost_usd``: list price of the whole fleet for the window. ``wall_s``: what the run took. ``lru_hit_rate``: what one LRU cache of the
    fleet's total size finds of the same arrivals (:mod:`~control_plane.simulator.lru_bound`); in the rows of a comparison.
    """

    trace: str
    fleet: str
    scheduling_policy: str
    routing_strategy: str
    rate: float | str
    rate_rps: float
    seed: int
    requests: int
    completed: int
    failed: int
    rejected: int
    goodput_rps: float
    throughput_rps: float
    slo_attainment: float
    slo_attainment_by_class: dict[str, float]
    ttft_ms: Quantiles
    tpot_ms: Quantiles
    e2e_ms: Quantiles
    prefix_hit_rate: float
    lru_hit_rate: NotRequired[float]
    output_tokens_per_s: float
    cost_usd: float
    fairness_jain: float
    wall_s: float
    event_digest: str


class Curves(TypedDict):
    """What the page draws of one run. ``window_s``: beginning and end of what is judged, on the axis of ``timeline``. ``cdf``: 101
    quantiles (0 % to 100 %) of each time, in ms. ``timeline``: the fleet at moments, ``running`` and ``waiting`` one list an instance.
    ``placement``: by instance, of the judged requests."""

    window_s: list[float]
    cdf: dict[str, list[float]]
    timeline: dict[str, Any]
    placement: dict[str, Any]


def row_of(result: RunResult, rate: float | str) -> Row:
    """The figures of a run at the rate that was asked for as ``rate``."""
    out = result.outcomes
    begin_s, end_s = result.window_s
    length_s = result.window_length_s or 1.0
    counts = {COMPLETED: 0, FAILED: 0, REJECTED: 0}
    met_by_class: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    met_by_tenant: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    requests = met_all = 0
    for row in result.judged():
        state = out.state[row]
        requests += 1
        if state in counts:
            counts[state] += 1
        met = state == COMPLETED and result.classes[row].met(out.ttft_ms(row), out.tpot_ms(row), out.e2e_ms(row))
        met_all += met
        for book, name in ((met_by_class, result.classes[row].name), (met_by_tenant, result.tenants[row])):
            book[name][0] += met
            book[name][1] += 1
    ended = [row for row in range(len(out)) if out.state[row] == COMPLETED and begin_s <= out.end_s[row] < end_s]
    times = _times(result)
    return Row(
        trace=result.trace,
        fleet=result.fleet,
        scheduling_policy=result.scheduling_policy,
        routing_strategy=result.routing_strategy,
        rate=rate,
        rate_rps=requests / length_s,
        seed=result.seed,
        requests=requests,
        completed=counts[COMPLETED],
        failed=counts[FAILED],
        rejected=counts[REJECTED],
        goodput_rps=met_all / length_s,
        throughput_rps=len(ended) / length_s,
        slo_attainment=met_all / requests if requests else 0.0,
        slo_attainment_by_class={name: met / count for name, (met, count) in sorted(met_by_class.items())},
        ttft_ms=_quantiles(times["ttft"]),
        tpot_ms=_quantiles(times["tpot"]),
        e2e_ms=_quantiles(times["e2e"]),
        prefix_hit_rate=result.prefix_hits_tokens / result.prefix_queries_tokens if result.prefix_queries_tokens else 0.0,
        output_tokens_per_s=sum(out.output_tokens[row] for row in ended) / length_s,
        cost_usd=result.price_per_hour_usd * length_s / 3600.0,
        fairness_jain=jain(met / count for met, count in met_by_tenant.values()),
        wall_s=result.wall_s,
        event_digest=result.event_digest,
    )


def curves_of(result: RunResult) -> Curves:
    """What the page draws of a run."""
    out = result.outcomes
    instances = len(result.instance_names)
    placed = {name: [0] * instances for name in ("requests", "prompt_tokens", "cached_tokens", "output_tokens")}
    by_class: dict[str, list[int]] = {name: [0] * instances for name in sorted({one.name for one in result.classes})}
    for row in result.judged():
        where = out.instance[row]
        if where < 0:
            continue
        placed["requests"][where] += 1
        placed["prompt_tokens"][where] += out.prompt_tokens[row]
        placed["cached_tokens"][where] += out.cached_tokens[row]
        placed["output_tokens"][where] += out.output_tokens[row]
        by_class[result.classes[row].name][where] += 1
    samples = result.samples
    return Curves(
        window_s=[at_s - BEGIN_S for at_s in result.window_s],
        cdf={name: [_at(found, share) for share in CDF_POINTS] for name, found in _times(result).items()},
        timeline={
            "at_s": [sample.at_s for sample in samples],
            "queued": [sample.queued for sample in samples],
            "running": [[sample.running[place] for sample in samples] for place in range(instances)],
            "waiting": [[sample.waiting[place] for sample in samples] for place in range(instances)],
            "kv_usage": [[round(sample.kv_usage[place], 4) for sample in samples] for place in range(instances)],
        },
        placement={"instances": list(result.instance_names), **placed, "by_class": by_class},
    )


def jain(shares: Iterable[float]) -> float:
    """Jain's fairness index: (sum x)^2 / (n sum x^2); 1.0 is even, 1/n is one taking all. 1.0 where there is nothing to share."""
    found = list(shares)
    squares = sum(share * share for share in found)
    return sum(found) ** 2 / (len(found) * squares) if squares else 1.0


def _times(result: RunResult) -> dict[str, Sequence[float]]:
    """Sorted milliseconds of the judged requests that completed."""
    out = result.outcomes
    rows = [row for row in result.judged() if out.state[row] == COMPLETED]
    return {
        "ttft": array("d", sorted(out.ttft_ms(row) for row in rows)),
        "tpot": array("d", sorted(out.tpot_ms(row) for row in rows if out.output_tokens[row] > 1)),
        "e2e": array("d", sorted(out.e2e_ms(row) for row in rows)),
    }


def _quantiles(found: Sequence[float]) -> Quantiles:
    return Quantiles(p50=_at(found, 0.5), p90=_at(found, 0.9), p99=_at(found, 0.99))


def _at(found: Sequence[float], share: float) -> float:
    """A quantile by linear interpolation (Hyndman and Fan's type 7), 0.0 of nothing."""
    if not found:
        return 0.0
    place = share * (len(found) - 1)
    low = int(place)
    high = min(low + 1, len(found) - 1)
    return found[low] + (found[high] - found[low]) * (place - low)
