"""A fleet of simulated engines in one process, for benchmarks of what stands in front of engines.

    python benchmarks/sim_fleet.py --fleet 8xh100-llama3-8b --speed 0.5 --seed 0

Prints a line of JSON (the model's name and the engines' ports) once all listen. On SIGTERM it prints another: by how much its event loop
was late, which is by how much steps ended late.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import json
import re
import signal
import subprocess
import sys
import urllib.request
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import uvloop

sys.path.insert(0, str(Path(__file__).resolve().parent))

from routers import LOAD_CORE, on_core

from control_plane.sim_engine import SimEngine
from control_plane.simulator.fleet_spec import parse_fleet

#: how often the loop's lateness is looked at
LOOK_S = 0.02
_COUNTERS = re.compile(
    rb"^vllm:(prefix_cache_queries|prefix_cache_hits|num_preemptions|request_success)_total\{[^}]*\} (\S+)", re.MULTILINE
)


def quantile(values: Sequence[float], share: float) -> float:
    """The nearest rank of ``values``, which need not be sorted; 0.0 of nothing."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


# ---- the process


async def serve(fleet: str, speed: float, seed: int, jitter: float) -> None:
    spec = parse_fleet(fleet)
    engines = [
        SimEngine(profile, instance.model_name, speed=speed, seed=seed * 1000 + number, jitter=jitter)
        for number, (instance, profile) in enumerate(spec.instances())
    ]
    for engine in engines:
        await engine.start()
    loop, stopped, late_ms = asyncio.get_running_loop(), asyncio.Event(), array("d")
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)

    def look(due_s: float) -> None:
        now_s = loop.time()
        late_ms.append((now_s - due_s) * 1000.0)
        loop.call_at(now_s + LOOK_S, look, now_s + LOOK_S)

    look(loop.time())
    gc.collect()
    gc.freeze()
    print(json.dumps({"model": spec.model_name, "ports": [engine.port for engine in engines]}), flush=True)
    await stopped.wait()
    print(json.dumps({"p50": quantile(late_ms, 0.5), "p99": quantile(late_ms, 0.99), "max": max(late_ms)}), flush=True)
    for engine in engines:
        await engine.kill()


# ---- its owner's side


@dataclass(frozen=True, slots=True)
class Counters:
    """What the engines have counted since their start, by engine."""

    prefix_queries_tokens: tuple[int, ...]
    prefix_hits_tokens: tuple[int, ...]
    preemptions: tuple[int, ...]
    finished: tuple[int, ...]


class Fleet:
    """A running fleet. ``late_ms`` is there after :meth:`stop`."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        told = json.loads(self._line())
        self.model: str = told["model"]
        self.ports: list[int] = told["ports"]
        self.late_ms: dict[str, float] = {}

    def counters(self) -> Counters:
        found: dict[bytes, list[int]] = {}
        for port in self.ports:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as page:
                text = page.read()
            sums: dict[bytes, float] = {}
            for name, value in _COUNTERS.findall(text):
                sums[name] = sums.get(name, 0.0) + float(value)
            for name in (b"prefix_cache_queries", b"prefix_cache_hits", b"num_preemptions", b"request_success"):
                found.setdefault(name, []).append(int(sums.get(name, 0.0)))
        return Counters(*(tuple(values) for values in found.values()))

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(30)
                self.late_ms = json.loads(self._line())
            except (subprocess.TimeoutExpired, ValueError):  # it hung, or was killed by somebody else
                self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()

    def _line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline()


@contextlib.contextmanager
def fleet_of(fleet: str, *, speed: float, seed: int, jitter: float = 0.02) -> Iterator[Fleet]:
    """Fresh engines on the load's core."""
    command = [sys.executable, __file__, "--fleet", fleet, "--speed", str(speed), "--seed", str(seed), "--jitter", str(jitter)]
    running = Fleet(subprocess.Popen(on_core(LOAD_CORE, command), stdout=subprocess.PIPE, text=True, start_new_session=True))
    try:
        yield running
    finally:
        running.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fleet", required=True)
    parser.add_argument("--speed", type=float, default=1.0, help="model seconds per real second")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jitter", type=float, default=0.02, help="sigma of the lognormal noise on step times")
    given = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve(given.fleet, given.speed, given.seed, given.jitter))


if __name__ == "__main__":
    main()
