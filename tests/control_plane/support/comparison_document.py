"""Documents as ``compare --json`` writes them: of real runs of a small fleet, and one as large as they come."""

from __future__ import annotations

from functools import cache
from random import Random
from typing import Any

from control_plane.simulator.fleet_spec import parse_fleet
from control_plane.simulator.rows import CDF_POINTS, Curves, Row, curves_of, row_of
from control_plane.simulator.run import simulate
from control_plane.simulator.scenario import Arm, Scenario
from control_plane.simulator.slo import DEFAULT_SLO
from control_plane.simulator.workload import TraceRequest, Workload

ARMS = (("adaptive", "load_balanced"), ("fifo", "round_robin"))
RATES = ("0.5", "1.2")
CAPACITY_RPS = 12.0
FLEET = "3xh100-llama3-8b"
METRICS = (
    "goodput_rps", "throughput_rps", "slo_attainment", "ttft_p50_ms", "ttft_p99_ms", "tpot_p50_ms", "tpot_p99_ms", "e2e_p99_ms",
    "prefix_hit_rate", "output_tokens_per_s", "cost_usd", "fairness_jain",
)  # fmt: skip

#: a name that would break a careless page
HOSTILE = """</script><script>window.taken = 1</script><!--<script><img src=x onerror="window.taken = 2">'\"&amp;&lt;@@DATA@@\u2028"""


@cache
def _small_runs() -> tuple[tuple[Row, Curves], ...]:
    found = []
    for rate in RATES:
        for seed in (0, 1):
            rng = Random(seed)
            at_s, requests = 0.0, []
            while at_s < 40.0:
                at_s += rng.expovariate(float(rate) * CAPACITY_RPS)
                block = rng.randrange(8)
                requests.append(TraceRequest(at_s, rng.randrange(600, 4000), rng.randrange(20, 300), (block,)))
            for policy, router in ARMS:
                scenario = Scenario(parse_fleet(FLEET), Workload("made_up", requests), seed=seed, warmup_s=5, duration_s=30, sample_s=2)
                result = simulate(scenario, Arm(policy, router))
                found.append((row_of(result, rate), curves_of(result)))
    return tuple(found)


def small_document() -> dict[str, Any]:
    """Two arms, two rates, two seeds: as they ran. Each call gives one of its own."""
    runs = [(Row(**row), curves) for row, curves in _small_runs()]
    return document_of([row for row, _ in runs], [curves for _, curves in runs])


def hostile_document() -> dict[str, Any]:
    """The small one; every name that a user may give is HOSTILE."""
    document = small_document()
    for line in [*document["runs"], *document["summary"], *document["curves"]]:
        if line["scheduling_policy"] == "adaptive":
            line["scheduling_policy"] = line["routing_strategy"] = HOSTILE
    for run in document["runs"]:
        run["trace"] = run["fleet"] = HOSTILE
        run["slo_attainment_by_class"] = {HOSTILE: 0.5, "__proto__": 0.25}
    for line in document["curves"]:
        named = {"instances": [HOSTILE] * 3, "by_class": {HOSTILE: [1, 2, 3], "__proto__": [1, 1, 1]}}
        line["curves"] = dict(line["curves"], placement={**line["curves"]["placement"], **named})
    document["workload"] = {"name": HOSTILE, "source": HOSTILE, "requests": 1, "block_tokens": 1}
    document["command"] = ["compare", HOSTILE]
    document["slo"] = HOSTILE
    return document


def document_of(rows: list[Row], curves: list[Curves]) -> dict[str, Any]:
    """The document around these runs; its intervals reach from the least to the most of the seeds, enough for a page to draw."""
    names = ("scheduling_policy", "routing_strategy", "rate")
    groups: dict[tuple[str, ...], list[dict[str, float]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(figures_of(row))  # type: ignore[literal-required]
    firsts: dict[str, list[dict[str, float]]] = {}
    summary = []
    for key, figures in groups.items():
        first = firsts.setdefault(key[2], figures)
        line: dict[str, Any] = dict(zip(names, key, strict=True)) | {"seeds": len(figures)}
        for metric in METRICS:
            values = [one[metric] for one in figures]
            line[metric] = {"mean": sum(values) / len(values), "low": min(values), "high": max(values)}
        if figures is not first:
            gaps = {metric: [one[metric] - other[metric] for one, other in zip(figures, first, strict=True)] for metric in METRICS}
            line["against_first"] = {name: {"difference": sum(of) / len(of), "low": min(of), "high": max(of)} for name, of in gaps.items()}
        summary.append(line)
    return {
        "version": 1,
        "command": ["control-plane", "compare", "--trace", "made up", "--fleet", FLEET, "--html", "my page.html"],
        "runs": rows,
        "capacity_rps": CAPACITY_RPS,
        "slo": DEFAULT_SLO,
        "workload": {"name": "made_up", "source": "a generator", "requests": 480, "block_tokens": 512},
        "summary": summary,
        "curves": [{**{name: row[name] for name in (*names, "seed")}, "curves": of} for row, of in zip(rows, curves, strict=True)],  # type: ignore[literal-required]
    }


def figures_of(row: Row) -> dict[str, float]:
    """The metrics of a summary, of one run."""
    times = {f"{name}_{share}_ms": row[f"{name}_ms"][share] for name in ("ttft", "tpot", "e2e") for share in ("p50", "p99")}  # type: ignore[literal-required]
    return {metric: times[metric] if metric in times else row[metric] for metric in METRICS}  # type: ignore[literal-required]


def large_document(instances: int = 1_000, samples: int = 200, arms: int = 8, rates: int = 4) -> dict[str, Any]:
    """As many instances, samples, arms and rates as one would ever look at; the figures are made up."""
    rng = Random(7)
    pattern, _ = _small_runs()[0]
    curves, rows = [], []
    shared = _crowd(rng, instances, samples)  # making one takes a second, and nobody looks at these
    for rate in range(1, rates + 1):
        for arm in range(arms):
            placement = dict(shared["placement"], requests=[rng.randrange(50, 150) for _ in range(instances)])
            curves.append(Curves(window_s=shared["window_s"], cdf=shared["cdf"], timeline=shared["timeline"], placement=placement))
            rows.append(Row(**{**pattern, "scheduling_policy": "adaptive", "routing_strategy": f"router_{arm}", "rate": f"0.{rate}"}))  # type: ignore[typeddict-item]
    return document_of(rows, curves)


def _crowd(rng: Random, instances: int, samples: int) -> Curves:
    def moments(most: int) -> list[list[int]]:
        return [[rng.randrange(most) for _ in range(samples)] for _ in range(instances)]

    def counts(most: int) -> list[int]:
        return [rng.randrange(most) for _ in range(instances)]

    return Curves(
        window_s=[5.0, 5.0 * samples - 10.0],
        cdf={name: [10.0 * 1.05**point for point in range(len(CDF_POINTS))] for name in ("ttft", "tpot", "e2e")},
        timeline={
            "at_s": [5.0 * moment for moment in range(samples)],
            "queued": [rng.randrange(500) for _ in range(samples)],
            "running": moments(256),
            "waiting": moments(40),
            "kv_usage": [[rng.random() for _ in range(samples)] for _ in range(instances)],
        },
        placement={
            "instances": [f"e{number:03d}" for number in range(instances)],
            "requests": counts(150), "prompt_tokens": [300_000 + count for count in counts(100_000)], "cached_tokens": counts(200_000),
            "output_tokens": counts(90_000), "by_class": {"batch": counts(40), "interactive": counts(110)},
        },
    )  # fmt: skip
