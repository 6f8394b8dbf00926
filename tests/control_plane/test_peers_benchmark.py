"""``benchmarks/peers.py`` does not rot: its client waits for nobody, and one arm of ours runs to the end and stands in a row."""

from __future__ import annotations

import os
import shutil
import sys
from array import array
from pathlib import Path

import pytest

from control_plane.sim_engine import SimEngine
from control_plane.simulator.fleet_spec import parse_fleet
from control_plane.simulator.outcome import COMPLETED, FAILED, REJECTED
from control_plane.simulator.run import BEGIN_S
from control_plane.simulator.scenario import Scenario
from control_plane.simulator.workload import TraceRequest, Workload
from control_plane.transport import Exchange, HttpServer

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import peers
from open_loop import Load, OpenLoop, outcome_document, outcomes_from, planned

TWO_CORES = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or not {0, 1} <= os.sched_getaffinity(0) or shutil.which("taskset") is None,
    reason="the benchmark holds the router to core 0 and its load to core 1",
)


def small_scenario(count: int, gap_s: float) -> tuple[Load, Scenario]:
    load = Load("by hand", "1xh100-llama3-8b", 1 / gap_s, 0.0, count * gap_s + 0.1, 0.0, "all=ttft:1000")
    requests = [TraceRequest(row * gap_s, 40 + row, 5, (row // 2,)) for row in range(count)]
    return load, Scenario(parse_fleet(load.fleet), Workload("by hand", requests, 32), duration_s=load.duration_s)


async def test_requests_are_sent_at_their_times_though_none_is_answered() -> None:
    """The server answers nothing until all have come: a client that waits for answers would never end."""
    load, scenario = small_scenario(20, 0.01)
    held: list[Exchange] = []

    def hold(exchange: Exchange) -> None:
        held.append(exchange)
        if len(held) == 20:
            for one in held:
                one.respond(429 if one is held[0] else 500, [], b"")

    server = HttpServer(hold)
    await server.start("127.0.0.1", 0)
    run = OpenLoop(load, scenario, planned(load, scenario, "m"), server.port, told=lambda _: None)
    await run.run()
    await server.stop(0.0)
    assert list(run.outcomes.arrival_s) == [BEGIN_S + request.arrival_s for request in scenario.workload.requests]
    assert sorted(run.outcomes.state) == [FAILED] * 19 + [REJECTED]
    assert run.codes == {"status 429": 1, "status 500": 19}


async def test_engines_see_the_lengths_and_the_shared_prefixes_of_the_workload() -> None:
    load, scenario = small_scenario(8, 0.05)
    engine = SimEngine("h100-llama3-8b", jitter=0.0)
    await engine.start()
    told: list[str] = []
    run = OpenLoop(load, scenario, planned(load, scenario, engine.model_name), engine.port, told=told.append)
    await run.run()
    await engine.kill()
    out = outcomes_from(outcome_document(run))
    assert set(out.state) == {COMPLETED}
    assert list(out.prompt_tokens) == [request.prompt_tokens for request in scenario.workload.requests]
    assert list(out.output_tokens) == [5] * 8
    assert list(out.cached_tokens) == [0, 32] * 4  # two requests share each block of 32 tokens
    assert all(out.arrival_s[row] < out.first_s[row] <= out.end_s[row] for row in range(8))
    assert told == ["measuring", "measured"]


def test_outcomes_go_through_json_as_they_are() -> None:
    assert outcomes_from({"columns": {"state": [COMPLETED, FAILED], "first_s": [1.5, 0.0]}}).first_s == array("d", [1.5, 0.0])


def test_an_arm_that_is_none_is_told() -> None:
    with pytest.raises(SystemExit, match="neither ROUTER:CHOICE nor"):
        peers.starter("least_conn", "m")
    with pytest.raises(SystemExit, match="'haproxy' is not one of"):
        peers.starter("haproxy:leastconn", "m")


@TWO_CORES
def test_one_arm_of_ours_ends_in_a_row_and_is_not_run_again(tmp_path: Path) -> None:
    options = ["--trace", "poisson:rate_rps=4,duration_s=60", "--fleet", "2xh100-llama3-8b", "--rate", "4rps", "--speed", "4"]
    options += ["--warmup-s", "2", "--duration-s", "6", "--tail-s", "2", "--peers", "", "--ours", "fifo+round_robin", "--agree"]
    options += ["--resume", str(tmp_path / "rows.jsonl"), "--json", str(tmp_path / "all.json")]
    first = peers.main(options)
    (row,) = first["runs"]
    assert row["requests"] == row["completed"] > 0
    assert (row["scheduling_policy"], row["routing_strategy"]) == ("fifo", "round_robin")
    assert sum(row["finished_by_engine"]) > 0
    assert set(row["cpu"]) == {"router", "engines", "client", "core 0", "core 1"}
    assert "6 s judged" in row["faults"]
    (agreement,) = first["agreement"]
    assert agreement["columns"]["cost_usd"]["difference"] == pytest.approx(0.0)
    assert peers.main(options)["runs"][0]["at"] == row["at"]
