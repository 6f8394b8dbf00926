"""Overload, through the manager in virtual time: what is relegated is served after the rest, is said, and never dropped."""

from __future__ import annotations

from random import Random

from control_plane.policies import AdaptivePolicy
from control_plane.policies.adaptive import AdaptiveSettings
from control_plane.simulator.fleet_spec import parse_fleet
from control_plane.simulator.outcome import COMPLETED
from control_plane.simulator.rows import row_of
from control_plane.simulator.run import Simulation
from control_plane.simulator.scenario import Arm, Scenario
from control_plane.simulator.slo import parse_slo
from control_plane.simulator.workload import TraceRequest, Workload

FLEET = "1xh100-llama3-8b"


def burst(count: int, rate_rps: float, seed: int = 0) -> Workload:
    rng = Random(seed)
    at_s, requests = 0.0, []
    for number in range(count):
        at_s += rng.expovariate(rate_rps)
        requests.append(TraceRequest(at_s, rng.randrange(200, 4000), rng.randrange(10, 120), tenant=f"t{number % 2}"))
    return Workload("burst", requests)


def run(policy: object, slo: str, workload: Workload) -> Simulation:
    simulation = Simulation(Scenario(parse_fleet(FLEET), workload, parse_slo(slo)), Arm(policy))
    result = simulation.run()
    assert set(result.outcomes.state) == {COMPLETED}, "nobody is dropped"
    simulation.result = result  # type: ignore[attr-defined]
    return simulation


def events_of(simulation: Simulation, name: str) -> list[dict[str, object]]:
    return [event.fields for event in simulation.manager.events.recent() if event.name == name]


def test_under_overload_more_are_in_time_than_first_come_first_served_and_relegation_is_said() -> None:
    workload = burst(900, 45.0)
    good = {}
    for policy in ("fifo", "slo_aware"):
        simulation = run(policy, "all=ttft:1500", workload)
        good[policy] = row_of(simulation.result, 1.0)["slo_attainment"]  # type: ignore[attr-defined]
        said = events_of(simulation, "requests_relegated")
        assert bool(said) == (policy == "slo_aware")
        assert all(fields["count"] > 0 for fields in said)  # type: ignore[operator]
    assert good["slo_aware"] > 2.0 * good["fifo"]


def test_adaptive_says_by_which_numbers_it_switched() -> None:
    simulation = run(AdaptivePolicy(AdaptiveSettings(dwell_s=1.0)), "all=priority:normal", burst(600, 60.0))
    switches = events_of(simulation, "policy_switched")
    assert switches
    first = switches[-1]  # newest first
    assert first["distinct_tenants"] == 2
    assert first["utilisation"] >= 0.9 or first["predicted_wait_s"] >= 1.0  # type: ignore[operator]
    (event,) = [one for one in simulation.manager.events.recent() if one.fields is first]
    assert "from slo_aware to fair_share: predicted wait" in event.message
