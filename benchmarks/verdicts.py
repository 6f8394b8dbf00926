"""What the rows of the full comparison say of its goals: paired by seed, with 95 % intervals (Student's t) over the seeds.

A goal is met where the mean meets it; its interval stands beside it. Nothing here runs anything.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from control_plane.simulator.rows import Row
from control_plane.simulator.stats import interval, is_clear

#: arms by name, and of each the row of every seed
Cell = Mapping[str, Mapping[int, Row]]
#: fleet, workload, rate
Key = tuple[str, str, float]

#: of the LRU cache's hit rate, from which on prefixes are shared
SHARED_FROM = 0.01
#: the knee is the highest rate at which so many of the requests meet their targets
KNEE_ATTAINMENT = 0.9
#: routers that are ours: they are not "the second" that the default is to be ahead of
OURS = ("predicted_latency", "adaptive", "prefix_aware", "load_balanced")

LEAD_GOAL = 0.10
ROUND_ROBIN_GOAL = 2.5
OVERLOAD_GOAL = 0.90
HITS_GOAL = 0.92
HITS_WITH_EVENTS_GOAL = 0.97
CLAIRVOYANT_GOAL = 0.95
LEAD_RATES = (0.8, 1.0)
#: goodput at this rate or above is held against its peak
OVERLOAD_RATE = 1.5


@dataclass(frozen=True, slots=True)
class Names:
    """Which arm is which. ``policy`` orders the queue of all but the baseline; the capacity was found under ``capacity_router``;
    ``half`` of each trace was taken. ``fleets``: short names of fleets."""

    default: str
    default_with_events: str
    clairvoyants: tuple[str, ...]
    policy: str
    capacity_router: str
    half: int
    fleets: Mapping[str, str] = field(default_factory=dict)

    def fleet(self, text: str) -> str:
        return self.fleets.get(text, text)

    def bounds_and_variants(self) -> set[str]:
        """Arms that know more than the others: nobody is compared with them but by name."""
        return {*self.clairvoyants, self.default_with_events}


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds and its 95 % interval; None of a single seed."""

    mean: float
    low: float | None
    high: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        found = interval(values)
        assert found["mean"] is not None
        return cls(found["mean"], found["low"], found["high"])

    @property
    def clear(self) -> bool:
        """It leaves out 0."""
        return is_clear({"low": self.low, "high": self.high})


@dataclass(frozen=True, slots=True)
class Finding:
    """One figure that a goal is about. ``other``: the arm that the default is compared with, or ""."""

    key: Key
    value: Estimate
    met: bool
    other: str = ""


@dataclass(slots=True)
class Score:
    """Against one arm: in how many cells the default's goodput is significantly above its own, significantly below it, and neither."""

    ahead: int = 0
    behind: int = 0
    undecided: int = 0


@dataclass(frozen=True, slots=True)
class Verdicts:
    """``behind``: where another arm's goodput is significantly above the default's, by how many requests a second (negative) and as a
    share; ``scores``: by arm."""

    behind: list[tuple[Finding, float]]
    scores: dict[str, Score]
    lead: list[Finding]
    round_robin: list[Finding]
    overload: list[Finding]
    hits: list[Finding]
    hits_with_events: list[Finding]
    clairvoyant: list[Finding]

    @property
    def compared(self) -> int:
        """Pairs of the default and another arm in a cell."""
        return sum(one.ahead + one.behind + one.undecided for one in self.scores.values())


def cells_of(rows: Iterable[Row]) -> dict[Key, dict[str, dict[int, Row]]]:
    """Rows at shares of the capacity, in their order."""
    found: dict[Key, dict[str, dict[int, Row]]] = {}
    for row in rows:
        key = row["fleet"], row["trace"], float(row["rate"])
        found.setdefault(key, {}).setdefault(row["routing_strategy"], {})[row["seed"]] = row
    return found


