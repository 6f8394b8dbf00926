"""How right the predictor is: what it says of each request as it is placed, against what came of it, on mixed fleets in the simulator.

    python benchmarks/prediction.py [--fleet F] [--workloads azure_conv,...] [--rates 0.5,0.8] [--seconds 300] [--engines skewed] [--json F]
    python benchmarks/prediction.py --fault          # one engine becomes ten times slower, and well again
    python benchmarks/prediction.py --cost           # microseconds of the calls

The predictor sees what it sees in life: its own requests' times, tokens and usage, nothing of the engine model. ``--engines skewed`` makes
the engines' GPUs slower than the data sheets in other proportions for each kind, and takes the instances' profiles away, so that what the
predictor believes at first is the guess from a model's name and a GPU's memory (an A100 passes for an H100): all else it has to find out.
``--engines plain`` leaves both as they are: then the roofline prior is right from the start, as no real one is.

Errors: per minute the mean predicted against the mean observed (beside it what is left to one who knows the true mean, as a minute's
requests are a sample, and the worst minute), and of single requests |predicted / observed - 1|, from the 201st request
on. Lengths: pinball loss of P50 and P90 in tokens, and the share of answers that stayed below the P90 (0.9 is right). With another version
of the package in PYTHONPATH the same is told of that one's predictor.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from control_plane.clock import ManualClock
from control_plane.prediction import LatencyPredictor
from control_plane.protocols import FleetView
from control_plane.router import create_strategy
from control_plane.router.base import RoutingStrategy
from control_plane.router.placement import Placement
from control_plane.simulator.capacity import capacity_rps, default_store
from control_plane.simulator.fleet_spec import FleetSpec, parse_fleet
from control_plane.simulator.generators import workload_of
from control_plane.simulator.outcome import BEGIN_S, COMPLETED
from control_plane.simulator.resample import at_rate
from control_plane.simulator.run import Simulation
from control_plane.simulator.scenario import Arm, Scenario
from control_plane.types import ExecutionInstance, RequestMetadata, Usage

FLEET = "3xh100-llama3.1-8b,3xa100-llama3.1-8b,2xl40s-llama3.1-8b"
WORKLOADS = "azure_conv,azure_code,mooncake_conversation,sessions"
#: what the skewed engines' GPUs reach: compute, bandwidth, seconds of a step beside its work
SKEWED = {"h100": (0.45, 0.75, 3e-3), "a100": (0.60, 0.60, 5e-3), "l40s": (0.50, 0.80, 2e-3)}
WARMUP_REQUESTS = 200
#: whose answers would run on so long after the last arrival is not judged
FALLING_S = 20.0
#: a minute counts that has so many
LEAST_IN_A_MINUTE = 20


@dataclass(slots=True)
class Told:
    """What was said of one request when it was placed."""

    at_s: float
    instance: str
    ttft_ms: float
    tpot_ms: float
    length_p50: float
    length_p90: float
    cached_tokens: int


class Spread:
    """How far what is said of equal instances differs at equal work: the standard deviation over the mean, averaged over kinds and time.

    ``step``: decoding 16 sequences with 1,000 tokens of context each; ``marginal``: one more; ``prompt``: 2,000 tokens beside them."""

    def __init__(self, kinds: Sequence[Sequence[ExecutionInstance]]) -> None:
        self._kinds = [kind for kind in kinds if len(kind) > 1]
        self._seen: dict[str, list[float]] = defaultdict(list)

    def look(self, predictor: Any) -> None:
        for kind in self._kinds:
            steps = [predictor._model(instance).steps for instance in kind]
            step_ms = [one.decode_ms(16.0, 16_000.0) for one in steps]
            more_ms = [one.decode_ms(17.0, 17_000.0) for one in steps]
            self._add("step", step_ms)
            self._add("marginal", [more - less for more, less in zip(more_ms, step_ms, strict=True)])
            self._add("prompt", [one.prefill_ms(2000.0, 2e6, 1.0, 16.0, 16_000.0) for one in steps])

    def _add(self, name: str, values: list[float]) -> None:
        self._seen[name].append(statistics.stdev(values) / statistics.mean(values))

    def found(self) -> dict[str, float]:
        return {name: statistics.mean(seen) for name, seen in self._seen.items()}


@dataclass(slots=True)
class Recorder(RoutingStrategy):
    """Another router, whose placements are written down with what the predictor says of them."""

    inner: RoutingStrategy
    told: dict[int, Told] = field(default_factory=dict)
    spread: Spread | None = None
    name: str = "recorded"

    def place(self, request: RequestMetadata, candidates: Sequence[ExecutionInstance], view: FleetView) -> Placement:
        placement = self.inner.place(request, candidates, view)
        instance, predictor = placement.instance, view.predictor
        known: Any = predictor
        cached = view.prefixes.cached_tokens(request, instance)
        if hasattr(known, "forecast"):
            forecast = known.forecast(request, instance, cached)
            ttft_ms, tpot_ms, cached = forecast.ttft_ms, forecast.tpot_ms, forecast.cached_tokens
            p50 = known.output_tokens_p50(request)
        else:
            uncached = max(1, predictor.input_tokens(request) - cached)
            ttft_ms = predictor.wait_ms(instance) + predictor.prefill_ms(instance, uncached)
            tpot_ms, p50 = predictor.tpot_ms(instance), predictor.output_tokens(request)
        p90 = known.output_tokens_p90(request)
        self.told[int(request.request_id)] = Told(view.now_s, instance.instance_id, ttft_ms, tpot_ms, p50, p90, cached)
        if self.spread is not None and len(self.told) > WARMUP_REQUESTS and len(self.told) % 25 == 0:
            self.spread.look(predictor)
        return placement


def fleet_of(text: str, skewed: bool) -> FleetSpec:
    fleet = parse_fleet(text)
    if not skewed:
        return fleet
    parts = []
    for part in fleet.parts:
        compute, bandwidth, step_s = SKEWED.get(part.profile.gpu.name, (0.5, 0.7, 3e-3))
        profile = replace(part.profile, compute_efficiency=compute, bandwidth_efficiency=bandwidth, step_overhead_s=step_s)
        parts.append(replace(part, profile=profile))
    return replace(fleet, parts=tuple(parts))


def simulation(spec: str, rate: float, options: argparse.Namespace) -> tuple[Simulation, Recorder]:
    skewed, seed = options.engines == "skewed", options.seed
    fleet = fleet_of(options.fleet, skewed)
    base = workload_of(spec, seed=0)
    fitting = [one for one in base.requests if one.prompt_tokens + one.output_tokens <= fleet.context_tokens]
    scenario = Scenario(fleet, base.with_requests(fitting, base.duration_s), seed=seed)
    capacity = capacity_rps(scenario, told=lambda line: print(line, file=sys.stderr), kept=default_store())
    seconds = max(options.seconds, options.requests / (rate * capacity))
    workload = at_rate(scenario.workload, rate * capacity, seconds, Random(f"prediction {seed}"))
    recorder = Recorder(create_strategy(options.router, Random(seed)))
    run = Simulation(replace(scenario, workload=workload), Arm("fifo", recorder))
    if skewed:
        for instance in run.manager.get_instances():
            instance.profile = None  # so that it is guessed
    kinds: dict[str, list[ExecutionInstance]] = defaultdict(list)
    for part, instance in _instances(run):
        kinds[part.profile.gpu.name].append(instance)
    recorder.spread = Spread(list(kinds.values()))
    return run, recorder


def errors(pairs: list[tuple[float, float, float]]) -> dict[str, float]:
    """Of (second, predicted, observed)."""
    minutes: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for at_s, predicted, observed in pairs:
        minutes[int(at_s // 60)].append((predicted, observed))
    if all(len(found) < LEAST_IN_A_MINUTE for found in minutes.values()):
        minutes = {0: [(predicted, observed) for _, predicted, observed in pairs]}
    offs = [
        sum(predicted for predicted, _ in found) / sum(observed for _, observed in found) - 1.0
        for found in minutes.values()
        if len(found) >= LEAST_IN_A_MINUTE
    ]
    # a minute's observed mean is itself a draw: who knows the true mean is off by 0.8 of its deviation on average
    floors = [
        0.8 * statistics.stdev(seen) / len(seen) ** 0.5 / statistics.mean(seen)
        for found in minutes.values()
        if len(seen := [observed for _, observed in found]) >= LEAST_IN_A_MINUTE
    ]
    single = sorted(abs(predicted / observed - 1.0) for _, predicted, observed in pairs if observed > 0.0)
    return {
        "minute_mean": statistics.mean(abs(off) for off in offs),
        "minute_worst": max(offs, key=abs),
        "minute_floor": statistics.mean(floors),
        "p50": single[len(single) // 2],
        "p90": single[int(len(single) * 0.9)],
        "observed_ms": statistics.mean(observed for _, _, observed in pairs),
    }


def judged(run: Simulation, recorder: Recorder) -> dict[str, Any]:
    out = run.outcomes
    ttft: list[tuple[float, float, float]] = []
    tpot: list[tuple[float, float, float]] = []
    by_kind: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
    lengths: list[tuple[Told, int]] = []
    hits: list[float] = []
    gpu_of = {i.instance_id: part.profile.gpu.name for part, i in _instances(run)}
    order = sorted(recorder.told, key=lambda row: recorder.told[row].at_s)
    for row in order[WARMUP_REQUESTS:]:
        told = recorder.told[row]
        if out.state[row] != COMPLETED or not out.first_s[row]:
            continue
        at_s = told.at_s - BEGIN_S
        if at_s > run.scenario.workload.duration_s - FALLING_S:
            break  # while nothing new comes, and sessions go on, the load falls away
        seen = (at_s, told.ttft_ms, (out.first_s[row] - told.at_s) * 1000.0)
        ttft.append(seen)
        by_kind[f"ttft {gpu_of[told.instance]}"].append(seen)
        if out.output_tokens[row] > 1:
            spent = (at_s, told.tpot_ms, out.tpot_ms(row))
            tpot.append(spent)
            by_kind[f"tpot {gpu_of[told.instance]}"].append(spent)
        lengths.append((told, out.output_tokens[row]))
        hits.append(told.cached_tokens - out.cached_tokens[row])
    kinds = {name: errors(found) for name, found in sorted(by_kind.items()) if len(found) >= 100}
    return {
        "requests": len(ttft),
        "ttft": errors(ttft),
        "tpot": errors(tpot),
        "kinds": kinds,
        "pinball_p50": statistics.mean(_pinball(0.5, told.length_p50, came) for told, came in lengths),
        "pinball_p90": statistics.mean(_pinball(0.9, told.length_p90, came) for told, came in lengths),
        "coverage_p90": statistics.mean(came <= told.length_p90 for told, came in lengths),
        "mean_length": statistics.mean(came for _, came in lengths),
        "hit_error_tokens": statistics.mean(abs(off) for off in hits),
    }


def _instances(run: Simulation) -> list[tuple[Any, ExecutionInstance]]:
    parts = [part for part in run.scenario.fleet.parts for _ in range(part.count)]
    return list(zip(parts, run.manager.get_instances(), strict=True))


def _pinball(q: float, predicted: float, observed: float) -> float:
    off = observed - predicted
    return q * off if off >= 0 else (q - 1.0) * off


def compare(options: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    print(f"{options.fleet}, {options.engines} engines, {options.router}, {options.seconds:g} s")
    print(
        "| workload | load | requests | TTFT ms | of minutes, at best (worst) | of requests P50, P90 "
        "| TPOT ms | of minutes, at best (worst) | of requests P50, P90 | length pinball P50, P90 | P90 covers |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for spec in options.workloads.split(","):
        for rate in map(float, options.rates.split(",")):
            run, recorder = simulation(spec, rate, options)
            run.run()
            found = {"workload": spec, "rate": rate, **judged(run, recorder)}
            if recorder.spread is not None:
                found["spread"] = recorder.spread.found()
            rows.append(found)
            print(_row(found), flush=True)
            if options.kinds:
                for name, kind in found["kinds"].items():
                    print(f"    {name}: {_errors(kind)}", flush=True)
                print(f"    cached tokens off by {found['hit_error_tokens']:.0f}", flush=True)
                spread = ", ".join(f"{name} {value:.1%}" for name, value in found["spread"].items())
                print(f"    equal instances differ by: {spread}", flush=True)
    return rows


def _row(found: dict[str, Any]) -> str:
    ttft, tpot = found["ttft"], found["tpot"]
    lengths = f"{found['pinball_p50']:.1f}, {found['pinball_p90']:.1f} of {found['mean_length']:.0f} | {found['coverage_p90']:.1%}"
    times = f"{ttft['observed_ms']:.0f} | {_errors(ttft)} | {tpot['observed_ms']:.1f} | {_errors(tpot)}"
    return f"| {found['workload']} | {found['rate']:.0%} | {found['requests']:,} | {times} | {lengths} |"


def _errors(found: dict[str, float]) -> str:
    return (
        f"{found['minute_mean']:.1%}, {found['minute_floor']:.1%} ({found['minute_worst']:+.1%}) | {found['p50']:.1%}, {found['p90']:.1%}"
    )


# ---- one engine becomes slow


def fault(options: argparse.Namespace) -> dict[str, Any]:
    """The engine of ``--slow-at`` takes ten times as long for every step from then on, until ``--well-at``."""
    spec, rate = options.workloads.split(",")[0], float(options.rates.split(",")[0])
    run, recorder = simulation(spec, rate, options)
    slow = run.engines[0]
    step_time: Any = slow.model._step_time
    _slow_down(run, slow, step_time, options)
    run.run()
    name = slow.instance.instance_id
    placed = sorted((told.at_s - BEGIN_S, told.instance == name) for told in recorder.told.values())
    before = [own for at_s, own in placed if options.slow_at - 60.0 <= at_s < options.slow_at]
    share = sum(before) / len(before)
    found = {
        "share_before": share,
        "seconds_to_half": _stays_below(placed, options.slow_at, options.well_at, 0.5 * share),
        "placed_in_first_5_s": sum(own for at_s, own in placed if options.slow_at <= at_s < options.slow_at + 5.0),
        "share_while_slow": _share(placed, options.slow_at + 10.0, options.well_at),
        "trials_while_slow": sum(own for at_s, own in placed if options.slow_at + 10.0 <= at_s < options.well_at),
        "seconds_to_first_use": next((at_s - options.well_at for at_s, own in placed if own and at_s >= options.well_at), None),
        "seconds_to_half_again": _first_above(placed, options.well_at, options.seconds, 0.5 * share),
        "share_after": _share(placed, options.seconds - 60.0, options.seconds),
    }
    print(f"{spec} at {rate:.0%} of capacity, {options.fleet}, {options.engines} engines, {options.router}: {name} ten times slower")
    for key, value in found.items():
        print(f"  {key}: {value if value is None else round(value, 3)}")
    counts = Counter(int(at_s // 10) * 10 for at_s, own in placed if own)
    print("  placed there by 10 s:", {at: counts.get(at, 0) for at in range(0, int(options.seconds), 10)})
    return found


def _slow_down(run: Simulation, slow: Any, step_time: Any, options: argparse.Namespace) -> None:
    factor = 1.0

    def slower(profile: Any, **work: Any) -> float:
        return factor * float(step_time(profile, **work))

    def set_factor(value: float) -> None:
        nonlocal factor
        factor = value
        if slow.model.run is not None:
            slow.model.run.cut(run.loop.time())

    slow.model._step_time = slower
    run.loop.wake_at(BEGIN_S + options.slow_at, lambda: set_factor(10.0))
    run.loop.wake_at(BEGIN_S + options.well_at, lambda: set_factor(1.0))


def _share(placed: list[tuple[float, bool]], begin_s: float, end_s: float) -> float:
    own = [there for at_s, there in placed if begin_s <= at_s < end_s]
    return sum(own) / len(own) if own else 0.0


def _stays_below(placed: list[tuple[float, bool]], begin_s: float, end_s: float, bound: float, window_s: float = 2.0) -> float:
    """Seconds after ``begin_s`` from which on it gets less than ``bound`` of the requests in every window until ``end_s``."""
    found_s, at_s = 0.0, begin_s
    while at_s + window_s <= end_s:
        if _share(placed, at_s, at_s + window_s) >= bound:
            found_s = at_s + window_s - begin_s
        at_s += 0.1
    return found_s


def _first_above(placed: list[tuple[float, bool]], begin_s: float, end_s: float, bound: float, window_s: float = 5.0) -> float | None:
    at_s = begin_s
    while at_s < end_s:
        if _share(placed, at_s, at_s + window_s) >= bound:
            return at_s - begin_s
        at_s += 0.5
    return None


# ---- what it costs


def cost(options: argparse.Namespace) -> dict[str, float]:
    """Microseconds of the calls that a request makes, with 16 instances that are busy. Medians of seven rounds."""
    rng, clock = Random(1), ManualClock(10.0)
    predictor = LatencyPredictor(clock)
    fleet = [ExecutionInstance(f"e{k}", model_name="llama3.1-8b", price_per_gpu_hour_usd=2.0) for k in range(16)]
    asked = [
        RequestMetadata(request_id=str(k), model_name="llama3.1-8b", input_tokens=rng.randrange(20, 4000), max_tokens=512, prompt="x")
        for k in range(500)
    ]
    for k, request in enumerate(asked):  # half of them decode, the others wait
        flight = predictor.began(request, fleet[k % 16], clock.now_s(), streamed=True)
        clock.advance(0.01)
        if k % 2:
            flight.book.tokens(flight, 1, clock.now_s(), clock.now_s())
    cached = [rng.choice((0, 0, 1024)) for _ in fleet]

    def life() -> None:
        for request in asked:
            clock.advance(0.02)
            where = fleet[int(request.request_id) % 16]
            sent_s = clock.now_s()
            flight = predictor.began(request, where, sent_s, streamed=True)
            for token in range(4):
                flight.book.tokens(flight, 1 if not token else 32, sent_s + 0.01, sent_s + 0.01 + 0.1 * token)
            flight.book.leave(flight, sent_s + 0.4, well=True)
            predictor.ended(flight, request, where, Usage(request.input_tokens or 1, 97, 0, exact=True), sent_s + 0.4, sent_s + 0.4)

    def all_of(call: Callable[[RequestMetadata], object]) -> Callable[[], None]:
        def run() -> None:
            for request in asked:
                call(request)

        return run

    found = {
        "forecasts, 16 instances": _median_us(all_of(lambda request: predictor.forecasts(request, fleet, cached)), len(asked)),
        "services_ms, 16 instances": _median_us(all_of(lambda request: predictor.services_ms(request, fleet)), len(asked)),
        "cost_usd": _median_us(all_of(lambda request: predictor.cost_usd(request, fleet[0])), len(asked)),
        "a request's life: sent, 97 tokens, learned from": _median_us(life, len(asked)),
    }
    print("compiled" if not (sys.modules["control_plane.prediction"].__file__ or "").endswith(".py") else "plain Python")
    for name, value in found.items():
        print(f"  {name}: {value:.1f} us")
    return found


def _median_us(run: Callable[[], None], calls: int) -> float:
    run()
    spent = []
    for _ in range(7):
        begun = time.perf_counter()
        run()
        spent.append((time.perf_counter() - begun) / calls * 1e6)
    return statistics.median(spent)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fleet", default=FLEET)
    parser.add_argument("--workloads", default=WORKLOADS)
    parser.add_argument("--rates", default="0.5,0.8")
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--requests", type=int, default=2500, help="at least so many; slow workloads run longer for it")
    parser.add_argument("--engines", choices=("skewed", "plain"), default="skewed")
    parser.add_argument("--router", default="load_balanced")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", action="store_true", help="also by kind of GPU")
    parser.add_argument("--json", help="write the rows there")
    parser.add_argument("--fault", action="store_true")
    parser.add_argument("--cost", action="store_true", help="microseconds of the calls, and nothing else")
    parser.add_argument("--slow-at", type=float, default=120.0)
    parser.add_argument("--well-at", type=float, default=240.0)
    options = parser.parse_args()
    if options.fault and options.seconds < options.well_at + 120.0:
        options.seconds = options.well_at + 180.0
    found: Any = cost(options) if options.cost else fault(options) if options.fault else compare(options)
    if options.json:
        with open(options.json, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
