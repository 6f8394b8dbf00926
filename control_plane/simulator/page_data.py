"""What the page of a comparison draws: the document, thinned out where it is larger than anybody can see."""

from __future__ import annotations

import math
import shlex
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Final

from control_plane.errors import InvalidRequest
from control_plane.simulator.rows import CDF_POINTS, jain
from control_plane.simulator.slo import SloClass, parse_slo

#: of a heat map: instances and moments at most, and numbers in those of all runs together (about 3 bytes each)
HEAT_ROWS: Final = 48
HEAT_MOMENTS: Final = 120
HEAT_NUMBERS: Final = 600_000
#: what a crowd of runs leaves of one heat map at least
HEAT_ROWS_LEAST, HEAT_MOMENTS_LEAST = 12, 40
#: bars of one arm's placement, and numbers in those of all runs
BARS: Final = 128
BAR_NUMBERS: Final = 250_000
BARS_LEAST: Final = 24
#: runs that are listed one by one
RUNS_LISTED: Final = 2_000

ArmKey = tuple[str, str]
Document = Mapping[str, Any]


def page_data(document: Document) -> dict[str, Any]:
    """The document as the page reads it: arms and rates by number, curves thinned out, sentences that say how (``thinned``)."""
    arms, rates = _arms(document), _rates(document)
    runs = document.get("runs", [])
    curves = _curves_by_place(document, arms, rates)
    timelines, rule_of_timelines = _timelines(curves)
    placements, rule_of_placements = _placements(curves)
    rule_of_runs = [f"The first {RUNS_LISTED:,} of {len(runs):,} runs are listed."] if len(runs) > RUNS_LISTED else []
    return {
        "simulated": document.get("simulated", True),
        "confidence": document.get("confidence", 0.95),
        "command": shlex.join(document.get("command", [])),
        "workload": document.get("workload", {}),
        "fleet": _distinct(runs, "fleet"),
        "trace": _distinct(runs, "trace"),
        "capacity_rps": document.get("capacity_rps"),
        "slo": document.get("slo", ""),
        "classes": [_class(one) for one in _classes(document.get("slo", ""))],
        "arms": [" + ".join(arm) for arm in arms],
        "rates": [{"label": label, "rps": rps} for label, rps in rates.items()],
        "summary": [{**line, **_place(line, arms, rates)} for line in document.get("summary", [])],
        "runs": [{**run, **_place(run, arms, rates)} for run in runs[:RUNS_LISTED]],
        "outcomes": _outcomes(runs, arms, rates),
        "cdfs": [{**_numbered(place), **_cdf(found)} for place, found in curves.items()],
        "timelines": timelines,
        "placements": placements,
        "thinned": {"timeline": rule_of_timelines, "placement": rule_of_placements, "runs": rule_of_runs},
    }


def evenly(count: int, kept: int) -> list[int]:
    """``kept`` of the numbers below ``count``, evenly spaced, first and last among them; all of them where that is no more."""
    if count <= kept:
        return list(range(count))
    return [round(place * (count - 1) / (kept - 1)) for place in range(kept)] if kept > 1 else [0]


def peaks(values: Sequence[float], width: int) -> list[float]:
    """The largest of every ``width`` neighbours: a queue that was long for a moment stays visible."""
    return [max(values[at : at + width]) for at in range(0, len(values), width)] if width > 1 else list(values)


# ---- which arms, which rates


def _arms(document: Document) -> list[ArmKey]:
    """In the order of their first appearance: the first is what the others are compared with."""
    lines = [*document.get("summary", []), *document.get("runs", [])]
    return list(dict.fromkeys((str(line["scheduling_policy"]), str(line["routing_strategy"])) for line in lines))


def _rates(document: Document) -> dict[str, float]:
    """Requests a second that each rate asks for, lowest first."""
    offered: dict[str, list[float]] = defaultdict(list)
    for line in [*document.get("summary", []), *document.get("runs", [])]:
        offered[str(line["rate"])] += [line["rate_rps"]] if "rate_rps" in line else []
    found = {rate: _rps(rate, document.get("capacity_rps"), given) for rate, given in offered.items()}
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _rps(rate: str, capacity_rps: float | None, offered: Sequence[float]) -> float:
    try:
        if rate.endswith("rps"):
            return float(rate.removesuffix("rps"))
        if capacity_rps:
            return float(rate) * capacity_rps
    except ValueError:
        pass  # not a rate as compare writes them: what was offered tells as much
    return math.fsum(offered) / len(offered) if offered else 0.0


