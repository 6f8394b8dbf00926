"""The predictor in a running control plane: right on engines that are not what it believes at first, awake when one of them breaks down."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path
from random import Random
from typing import Any

import pytest

from control_plane.router import create_strategy
from control_plane.simulator.generators import workload_of
from control_plane.simulator.run import BEGIN_S, Simulation
from control_plane.simulator.scenario import Arm, Scenario

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "prediction.py"
FLEET = "1xh100-llama3.1-8b,1xa100-llama3.1-8b,1xl40s-llama3.1-8b"


@pytest.fixture(scope="module")
def bench() -> Any:
    spec = importlib.util.spec_from_file_location("prediction_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["prediction_benchmark"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def simulation(bench: Any, rate_rps: float, seconds: float) -> tuple[Simulation, Any]:
    """Engines slower than their data sheets, each kind in its own way, and nothing told of what they are."""
    workload = workload_of(f"poisson:rate_rps={rate_rps},duration_s={seconds},output_tokens=100", seed=1)
    recorder = bench.Recorder(create_strategy("load_balanced", Random(1)))
    run = Simulation(Scenario(bench.fleet_of(FLEET, True), workload), Arm("fifo", recorder))
    for instance in run.manager.get_instances():
        instance.profile = None
    return run, recorder


def test_ttft_and_tpot_of_a_mixed_fleet_after_200_requests(bench: Any) -> None:
    run, recorder = simulation(bench, 8.0, 150.0)
    run.run()
    found = bench.judged(run, recorder)

    for name in ("ttft", "tpot"):
        assert found[name]["minute_mean"] < 0.10, name
        assert found[name]["p50"] < 0.20, name
    assert 0.82 < found["coverage_p90"] < 0.96
    calibration = run.manager.predictor.calibration
    assert abs(calibration["ttft_ms"].mean_error) < 0.10
    assert abs(calibration["tpot_ms"].mean_error) < 0.10
    assert sum(one.actual_usd for one in run.manager.get_costs()) == pytest.approx(
        sum(one.predicted_usd for one in run.manager.get_costs()), rel=0.5
    )


def test_an_engine_that_becomes_ten_times_slower_is_left_alone_within_seconds_and_used_again_when_it_is_well(bench: Any) -> None:
    run, recorder = simulation(bench, 8.0, 180.0)
    slow = run.engines[0]
    bench._slow_down(run, slow, slow.model._step_time, argparse.Namespace(slow_at=60.0, well_at=110.0))
    run.run()
    name = slow.instance.instance_id
    placed = [(told.at_s - BEGIN_S, told.instance == name) for told in recorder.told.values()]
    before = bench._share(placed, 20.0, 60.0)

    assert before > 0.4, "the fastest gets the most"
    assert bench._share(placed, 65.0, 110.0) < 0.5 * before
    assert bench._share(placed, 150.0, 180.0) > 0.6 * before
