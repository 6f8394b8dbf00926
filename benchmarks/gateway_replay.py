"""The control plane over one engine: the gateway as a process before a real server, and the simulator with the calibrated engine."""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import replays

from control_plane.profile_file import load as load_profile_file
from control_plane.simulator.fleet_spec import parse_fleet
from control_plane.simulator.run import Simulation
from control_plane.simulator.scenario import Arm, Scenario
from control_plane.simulator.slo import parse_slo
from control_plane.simulator.workload import TraceRequest, Workload

#: the classes of `replays.two_classes`; the targets judge nothing here
SLO = "urgent=ttft:100000,priority:high;normal=ttft:100000,priority:low"


@contextmanager
def gateway(engine: str, policy: str, at_once: int, files: Path, core: int) -> Iterator[str]:
    """`control-plane serve` on that core, ready, with at most so many requests at the engine; yields its URL."""
    config, log = files.with_suffix(".yaml"), files.with_suffix(".log")
    config.write_text(f"scheduling_policy: {policy}\ninstances:\n  - {{url: '{engine}', max_concurrent_requests: {at_once}}}\n")
    command = [sys.executable, "-m", "control_plane.cli", "serve", "--port", "0", "--config", str(config)]
    with log.open("wb") as errors:
        process = subprocess.Popen(
            ["taskset", "-c", str(core), *command, "--no-access-log"], stdout=subprocess.PIPE, stderr=errors, text=True
        )
    try:
        assert process.stdout is not None
        said = process.stdout.readline()
        if not said.startswith("listening on "):
            raise RuntimeError(f"the gateway did not come up: {said}{log.read_text()}")
        url = said.removeprefix("listening on ").strip()
        with urllib.request.urlopen(f"{url}/ready", timeout=30) as answer:
            assert answer.status == 200
        yield url
    finally:
        process.terminate()
        process.wait(30)
        assert process.stdout is not None
        process.stdout.close()


def simulated(profile: Path, asks: Sequence[replays.Ask], policy: str, max_num_seqs: int) -> dict[str, float]:
    """The figures of :func:`by_class` from the simulator."""
    told = replace(load_profile_file(str(profile)), max_num_seqs=max_num_seqs, measured={})
    narrow = profile.with_name(f"{profile.stem}-{max_num_seqs}.yaml")
    told.write(narrow)
    names = {-1: "high", 0: "normal", 1: "low"}
    requests = [
        TraceRequest(ask.at_s, ask.prompt_tokens, ask.output_tokens, slo_class=ask.label, priority=names[ask.priority]) for ask in asks
    ]
    scenario = Scenario(
        parse_fleet(f"1x{os.fspath(narrow)}"), Workload("two classes", requests), slo=parse_slo(SLO), delay_s=0.0, jitter=0.0
    )
    run = Simulation(scenario, Arm(policy, "load_balanced"))
    for instance in run.manager.get_instances():
        instance.max_concurrent_requests = max_num_seqs
    out = run.run().outcomes
    rows = range(len(asks))
    tpot = [out.tpot_ms(row) for row in rows if out.output_tokens[row] > 1]
    return by_class(asks, [out.ttft_ms(row) for row in rows], tpot, [out.e2e_ms(row) for row in rows])


def by_class(asks: Sequence[Any], ttft_ms: Sequence[float], tpot_ms: Sequence[float], e2e_ms: Sequence[float]) -> dict[str, float]:
    """Mean TTFT and time to the end by class, and TPOT of all."""
    found: dict[str, float] = {}
    for label in sorted({ask.label for ask in asks}):
        own = [row for row, ask in enumerate(asks) if ask.label == label]
        more = f", {label}" if label else ""
        found[f"TTFT mean ms{more}"] = sum(ttft_ms[row] for row in own) / len(own)
        found[f"e2e mean ms{more}"] = sum(e2e_ms[row] for row in own) / len(own)
    found["TPOT mean ms"] = sum(tpot_ms) / len(tpot_ms)
    found["TPOT p99 ms"] = replays.quantile(tpot_ms, 0.99)
    return found