def _place(line: Mapping[str, Any], arms: list[ArmKey], rates: Mapping[str, float]) -> dict[str, int]:
    arm = (str(line["scheduling_policy"]), str(line["routing_strategy"]))
    return {"arm": arms.index(arm), "rate": list(rates).index(str(line["rate"]))}


def _numbered(place: tuple[int, int]) -> dict[str, int]:
    return {"arm": place[0], "rate": place[1]}


def _distinct(runs: Sequence[Mapping[str, Any]], name: str) -> str:
    return ", ".join(dict.fromkeys(str(run[name]) for run in runs))


def _classes(slo: str) -> list[SloClass]:
    """None where the text is not one of ours: the page shows the text as well."""
    try:
        return list(parse_slo(slo).by_name.values())
    except InvalidRequest:
        return []


def _class(one: SloClass) -> dict[str, Any]:
    return {
        "name": one.name,
        "ttft_ms": one.ttft_ms,
        "tpot_ms": one.tpot_ms,
        "e2e_ms": one.e2e_ms,
        "share": one.share,
        "priority": one.priority.name.lower(),
    }


def _outcomes(runs: Sequence[Mapping[str, Any]], arms: list[ArmKey], rates: Mapping[str, float]) -> list[dict[str, Any]]:
    """By arm and rate, over its seeds: what became of the requests, and each class's attainment (mean, least, most)."""
    by_place: dict[tuple[int, int], list[Mapping[str, Any]]] = defaultdict(list)
    for run in runs:
        place = _place(run, arms, rates)
        by_place[place["arm"], place["rate"]].append(run)
    found = []
    for place_of, group in by_place.items():
        by_class: dict[str, list[float]] = defaultdict(list)
        for run in group:
            for name, share in run["slo_attainment_by_class"].items():
                by_class[name].append(share)
        counts = {name: sum(run[name] for run in group) for name in ("requests", "completed", "failed", "rejected")}
        attainment = {name: [math.fsum(of) / len(of), min(of), max(of)] for name, of in by_class.items()}
        found.append({**_numbered(place_of), **counts, "attainment_by_class": attainment})
    return found


# ---- curves


def _curves_by_place(
    document: Document, arms: list[ArmKey], rates: Mapping[str, float]
) -> dict[tuple[int, int], list[tuple[int, Mapping[str, Any]]]]:
    """Seed and curves of each run, by numbers of arm and rate; lowest seed first."""
    found: dict[tuple[int, int], list[tuple[int, Mapping[str, Any]]]] = defaultdict(list)
    for line in document.get("curves", []):
        place = _place(line, arms, rates)
        found[place["arm"], place["rate"]].append((line["seed"], line["curves"]))
    for runs in found.values():
        runs.sort(key=lambda run: run[0])
    return dict(sorted(found.items()))


def _cdf(runs: Sequence[tuple[int, Mapping[str, Any]]]) -> dict[str, Any]:
    """By time: the mean over seeds of each quantile, and the least and most of them."""
    found: dict[str, Any] = {"seeds": len(runs)}
    for name in runs[0][1]["cdf"]:
        of = [curves["cdf"][name] for _, curves in runs if any(curves["cdf"][name])]
        points = [[one[point] for one in of] for point in range(len(CDF_POINTS))] if of else []
        found[name] = {"mean": [_short(math.fsum(one) / len(one)) for one in points]}
        if len(of) > 1:
            found[name] |= {"low": [_short(min(one)) for one in points], "high": [_short(max(one)) for one in points]}
    return found


Curved = Mapping[tuple[int, int], Sequence[tuple[int, Mapping[str, Any]]]]


def _timelines(curves: Curved) -> tuple[list[dict[str, Any]], list[str]]:
    """Of the lowest seed of each arm and rate, and the rule by which they were thinned out."""
    firsts = {place: runs[0] for place, runs in curves.items()}
    lengths = [len(of["timeline"]["at_s"]) for _, of in firsts.values()]
    instances = [len(of["placement"]["instances"]) for _, of in firsts.values()]
    if not firsts:
        return [], []
    rows, moments = _heat_size(len(firsts), max(instances), max(lengths))
    width = math.ceil(max(lengths) / moments)
    found = [{**_numbered(place), "seed": seed, **_timeline(of, rows, width)} for place, (seed, of) in firsts.items()]
    rules = []
    if width > 1:
        rules.append(f"Each moment stands for {width} samples and shows the largest of each value.")
    if max(instances) > rows:
        told = f"{rows} of {max(instances):,} instances are shown, evenly spaced in the order of their mean load"
        rules.append(f"{told}: the busiest of all on top, the idlest at the foot.")
    return found, rules


