"""The comparison: every arm at every rate with every seed on the same arrivals, over all cores, taken up again where it was left."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any, Final

from control_plane.errors import ControlPlaneError, InvalidRequest
from control_plane.simulator.capacity import capacity_rps
from control_plane.simulator.fleet_spec import FleetSpec, parse_fleet
from control_plane.simulator.generators import workload_of
from control_plane.simulator.loop import Deadlock
from control_plane.simulator.lru_bound import lru_hit_rate
from control_plane.simulator.outcome import RunResult
from control_plane.simulator.resample import at_rate, at_rate_in, piece
from control_plane.simulator.resume import ResultFile
from control_plane.simulator.rows import Curves, Row, curves_of, row_of
from control_plane.simulator.run import simulate
from control_plane.simulator.scenario import Arm, Scenario
from control_plane.simulator.slo import DEFAULT_SLO, parse_slo
from control_plane.simulator.stats import summarise
from control_plane.simulator.workers import each_in, usable_cores
from control_plane.simulator.workload import Workload

#: a run is judged for at least this long, and for this many times the 90th percentile of end-to-end time
LEAST_S: Final = 300.0
LEAST_E2E: Final = 10.0
#: the load goes on after the judged window, so that its last requests do not end on an emptying fleet
TAIL_S: Final = 60.0
MOST_RUNS: Final = 100_000


@dataclass(frozen=True, slots=True)
class Comparison:
    """What is compared, by the names of ``control-plane compare``'s options.

    Attributes:
        rates: shares of the fleet's capacity (``"0.8"``), or requests a second (``"20rps"``).
        seeds: how many; they are 0, 1, 2, ...
        duration_s: virtual seconds that are judged; 0: the least (300, or ten times the p90 end-to-end time if that is more).
        capacity_rps: 0: found by bisection, under ``capacity_arm`` (policy and router).
        more_arms: beside every pair of policy and router.
        half: 1 or 2: only that half of the trace's time; 0: all of it.
    """

    trace: str
    fleet: str
    scheduling_policies: tuple[str, ...] = ("adaptive",)
    routing_strategies: tuple[str, ...] = ("adaptive",)
    rates: tuple[str, ...] = ("0.5", "0.8", "1.0", "1.2")
    seeds: int = 5
    duration_s: float = 0.0
    warmup_s: float = 60.0
    slo: str = DEFAULT_SLO
    engine_scheduling: str = "fcfs"
    prefix_caching: bool = True
    kv_events: bool = False
    delay_ms: float = 1.0
    jitter: float = 0.02
    capacity_rps: float = 0.0
    capacity_arm: tuple[str, str] = ("adaptive", "load_balanced")
    more_arms: tuple[Arm, ...] = ()
    half: int = 0

    def arms(self) -> list[Arm]:
        return [*(Arm(policy, router) for policy in self.scheduling_policies for router in self.routing_strategies), *self.more_arms]


@dataclass(frozen=True, slots=True)
class Job:
    """One run of a comparison; picklable."""

    arm: Arm
    rate: str
    rate_rps: float
    seed: int

    @property
    def key(self) -> str:
        return json.dumps([self.arm.policy_name, self.arm.router_name, self.rate, self.seed])


@dataclass(slots=True)
class Plan:
    """A comparison ready to run: what ``prepare`` found out.

    Attributes:
        base: the fleet under the trace as it is, read once: a trace may be a pipe, and a file may grow meanwhile.
        left_out: requests of the trace that no engine of the fleet can hold.
        duration_s: of what is judged; ``tail_s``: how long requests go on coming after it.
    """

    comparison: Comparison
    base: Scenario
    capacity_rps: float
    left_out: int
    duration_s: float
    tail_s: float
    jobs: list[Job] = field(default_factory=list)


def prepare(
    comparison: Comparison,
    *,
    told: Callable[[str], None] = lambda _: None,
    kept: Path | None = None,
    results: ResultFile | None = None,
) -> Plan:
    """Check everything, find the capacity where a rate needs it, and list the runs. ``kept``: capacities found before are there;
    ``results``: of an interrupted call, whose capacity and duration hold on.

    Raises InvalidRequest, naming the option; ConfigurationError for a policy or router that cannot be made.
    """
    if comparison.seeds < 1:
        raise InvalidRequest(f"seeds {comparison.seeds} is not 1 or more", param="seeds")
    if comparison.duration_s and comparison.duration_s < LEAST_S:
        raise InvalidRequest(
            f"duration_s {comparison.duration_s:g} is below {LEAST_S:g}: shorter runs are mostly their beginning", param="duration_s"
        )
    base, left_out = base_of(comparison)
    begun = results is not None and results.begun
    capacity = results.capacity_rps if results is not None and begun else comparison.capacity_rps
    rates = [_rate(text) for text in comparison.rates]
    twice = [text for place, text in enumerate(comparison.rates) if rates[place] in rates[:place]]
    if twice:
        raise InvalidRequest(f"rate {twice[0]!r} is given twice", param="rates")
    if results is not None and begun and results.inputs != base.digest():
        raise InvalidRequest(
            f"{results.path} was begun when the trace or a profile of the fleet was another; give another file to --resume", param="resume"
        )
    if any(share for _, share in rates) and not capacity:
        capacity = capacity_rps(base, told=told, kept=kept, arm=Arm(*comparison.capacity_arm))
    in_rps = [value * capacity if share else value for value, share in rates]
    duration_s = results.duration_s if results is not None and begun else comparison.duration_s
    if not duration_s:
        duration_s = _long_enough(base, in_rps, LEAST_S, told)
    plan = Plan(comparison, base, capacity, left_out, duration_s, TAIL_S)
    plan.jobs = [
        Job(arm, text, rps, seed)
        for seed in range(comparison.seeds)
        for text, rps in zip(comparison.rates, in_rps, strict=True)
        for arm in comparison.arms()
    ]
    if len(plan.jobs) > MOST_RUNS:
        raise InvalidRequest(f"{len(plan.jobs)} runs are over {MOST_RUNS}; fewer seeds, rates or arms would be right", param="seeds")
    for arm in comparison.arms():  # a wrong name is told now rather than by every worker
        one = _scenario(comparison, base.workload.with_requests(base.workload.requests[:1]), base.fleet, 0)
        _simulated(one, arm, "with one request")
    if results is not None and not begun:
        results.begin(capacity, duration_s, base.digest())
    return plan


def run_all(
    plan: Plan,
    *,
    processes: int | None = None,
    kept: ResultFile | None = None,
    on_row: Callable[[Job, Row], None] = lambda job, row: None,
) -> list[tuple[Job, Row, Curves]]:
    """Run what has not been run, in as many processes as there are cores; the results in the plan's order.

    ``kept``: each result is written there when it is there, and those of an earlier, interrupted call are not run again.
    Raises ControlPlaneError for a run that cannot go on, and what a policy or router of the user's own lets out; what has been run is
    kept then.
    """
    results: dict[str, tuple[Row, Curves]] = dict(kept.results) if kept is not None else {}
    todo = [job for job in plan.jobs if job.key not in results]
    for job in plan.jobs:
        if job.key in results:
            on_row(job, results[job.key][0])
    given = plan.comparison, plan.base.workload, plan.duration_s, plan.tail_s
    for job, row, curves in each_in(processes or usable_cores(), Runner, given, todo):
        results[job.key] = row, curves
        if kept is not None:
            kept.add(job.key, row, curves)
        on_row(job, row)
    return [(job, *results[job.key]) for job in plan.jobs]


def document_of(plan: Plan, results: Sequence[tuple[Job, Row, Curves]], command: Sequence[str]) -> dict[str, Any]:
    """What ``--json`` writes; with ``curves`` (of the first seed) beside it, what the page is made of."""
    rows = [row for _, row, _ in results]
    workload = plan.base.workload
    return {
        "version": 1,
        "command": list(command),
        "simulated": True,
        "workload": {
            "name": rows[0]["trace"],
            "source": workload.source,
            "requests": len(workload.requests),
            "left_out": plan.left_out,
            "own_targets": sum(request.has_targets for request in workload.requests),
            "block_tokens": workload.block_tokens,
        },
        "capacity_rps": plan.capacity_rps,
        "duration_s": plan.duration_s,
        "warmup_s": plan.comparison.warmup_s,
        "slo": plan.comparison.slo,
        "runs": rows,
        "summary": summarise(rows),
        "curves": [
            {
                "scheduling_policy": job.arm.policy_name,
                "routing_strategy": job.arm.router_name,
                "rate": as_told(job.rate),
                "seed": job.seed,
                "curves": curves,
            }
            for job, _, curves in results
            if job.seed == 0
        ],
    }


# ---- one run


def base_of(comparison: Comparison) -> tuple[Scenario, int]:
    """The fleet under the trace as it is, less the requests that no engine of it can hold, and how many these are.

    Raises InvalidRequest, naming the option.
    """
    fleet = parse_fleet(comparison.fleet)
    workload = workload_of(comparison.trace, seed=0)
    if comparison.half:
        half_s = workload.duration_s / 2.0
        workload = piece(workload, (comparison.half - 1) * half_s, half_s)
    fitting = [one for one in workload.requests if one.prompt_tokens + one.output_tokens <= fleet.context_tokens]
    if not fitting:
        raise InvalidRequest(
            f"no request of {comparison.trace!r} fits in the {fleet.context_tokens} tokens that every engine of the fleet holds",
            param="fleet",
        )
    left_out = len(workload.requests) - len(fitting)
    return _scenario(comparison, workload.with_requests(fitting, workload.duration_s), fleet, 0), left_out


def _scenario(comparison: Comparison, workload: Workload, fleet: FleetSpec, seed: int) -> Scenario:
    return Scenario(
        fleet,
        workload,
        parse_slo(comparison.slo),
        seed=seed,
        delay_s=comparison.delay_ms / 1000.0,
        jitter=comparison.jitter,
        engine_scheduling=comparison.engine_scheduling,
        prefix_caching=comparison.prefix_caching,
        kv_events=comparison.kv_events,
    )


def _simulated(scenario: Scenario, arm: Arm, when: str) -> RunResult:
    """Raises ControlPlaneError for a run that cannot go on."""
    try:
        return simulate(scenario, arm)
    except Deadlock as error:
        raise ControlPlaneError(f"{arm.label} {when}: {error}") from None


class Runner:
    """Does one run after another, in whatever process. The arrivals of a rate and seed are kept for the next arm, which has the same."""

    def __init__(self, comparison: Comparison, workload: Workload, duration_s: float, tail_s: float) -> None:
        base = _scenario(comparison, workload, parse_fleet(comparison.fleet), 0)
        self._base = replace(base, warmup_s=comparison.warmup_s, duration_s=duration_s)
        self._length_s = comparison.warmup_s + duration_s + tail_s
        #: the arrivals of a rate and seed, and what one LRU cache finds of them
        self._drawn: tuple[tuple[float, int], Workload, float] | None = None

    def __call__(self, job: Job) -> tuple[Job, Row, Curves]:
        """Raises ControlPlaneError for a run that cannot go on."""
        arrivals, lru_hit_rate = self._arrivals(job.rate_rps, job.seed)
        result = _simulated(replace(self._base, workload=arrivals, seed=job.seed), job.arm, f"at rate {job.rate}, seed {job.seed}")
        row = row_of(result, as_told(job.rate))
        row["lru_hit_rate"] = lru_hit_rate
        return job, row, curves_of(result)

    def _arrivals(self, rate_rps: float, seed: int) -> tuple[Workload, float]:
        """The same for every arm: drawn from the rate and the seed alone."""
        if self._drawn is None or self._drawn[0] != (rate_rps, seed):
            window_s = self._base.warmup_s, self._base.end_s
            drawn = at_rate_in(window_s, self._base.workload, rate_rps, self._length_s, f"arrivals {seed} {rate_rps!r}")
            self._drawn = (rate_rps, seed), drawn, lru_hit_rate(self._base.fleet, drawn, window_s)
        return self._drawn[1:]


def _long_enough(base: Scenario, rates_rps: Sequence[float], duration_s: float, told: Callable[[str], None]) -> float:
    """Ten times the p90 end-to-end time of a fleet that is not overloaded."""
    rate_rps = min(rates_rps)
    workload = at_rate(base.workload, rate_rps, 120.0, Random("pilot"))
    p90_ms = row_of(simulate(replace(base, workload=workload), Arm()), "pilot")["e2e_ms"]["p90"]
    least_s = math.ceil(LEAST_E2E * p90_ms / 1000.0)
    if least_s > duration_s:
        told(f"judged for {least_s} s: ten times the p90 end-to-end time of {p90_ms / 1000.0:.3g} s")
    return max(duration_s, float(least_s))


def as_told(rate: str) -> float | str:
    """A rate as rows have it: a share is a number, ``20rps`` stays as it is."""
    return rate if rate.endswith("rps") else float(rate)


def _rate(text: str) -> tuple[float, bool]:
    """A rate, and whether it is a share of the capacity."""
    share = not text.endswith("rps")
    try:
        value = float(text if share else text[:-3])
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf or (share and value > 100):
        raise InvalidRequest(
            f"rate {text!r} is neither a share of the capacity such as 0.8 nor requests a second such as 20rps", param="rates"
        )
    return value, share
