"""What differences mean: means over seeds with their 95 % confidence intervals, and paired differences against the first arm."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from control_plane.simulator.rows import Row

#: two-sided 95 % points of Student's t by degrees of freedom (Fisher and Yates); above 30 the normal's
_T: Final = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip

#: what is summed up of rows, by name; ``better``: +1 more is better, -1 less is better, 0 neither
METRICS: Final[Mapping[str, tuple[Callable[[Row], float], int]]] = {
    "goodput_rps": (lambda row: row["goodput_rps"], 1),
    "throughput_rps": (lambda row: row["throughput_rps"], 1),
    "slo_attainment": (lambda row: row["slo_attainment"], 1),
    "ttft_p50_ms": (lambda row: row["ttft_ms"]["p50"], -1),
    "ttft_p99_ms": (lambda row: row["ttft_ms"]["p99"], -1),
    "tpot_p50_ms": (lambda row: row["tpot_ms"]["p50"], -1),
    "tpot_p99_ms": (lambda row: row["tpot_ms"]["p99"], -1),
    "e2e_p50_ms": (lambda row: row["e2e_ms"]["p50"], -1),
    "e2e_p99_ms": (lambda row: row["e2e_ms"]["p99"], -1),
    "prefix_hit_rate": (lambda row: row["prefix_hit_rate"], 1),
    "output_tokens_per_s": (lambda row: row["output_tokens_per_s"], 1),
    "cost_usd": (lambda row: row["cost_usd"], -1),
    "fairness_jain": (lambda row: row["fairness_jain"], 1),
}


def interval(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and its 95 % confidence interval by Student's t; no interval of fewer than two values."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return {"mean": mean, "low": None, "high": None}
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    half = (_T[count - 2] if count - 2 < len(_T) else 1.96) * deviation / math.sqrt(count)
    return {"mean": mean, "low": mean - half, "high": mean + half}


def summarise(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One entry for each arm and rate, in the order of the rows: every metric's interval over seeds, and ``against_first``: of the
    same seeds at the same rate, this arm less the first one (the same arrivals, so what the workload does to both falls out)."""
    groups: dict[tuple[str, str, float | str], dict[int, Row]] = {}
    for row in rows:
        groups.setdefault((row["scheduling_policy"], row["routing_strategy"], row["rate"]), {})[row["seed"]] = row
    first_arm = next(iter(groups), ("", "", 0.0))[:2]
    summary: list[dict[str, Any]] = []
    for (policy, router, rate), by_seed in groups.items():
        entry: dict[str, Any] = {"scheduling_policy": policy, "routing_strategy": router, "rate": rate, "seeds": len(by_seed)}
        for name, (read, _) in METRICS.items():
            entry[name] = interval([read(row) for row in by_seed.values()])
        base = groups.get((*first_arm, rate), {})
        common = [seed for seed in by_seed if seed in base]
        if (policy, router) != first_arm and common:
            entry["against_first"] = {name: _difference(by_seed, base, common, read) for name, (read, _) in METRICS.items()}
        summary.append(entry)
    return summary


def _difference(
    these: Mapping[int, Row], those: Mapping[int, Row], seeds: Sequence[int], read: Callable[[Row], float]
) -> dict[str, float | None]:
    found = interval([read(these[seed]) - read(those[seed]) for seed in seeds])
    return {"difference": found["mean"], "low": found["low"], "high": found["high"]}


def is_clear(difference: Mapping[str, float | None]) -> bool:
    """The interval is there and leaves out 0."""
    low, high = difference["low"], difference["high"]
    return low is not None and high is not None and (low > 0 or high < 0)