def _heat_size(runs: int, instances: int, samples: int) -> tuple[int, int]:
    rows, moments = min(HEAT_ROWS, instances), min(HEAT_MOMENTS, samples)
    while runs * rows * moments * 3 > HEAT_NUMBERS and (moments > HEAT_MOMENTS_LEAST or rows > HEAT_ROWS_LEAST):
        if moments > HEAT_MOMENTS_LEAST:
            moments = max(HEAT_MOMENTS_LEAST, moments * 3 // 4)
        else:
            rows = max(HEAT_ROWS_LEAST, rows * 3 // 4)
    return max(rows, 1), max(moments, 1)


def _timeline(curves: Mapping[str, Any], rows: int, width: int) -> dict[str, Any]:
    timeline, names = curves["timeline"], curves["placement"]["instances"]
    running, waiting, kv_usage = timeline["running"], timeline["waiting"], timeline["kv_usage"]
    order = list(range(len(names)))
    if len(order) > rows:
        order.sort(key=lambda place: -sum(running[place]) - sum(waiting[place]))
        order = [order[place] for place in evenly(len(order), rows)]
    return {
        "window_s": curves["window_s"],
        "at_s": [_short(at) for at in timeline["at_s"][::width]],
        "queued": peaks(timeline["queued"], width),
        "running_total": peaks([sum(moment) for moment in zip(*running, strict=True)], width),
        "waiting_total": peaks([sum(moment) for moment in zip(*waiting, strict=True)], width),
        "instances": [names[place] for place in order],
        "running": [peaks(running[place], width) for place in order],
        "waiting": [peaks(waiting[place], width) for place in order],
        "kv_percent": [[round(100 * used) for used in peaks(kv_usage[place], width)] for place in order],
    }


def _placements(curves: Curved) -> tuple[list[dict[str, Any]], list[str]]:
    """Bars of the lowest seed of each arm and rate, the imbalance over all seeds and instances, and the rule of thinning."""
    most = max((len(of["placement"]["instances"]) for runs in curves.values() for _, of in runs), default=0)
    fields = max((4 + len(of["placement"]["by_class"]) for runs in curves.values() for _, of in runs), default=0)
    bars = max(BARS_LEAST, min(BARS, BAR_NUMBERS // max(1, len(curves) * fields)))
    found = []
    for place, runs in curves.items():
        seed, first = runs[0]
        uneven = [_imbalance(of["placement"]) for _, of in runs]
        means = {name: _short(math.fsum(one[name] for one in uneven) / len(uneven)) for name in uneven[0]}
        found.append({**_numbered(place), "seed": seed, "imbalance": means, **_bars(first["placement"], bars)})
    rules = [f"{bars} of {most:,} instances of each arm have a bar, evenly spaced from the one with most requests to the one with fewest."]
    return found, rules if most > bars else []


def _bars(placement: Mapping[str, Any], bars: int) -> dict[str, Any]:
    requests = placement["requests"]
    counted = ("requests", "prompt_tokens", "cached_tokens", "output_tokens")
    order = list(range(len(requests)))
    if len(order) > bars:
        order.sort(key=lambda place: -requests[place])
        order = [order[place] for place in evenly(len(order), bars)]

    def kept(values: Sequence[Any]) -> list[Any]:
        return [values[place] for place in order]

    return {
        "instances": kept(placement["instances"]),
        **{name: kept(placement[name]) for name in counted},
        "means": {name: _short(sum(placement[name]) / max(1, len(requests))) for name in counted},
        "by_class": {name: kept(values) for name, values in placement["by_class"].items()},
    }


def _imbalance(placement: Mapping[str, Any]) -> dict[str, float]:
    """How unevenly one run placed: busiest instance over the mean, by requests and by prompt tokens computed, and how many got none."""
    requests = placement["requests"]
    prompt, cached = placement["prompt_tokens"], placement["cached_tokens"]
    computed = [given - found for given, found in zip(prompt, cached, strict=True)]
    return {
        "requests": _busiest(requests),
        "computed": _busiest(computed),
        "jain": jain(computed),
        "cached_share": sum(cached) / sum(prompt) if sum(prompt) else 0.0,
        "idle": requests.count(0),
    }


def _busiest(values: Sequence[float]) -> float:
    total = sum(values)
    return max(values) * len(values) / total if total > 0 else 0.0


def _short(value: float) -> float:
    """Four significant digits: more than a screen shows."""
    return float(f"{value:.4g}")
