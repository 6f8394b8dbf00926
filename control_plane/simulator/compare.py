"""The comparison: every arm at every rate with every seed on the same arrivals, over all cores, taken up again where it was left."""

from __future__ import annotations

import concurrent.futures
import functools
import json
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from typing import Any, Final

from control_plane.errors import InvalidRequest
from control_plane.simulator.capacity import capacity_rps
from control_plane.simulator.fleet_spec import FleetSpec, parse_fleet
from control_plane.simulator.generators import workload_of
from control_plane.simulator.resample import at_rate
from control_plane.simulator.resume import ResultFile
from control_plane.simulator.rows import Curves, Row, curves_of, row_of
from control_plane.simulator.run import simulate
from control_plane.simulator.scenario import Arm, Scenario
from control_plane.simulator.slo import DEFAULT_SLO, parse_slo
from control_plane.simulator.stats import summarise
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
        capacity_rps: 0: found by bisection.
    """

    trace: str
    fleet: str
    scheduling_policies: tuple[str, ...] = ("adaptive",)
    routing_strategies: tuple[str, ...] = ("load_balanced",)
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

    def arms(self) -> list[Arm]:
        return [Arm(policy, router) for policy in self.scheduling_policies for router in self.routing_strategies]


@dataclass(frozen=True, slots=True)
class Job:
    """One run of a comparison; picklable."""

    arm: Arm
    rate: str
    rate_rps: float
    seed: int

    @property
    def key(self) -> str:
        return json.dumps([self.arm.scheduling_policy, self.arm.routing_strategy, self.rate, self.seed])


@dataclass(slots=True)
class Plan:
    """A comparison ready to run: what ``prepare`` found out.

    Attributes:
        left_out: requests of the trace that no engine of the fleet can hold.
        duration_s: of what is judged; ``tail_s``: how long requests go on coming after it.
    """

    comparison: Comparison
    fleet: FleetSpec
    capacity_rps: float
    left_out: int
    requests: int
    source: str
    block_tokens: int
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
    base, left_out = _base(comparison)
    begun = results is not None and results.begun
    capacity = results.capacity_rps if results is not None and begun else comparison.capacity_rps
    rates = [_rate(text) for text in comparison.rates]
    if any(share for _, share in rates) and not capacity:
        capacity = capacity_rps(base, told=told, kept=kept)
    in_rps = [value * capacity if share else value for value, share in rates]
    duration_s = results.duration_s if results is not None and begun else comparison.duration_s
    if not duration_s:
        duration_s = _long_enough(base, in_rps, LEAST_S, told)
    workload = base.workload
    plan = Plan(
        comparison, base.fleet, capacity, left_out, len(workload.requests), workload.source, workload.block_tokens, duration_s, TAIL_S
    )
    plan.jobs = [
        Job(arm, text, rps, seed)
        for seed in range(comparison.seeds)
        for text, rps in zip(comparison.rates, in_rps, strict=True)
        for arm in comparison.arms()
    ]
    if len(plan.jobs) > MOST_RUNS:
        raise InvalidRequest(f"{len(plan.jobs)} runs are over {MOST_RUNS}; fewer seeds, rates or arms would be right", param="seeds")
    for arm in comparison.arms():  # a wrong name is told now rather than by every worker
        simulate(_scenario(comparison, base.workload.with_requests(base.workload.requests[:1]), base.fleet, 0), arm)
    if results is not None and not begun:
        results.begin(capacity, duration_s)
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
    Raises what a run raises; what has been run is kept then.
    """
    results: dict[str, tuple[Row, Curves]] = dict(kept.results) if kept is not None else {}
    todo = [job for job in plan.jobs if job.key not in results]
    for job in plan.jobs:
        if job.key in results:
            on_row(job, results[job.key][0])
    for job, row, curves in _run(plan, todo, processes or os.cpu_count() or 1):
        results[job.key] = row, curves
        if kept is not None:
            kept.add(job.key, row, curves)
        on_row(job, row)
    return [(job, *results[job.key]) for job in plan.jobs]


def document_of(plan: Plan, results: Sequence[tuple[Job, Row, Curves]], command: Sequence[str]) -> dict[str, Any]:
    """What ``--json`` writes; with ``curves`` (of the first seed) beside it, what the page is made of."""
    rows = [row for _, row, _ in results]
    return {
        "version": 1,
        "command": list(command),
        "simulated": True,
        "workload": {
            "name": rows[0]["trace"],
            "source": plan.source,
            "requests": plan.requests,
            "left_out": plan.left_out,
            "block_tokens": plan.block_tokens,
        },
        "capacity_rps": plan.capacity_rps,
        "duration_s": plan.duration_s,
        "warmup_s": plan.comparison.warmup_s,
        "slo": plan.comparison.slo,
        "runs": rows,
        "summary": summarise(rows),
        "curves": [
            {
                "scheduling_policy": job.arm.scheduling_policy,
                "routing_strategy": job.arm.routing_strategy,
                "rate": as_told(job.rate),
                "seed": job.seed,
                "curves": curves,
            }
            for job, _, curves in results
            if job.seed == 0
        ],
    }


# ---- one run


def _base(comparison: Comparison) -> tuple[Scenario, int]:
    fleet = parse_fleet(comparison.fleet)
    workload = workload_of(comparison.trace, seed=0)
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


@functools.lru_cache(maxsize=1)
def _kept_base(comparison: Comparison) -> Scenario:
    return _base(comparison)[0]


@functools.lru_cache(maxsize=1)
def _arrivals(comparison: Comparison, rate_rps: float, length_s: float, seed: int) -> Workload:
    """The same for every arm: drawn from the rate and the seed alone."""
    return at_rate(_kept_base(comparison).workload, rate_rps, length_s, Random(f"arrivals {seed} {rate_rps!r}"))


def run_job(comparison: Comparison, duration_s: float, tail_s: float, job: Job) -> tuple[Job, Row, Curves]:
    """One run, in whatever process."""
    warmup_s = comparison.warmup_s
    workload = _arrivals(comparison, job.rate_rps, warmup_s + duration_s + tail_s, job.seed)
    scenario = replace(_kept_base(comparison), workload=workload, seed=job.seed, warmup_s=warmup_s, duration_s=duration_s)
    result = simulate(scenario, job.arm)
    return job, row_of(result, as_told(job.rate)), curves_of(result)


def _run(plan: Plan, jobs: Sequence[Job], processes: int) -> Iterator[tuple[Job, Row, Curves]]:
    one = functools.partial(run_job, plan.comparison, plan.duration_s, plan.tail_s)
    if processes == 1 or len(jobs) < 2:
        yield from map(one, jobs)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        min(processes, len(jobs)), mp_context=multiprocessing.get_context("spawn"), initializer=_leave_interrupts_to_the_parent
    )
    with pool:
        try:
            for future in concurrent.futures.as_completed([pool.submit(one, job) for job in jobs]):
                yield future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():  # nobody waits for a run of minutes that nobody wants
                worker.terminate()
            raise


def _leave_interrupts_to_the_parent() -> None:
    """Ctrl-C reaches every process of the terminal; one of them speaks."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


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
