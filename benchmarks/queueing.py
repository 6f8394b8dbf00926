"""What queueing here instead of in the engines costs and brings, in simulation: the figures of docs/QUEUE.md.

    python benchmarks/queueing.py ahead|window|overload|urgent|fairness [--fleet 2xh100-llama3-8b] [--trace T] [--seeds 3] [--seconds 90]

ahead: throughput, and time from leaving our queue to the first token, by ``dispatch_ahead_ms`` against sending everything at once, at
1.5 times the capacity. window: cache hits and throughput by ``dispatch_window``. overload: goodput by policy from half to twice the
capacity, and at 1.5 times against the best. urgent: TTFT p90 of a fifth of the requests that are urgent, at half load and at twice the
capacity. fairness: Jain's index and the greatest difference of served tokens between tenants that are backlogged all the time, for
``fair_share``, the virtual token counter (VTC, Sheng et al., OSDI 24) and the others.

Capacity is the throughput of the same fleet when everything is sent at once and far more comes than it can do. All arms of a seed get the
same arrivals. Rows give the mean over the seeds and, in brackets, the least and the most.
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from control_plane import ExecutionInstance, RequestMetadata, SchedulingPolicy
from control_plane.policies import FairSharePolicy
from control_plane.simulator.fleet_spec import parse_fleet
from control_plane.simulator.generators import workload_of
from control_plane.simulator.outcome import COMPLETED, REJECTED, RunResult
from control_plane.simulator.resample import at_rate_in
from control_plane.simulator.rows import jain, row_of
from control_plane.simulator.run import simulate
from control_plane.simulator.scenario import Arm, Scenario
from control_plane.simulator.slo import DEFAULT_SLO, parse_slo
from control_plane.simulator.workload import Workload

#: everything is sent at once: no work ahead is too much, and no cap is learned
AT_ONCE = {"dispatch_ahead_ms": 1e12, "enable_monitoring": False}
MANY = {"queue_max_requests": 1_000_000, "queue_timeout_s": 1e6}
URGENT = "urgent=ttft:1000,tpot:50,share:0.2,priority:critical;normal=ttft:5000,tpot:100,share:0.8"
WARMUP_S = 30.0


class VirtualTokenCounter(SchedulingPolicy):
    """VTC: of the tenants that wait, the one with the least counter is next, first come first served within it. Input tokens count at
    the start and predicted output, twice, too; the difference to what was generated is settled at the end. A tenant that comes back
    from idle is lifted to the least counter of those that wait."""

    name = "vtc"

    def __init__(self) -> None:
        self.counters: dict[str, float] = {}
        self._waiting: set[str] = set()
        self._charged: dict[str, float] = {}

    def get_next_request(
        self, pending_queue: Sequence[RequestMetadata], available_instances: Sequence[ExecutionInstance]
    ) -> RequestMetadata | None:
        first: dict[str, RequestMetadata] = {}
        for request in pending_queue:
            first.setdefault(request.tenant, request)
        counters = self.counters
        came = first.keys() - self._waiting
        stayed = [counters[tenant] for tenant in first.keys() & self._waiting]
        least = min(stayed, default=0.0)
        for tenant in came:
            counters[tenant] = max(counters.get(tenant, 0.0), least)
        self._waiting = set(first)
        tenant = min(first, key=lambda name: (counters[name], name))
        request = first[tenant]
        view = self.view_of(available_instances) if self.view_of is not None else None
        tokens = (request.input_tokens or 0) + 2.0 * (view.predictor.output_tokens(request) if view is not None else 0)
        counters[tenant] += tokens
        self._charged[request.request_id] = tokens
        return request

    def on_request_completed(self, request: RequestMetadata, info: Any) -> None:
        charged = self._charged.pop(request.request_id, None)
        if charged is not None and info.usage is not None:
            self.counters[request.tenant] += info.usage.prompt_tokens + 2.0 * info.usage.completion_tokens - charged


def rows_of(values: Sequence[float], digits: int = 3) -> str:
    return f"{statistics.mean(values):.{digits}f} ({min(values):.{digits}f}-{max(values):.{digits}f})"


class Bench:
    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.fleet = parse_fleet(options.fleet)
        base = workload_of(options.trace, seed=0)
        fits = [one for one in base.requests if one.prompt_tokens + one.output_tokens <= self.fleet.context_tokens]
        self.base = base.with_requests(fits, base.duration_s)
        self._capacity = options.capacity_rps

    def scenario(self, rate_rps: float, seed: int, slo: str = DEFAULT_SLO, workload: Workload | None = None) -> Scenario:
        length_s = WARMUP_S + self.options.seconds
        drawn = workload or at_rate_in((WARMUP_S, length_s), self.base, rate_rps, length_s + 30.0, f"queueing {seed}")
        return Scenario(self.fleet, drawn, parse_slo(slo), seed=seed, warmup_s=WARMUP_S, duration_s=self.options.seconds)

    def run(self, arm: Arm, rate_rps: float, seed: int, slo: str = DEFAULT_SLO, workload: Workload | None = None) -> RunResult:
        options = {**MANY, **arm.options}
        return simulate(self.scenario(rate_rps, seed, slo, workload), Arm(arm.scheduling_policy, arm.routing_strategy, options))

    @property
    def capacity_rps(self) -> float:
        if not self._capacity:
            guess, most = 1.0, 0.0
            for _ in range(12):  # double until what is done falls behind what comes
                result = self.run(Arm("fifo", self.options.router, AT_ONCE), guess, 0)
                most = max(most, row_of(result, guess)["throughput_rps"])
                if most < 0.8 * guess:
                    break
                guess *= 2.0
            self._capacity = most
            print(f"capacity of {self.options.fleet} for {self.options.trace}: {most:.2f} requests/s", flush=True)
        return self._capacity

    @property
    def seeds(self) -> range:
        return range(self.options.seeds)

    # ---- sections

    def ahead(self) -> None:
        rate = 1.5 * self.capacity_rps
        arms: list[tuple[str, dict[str, Any]]] = [("at once", AT_ONCE), ("found", {})]
        arms += [(f"{ms:g} ms", {"dispatch_ahead_ms": ms}) for ms in (50.0, 200.0, 1000.0, 5000.0)]
        done: dict[str, list[float]] = defaultdict(list)
        for name, options in arms:
            tokens, waiting, share = [], [], []
            for seed in self.seeds:
                result = self.run(Arm("fifo", self.options.router, options), rate, seed)
                row = row_of(result, rate)
                done[name].append(row["throughput_rps"])
                tokens.append(row["output_tokens_per_s"])
                waiting.append(statistics.mean(statistics.mean(sample.waiting) for sample in result.samples if sample.at_s > WARMUP_S))
                share.append(row["throughput_rps"] / done["at once"][seed])
            print(
                f"{name:>9}: {rows_of(done[name], 2)} requests/s, {rows_of(tokens, 0)} tokens/s, {rows_of(share)} of at once,"
                f" {rows_of(waiting, 1)} waiting in each engine",
                flush=True,
            )

    def window(self) -> None:
        for load in (0.9, 1.5):
            rate = load * self.capacity_rps
            for window in (1, 16, 64, 256):
                hits, done, ttft = [], [], []
                for seed in self.seeds:
                    options = {"dispatch_window": window}
                    row = row_of(self.run(Arm(self.options.policy, self.options.router, options), rate, seed), rate)
                    hits.append(row["prefix_hit_rate"])
                    done.append(row["throughput_rps"])
                    ttft.append(row["ttft_ms"]["p90"] / 1000.0)
                print(
                    f"load {load}, window {window:>3}: hit rate {rows_of(hits)}, {rows_of(done, 2)} requests/s, TTFT p90 {rows_of(ttft)} s",
                    flush=True,
                )

    def overload(self) -> None:
        for policy in self.options.policies.split(","):
            best = 0.0
            found = {}
            for load in (0.7, 0.9, 1.0, 1.2, 1.5, 2.0):
                rate = load * self.capacity_rps
                rows = [row_of(self.run(Arm(policy, self.options.router), rate, seed), rate) for seed in self.seeds]
                good = [row["goodput_rps"] for row in rows]
                found[load] = statistics.mean(good)
                best = max(best, found[load])
                print(f"{policy:>14} at {load:.1f}: goodput {rows_of(good, 2)} requests/s", flush=True)
            print(f"{policy:>14}: {found[1.5] / best:.3f} of its peak at 1.5, {found[2.0] / best:.3f} at 2.0", flush=True)

    def urgent(self) -> None:
        for policy in self.options.policies.split(","):
            p90 = {}
            for load in (0.5, 2.0):
                rate = load * self.capacity_rps
                values = []
                for seed in self.seeds:
                    result = self.run(Arm(policy, self.options.router), rate, seed, URGENT)
                    out = result.outcomes
                    times = sorted(
                        out.ttft_ms(row) for row in result.judged() if result.classes[row].name == "urgent" and out.state[row] == COMPLETED
                    )
                    values.append(times[int(0.9 * len(times))])
                p90[load] = statistics.mean(values)
                print(f"{policy:>14} at {load:.1f}: urgent TTFT p90 {rows_of(values, 0)} ms", flush=True)
            print(f"{policy:>14}: {p90[2.0] / p90[0.5]:.2f} times its value at half load", flush=True)

    def fairness(self) -> None:
        rate = self.capacity_rps
        policies: list[Any] = [FairSharePolicy, VirtualTokenCounter, "fifo", "slo_aware"]
        for policy in policies:
            indices, apart = [], []
            for seed in self.seeds:
                workload = hogs(self.base, 4.0 * rate, WARMUP_S + self.options.seconds + 30.0, seed)
                given = policy if isinstance(policy, str) else policy()
                result = self.run(Arm(given, self.options.router), rate, seed, "all=ttft:1000000", workload)
                served = served_tokens(result)
                indices.append(jain(served.values()))
                apart.append(max(served.values()) - min(served.values()))
            name = policy if isinstance(policy, str) else policy.name
            print(f"{name:>14}: Jain {rows_of(indices, 4)}, served tokens apart by {rows_of(apart, 0)}", flush=True)


def hogs(base: Workload, rate_rps: float, length_s: float, seed: int) -> Workload:
    """Four tenants that are always backlogged and ask for 1, 1, 2 and 4 parts of the traffic, together
    ``rate_rps``, four times the capacity."""
    drawn = at_rate_in((WARMUP_S, length_s - 30.0), base, rate_rps, length_s, f"hogs {seed}")
    rng = Random(f"tenants {seed}")
    for request in drawn.requests:
        request.tenant = rng.choices(("a", "b", "c", "d"), (1, 1, 2, 4))[0]
    return drawn


def served_tokens(result: RunResult) -> dict[str, float]:
    """Input plus twice output tokens of what ended in the judged window, by tenant."""
    begin_s, end_s = result.window_s
    out, served = result.outcomes, defaultdict(float)
    for row in range(len(out)):
        if out.state[row] == COMPLETED and begin_s <= out.end_s[row] < end_s:
            served[result.tenants[row]] += out.prompt_tokens[row] + 2.0 * out.output_tokens[row]
        assert out.state[row] != REJECTED
    return served


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("section", choices=("ahead", "window", "overload", "urgent", "fairness"))
    parser.add_argument("--fleet", default="2xh100-llama3-8b")
    parser.add_argument("--trace", default="azure_conv")
    parser.add_argument("--router", default="load_balanced")
    parser.add_argument("--policy", default="fifo", help="of window")
    parser.add_argument("--policies", default="fifo,slo_aware", help="of overload and urgent")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=90.0)
    parser.add_argument("--capacity-rps", type=float, default=0.0, help="0: found")
    options = parser.parse_args()
    section: Callable[[], None] = getattr(Bench(options), options.section)
    section()


if __name__ == "__main__":
    main()
