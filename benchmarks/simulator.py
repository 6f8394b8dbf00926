"""What simulating costs: requests a minute of wall time on one core, memory, and where the time goes.

    python benchmarks/simulator.py [--requests 100000] [--instances 64] [--rate-rps 960] [--rounds 3] [--profile] [--json F]
    python benchmarks/simulator.py --requests 1000000 --instances 1000 --rate-rps 15000 --rounds 1      # the large one

The workload is azure_conv resampled to the rate; default policy and router; every instance is probed and scraped as in production. The
share of probes and scrapes is the difference to the same run without them (their intervals set beyond its end), alternating. ``--profile``
adds a run under cProfile, whose own cost weighs on small functions, and sums it up by room.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import resource
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from random import Random
from typing import Any

from control_plane.compiled import kind
from control_plane.fleet import HealthSettings
from control_plane.simulator.fleet_spec import parse_fleet
from control_plane.simulator.generators import workload_of
from control_plane.simulator.outcome import COMPLETED
from control_plane.simulator.resample import at_rate
from control_plane.simulator.run import simulate
from control_plane.simulator.scenario import Arm, Scenario

#: seconds between probes, far beyond any run
NEVER_S = 1e9
#: rooms of the house, by a part of the path; the first that fits counts
ROOMS = (
    ("engine model", ("control_plane/engines/", "control_plane/roofline", "control_plane/fitted")),
    ("simulator", ("control_plane/simulator/",)),
    ("probes and scrapes", ("control_plane/fleet/health", "control_plane/fleet/introspection", "control_plane/fleet/scraper")),
    ("control plane", ("control_plane/",)),
    ("asyncio", ("asyncio/",)),
)


def scenario_of(count: int, instances: int, rate_rps: float) -> Scenario:
    length_s = count / rate_rps
    workload = at_rate(workload_of("azure_conv", seed=0), rate_rps, length_s, Random(0))
    return Scenario(parse_fleet(f"{instances}xh100-llama3-8b"), workload, seed=0)


def one(scenario: Scenario, *, probes: bool) -> dict[str, float]:
    options: dict[str, Any] = {}
    if not probes:
        options["health"] = HealthSettings(probe_interval_s=NEVER_S, scrape_interval_s=NEVER_S, models_interval_s=NEVER_S)
    began_s = time.process_time()
    result = simulate(scenario, Arm(options=options))
    cpu_s = time.process_time() - began_s
    count = len(result.outcomes)
    return {
        "requests": count,
        "completed": list(result.outcomes.state).count(COMPLETED),
        "wall_s": result.wall_s,
        "cpu_s": cpu_s,
        "requests_per_minute": count / result.wall_s * 60.0,
        "virtual_s": result.virtual_s,
        "cpu_ms_per_virtual_s": cpu_s * 1000.0 / result.virtual_s,
        "cpu_us_per_request": cpu_s * 1e6 / count,
        "callbacks": result.callbacks,
        "timers": result.timers,
        "probes": result.probes,
    }


def profile(scenario: Scenario) -> dict[str, float]:
    """Share of the time by room, of functions' own time; builtins count where they are called from most."""
    profiler = cProfile.Profile()
    profiler.enable()
    simulate(scenario, Arm())
    profiler.disable()
    stats: Any = pstats.Stats(profiler)
    spent: dict[str, float] = defaultdict(float)
    for (file, _, _), (_, _, own_s, _, callers) in stats.stats.items():
        if file == "~" and callers:
            for (caller, _, _), (_, _, caller_s, _) in callers.items():
                spent[_room(caller)] += caller_s
        else:
            spent[_room(file)] += own_s
    whole_s = sum(spent.values())
    return {room: seconds / whole_s for room, seconds in sorted(spent.items(), key=lambda item: -item[1])}


def _room(file: str) -> str:
    return next((room for room, parts in ROOMS if any(part in file for part in parts)), "the rest")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--instances", type=int, default=64)
    parser.add_argument("--rate-rps", type=float, default=960.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path)
    asked = parser.parse_args()
    scenario = scenario_of(asked.requests, asked.instances, asked.rate_rps)
    rounds = []
    for number in range(asked.rounds):
        rounds.append((one(scenario, probes=True), one(scenario, probes=False)))
        print(f"round {number + 1}: {rounds[-1][0]['requests_per_minute']:,.0f} requests a minute", file=sys.stderr)
    names = list(rounds[0][0])
    figures: dict[str, Any] = {name: statistics.median(with_probes[name] for with_probes, _ in rounds) for name in names}
    shares = [1.0 - without["cpu_s"] / with_probes["cpu_s"] for with_probes, without in rounds]
    figures["probe_share"] = statistics.median(shares)
    figures["requests_per_minute_lowest"] = min(with_probes["requests_per_minute"] for with_probes, _ in rounds)
    figures["rss_peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0
    figures["package"] = kind()
    if asked.profile:
        figures["by_room"] = profile(scenario)
    for name, value in figures.items():
        print(f"{name:28} {value:,.3f}" if isinstance(value, float) else f"{name:28} {value}")
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