def verdicts_of(cells: Mapping[Key, Cell], names: Names) -> Verdicts:
    """Of the cells in which the default has run."""
    cells = {key: cell for key, cell in cells.items() if names.default in cell}
    behind, scores = _behind(cells, names)
    return Verdicts(
        behind,
        scores,
        _lead(cells, names),
        _round_robin(cells, names),
        _overload(cells, names),
        _hits(cells, names, names.default, HITS_GOAL),
        _hits(cells, names, names.default_with_events, HITS_WITH_EVENTS_GOAL),
        _clairvoyant(cells, names),
    )


def paired(cell: Cell, arm: str, other: str, figure: Callable[[Row, Row], float]) -> list[float]:
    """``figure`` of both arms' rows, seed by seed."""
    these, those = cell[arm], cell[other]
    return [figure(these[seed], those[seed]) for seed in sorted(these.keys() & those.keys())]


def goodput_difference(row: Row, other: Row) -> float:
    return row["goodput_rps"] - other["goodput_rps"]


def mean_of(rows: Mapping[int, Row], figure: Callable[[Row], float]) -> float:
    return statistics.fmean(figure(row) for row in rows.values())


def goodput(row: Row) -> float:
    return row["goodput_rps"]


def ttft_p90(row: Row) -> float:
    return row["ttft_ms"]["p90"]


def shares_prefixes(cell: Cell) -> bool:
    return any(row.get("lru_hit_rate", 0.0) >= SHARED_FROM for rows in cell.values() for row in rows.values())


def knees(cells: Mapping[Key, Cell], default: str) -> dict[tuple[str, str], float]:
    """By fleet and workload: the highest rate at which at least 90 % of the default's requests met their targets; where there is none,
    the lowest."""
    rates: dict[tuple[str, str], list[tuple[float, bool]]] = defaultdict(list)
    for (fleet, workload, rate), cell in cells.items():
        if default in cell:
            met = mean_of(cell[default], lambda row: row["slo_attainment"]) >= KNEE_ATTAINMENT
            rates[fleet, workload].append((rate, met))
    return {pair: max((rate for rate, met in found if met), default=min(found)[0]) for pair, found in rates.items()}


def best_arms(cells: Mapping[Key, Cell], count: int, default: str, among: Iterable[str]) -> list[str]:
    """The ``count`` arms with the greatest goodput, as a share of the best in the cell, over all cells; the default is always one."""
    shares: dict[str, list[float]] = {name: [] for name in among}
    for cell in cells.values():
        means = {arm: mean_of(rows, goodput) for arm, rows in cell.items() if arm in shares}
        best = max(means.values(), default=0.0)
        for arm, mean in means.items():
            shares[arm].append(mean / best if best else 1.0)
    ranked = sorted((arm for arm in shares if shares[arm]), key=lambda arm: -statistics.fmean(shares[arm]))
    return [default, *(arm for arm in ranked if arm != default)][:count]


# ---- the goals


def _behind(cells: Mapping[Key, Cell], names: Names) -> tuple[list[tuple[Finding, float]], dict[str, Score]]:
    found: list[tuple[Finding, float]] = []
    scores: dict[str, Score] = {}
    for key, cell in cells.items():
        for arm in cell:
            if arm == names.default or arm in names.bounds_and_variants():
                continue
            differences = paired(cell, names.default, arm, goodput_difference)
            if not differences:
                continue
            score = scores.setdefault(arm, Score())
            value = Estimate.of(differences)
            if not value.clear:
                score.undecided += 1
            elif value.mean > 0.0:
                score.ahead += 1
            else:
                score.behind += 1
                found.append((Finding(key, value, False, arm), value.mean / mean_of(cell[arm], goodput)))
    return sorted(found, key=lambda one: one[1]), scores


def _lead(cells: Mapping[Key, Cell], names: Names) -> list[Finding]:
    """By how much the default's TTFT p90 is below that of the best arm that is not ours."""
    found = []
    for key, cell in cells.items():
        others = [arm for arm in cell if arm not in OURS and arm != names.default and arm not in names.bounds_and_variants()]
        if key[2] not in LEAD_RATES or not others or not shares_prefixes(cell):
            continue
        second = min(others, key=lambda arm: mean_of(cell[arm], ttft_p90))
        leads = paired(cell, names.default, second, lambda row, other: 1.0 - ttft_p90(row) / (ttft_p90(other) or math.inf))
        if leads:
            value = Estimate.of(leads)
            found.append(Finding(key, value, value.mean >= LEAD_GOAL, second))
    return found


def _round_robin(cells: Mapping[Key, Cell], names: Names) -> list[Finding]:
    """Times round robin's goodput at the knee, where prefixes are shared."""
    at = knees(cells, names.default)
    found = []
    for key, cell in cells.items():
        if key[2] == at[key[:2]] and "round_robin" in cell and shares_prefixes(cell):
            times = paired(cell, names.default, "round_robin", lambda row, other: _ratio(goodput(row), goodput(other)))
            if times:
                value = Estimate.of(times)
                found.append(Finding(key, value, value.mean >= ROUND_ROBIN_GOAL, "round_robin"))
    return found


def _overload(cells: Mapping[Key, Cell], names: Names) -> list[Finding]:
    """The default's goodput at the highest rate over the greatest at any rate, seed by seed."""
    by_pair: dict[tuple[str, str], dict[float, Mapping[int, Row]]] = defaultdict(dict)
    for (fleet, workload, rate), cell in cells.items():
        by_pair[fleet, workload][rate] = cell[names.default]
    found = []
    for (fleet, workload), by_rate in by_pair.items():
        last = max(by_rate)
        if last < OVERLOAD_RATE:
            continue
        peak = max(by_rate, key=lambda rate: mean_of(by_rate[rate], goodput))
        seeds = sorted(by_rate[last].keys() & by_rate[peak].keys())
        if seeds:
            value = Estimate.of([_ratio(goodput(by_rate[last][seed]), goodput(by_rate[peak][seed])) for seed in seeds])
            found.append(Finding((fleet, workload, last), value, value.mean >= OVERLOAD_GOAL))
    return found


def _hits(cells: Mapping[Key, Cell], names: Names, arm: str, goal: float) -> list[Finding]:
    """Of ``arm`` at rates below the knee, as a share of what the LRU cache finds; where the knee is the lowest rate, there."""
    at = knees(cells, names.default)
    lowest: dict[tuple[str, str], float] = {}
    for fleet, workload, rate in cells:
        lowest[fleet, workload] = min(rate, lowest.get((fleet, workload), rate))
    found = []
    for key, cell in cells.items():
        pair = key[:2]
        if (key[2] < at[pair] or key[2] == lowest[pair]) and arm in cell and shares_prefixes(cell):
            value = Estimate.of([hit_share(row) for row in cell[arm].values()])
            found.append(Finding(key, value, value.mean >= goal))
    return found


def hit_share(row: Row) -> float:
    """The hit rate as a share of the LRU cache's."""
    return _ratio(row["prefix_hit_rate"], row.get("lru_hit_rate", 0.0))


def _clairvoyant(cells: Mapping[Key, Cell], names: Names) -> list[Finding]:
    """The default's goodput as a share of that of the better clairvoyant."""
    found = []
    for key, cell in cells.items():
        there = [arm for arm in names.clairvoyants if arm in cell]
        if not there:
            continue
        best = max(there, key=lambda arm: mean_of(cell[arm], goodput))
        shares = paired(cell, names.default, best, lambda row, other: _ratio(goodput(row), goodput(other)))
        if shares:
            value = Estimate.of(shares)
            found.append(Finding(key, value, value.mean >= CLAIRVOYANT_GOAL, best))
    return found


def _ratio(value: float, of: float) -> float:
    """1.0 of nothing where there is nothing; as much as any goal asks for where something stands against nothing."""
    if of:
        return value / of
    return 1.0 if not value else ROUND_ROBIN_GOAL
