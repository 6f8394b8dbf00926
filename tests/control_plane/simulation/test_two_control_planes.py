"""Two control planes over the same engines, each with scrapes of its own, in virtual time: they do not herd."""

from __future__ import annotations

import asyncio
from random import Random

import pytest

from control_plane.manager import ControlPlaneManager
from control_plane.protocols import Call, EngineOutcome, Headers, WireRequest
from control_plane.roofline import EngineProfile
from control_plane.simulator.engine import VirtualEngine
from control_plane.simulator.fleet_spec import parse_fleet
from control_plane.simulator.loop import VirtualClock, VirtualLoop
from control_plane.simulator.workload import TraceRequest
from control_plane.types import ExecutionInstance, RequestKind, RequestMetadata

ENGINES = 8
RATE_RPS = 40.0
SECONDS = 90.0
#: judged from here on: until then batches fill
BEGIN_S = 25.0
KIND = RequestKind.COMPLETION


class Ended:
    """A Sink that hears that it is over."""

    def __init__(self) -> None:
        self.failure: Exception | None = None

    def started(self, status: int, headers: Headers, call: Call) -> None: ...
    def chunk(self, data: bytes) -> None: ...
    def tokens(self, n: int, first_s: float, last_s: float) -> None: ...
    def finished(self, outcome: EngineOutcome) -> None: ...

    def failed(self, error: Exception) -> None:
        self.failure = error


class Shared:
    """Engines that several managers use, each under records of its own; who decides takes turns."""

    def __init__(self, planes: int, strategy: str, seed: int) -> None:
        self.loop = VirtualLoop()
        self.rng = Random(seed)
        self.requests: list[TraceRequest] = []
        self.engines: dict[str, VirtualEngine] = {}
        self.profiles: dict[str, EngineProfile] = {}
        self.spreads: list[int] = []
        self.managers = [self._manager(strategy, seed + number) for number in range(planes)]

    def _manager(self, strategy: str, seed: int) -> ControlPlaneManager:
        manager = ControlPlaneManager("fifo", strategy, clock=VirtualClock(self.loop), engine_factory=self._engine, seed=seed)
        for instance, profile in parse_fleet(f"{ENGINES}xh100x4-llama3-70b").instances():
            self.profiles[instance.instance_id] = profile
            manager.register_instance(instance)
        return manager

    def _engine(self, instance: ExecutionInstance) -> VirtualEngine:
        name = instance.instance_id
        if name not in self.engines:
            trace_of = lambda request_id: self.requests[int(request_id)] if request_id.isdecimal() else None  # noqa: E731
            self.engines[name] = VirtualEngine(instance, self.profiles[name], self.loop, trace_of, block_tokens=512, delay_s=0.001)
        return self.engines[name]

    def run(self) -> float:
        """The mean, over time, of the difference between the fullest and the emptiest engine, in requests."""
        self.loop.run(self._main())
        self.loop.close()
        return sum(self.spreads) / len(self.spreads)

    async def _main(self) -> None:
        for manager in self.managers:
            await manager.start()
        sinks: list[Ended] = []
        model = self.managers[0].get_instances()[0].model_name
        while self.loop.time() < SECONDS:
            await asyncio.sleep(self.rng.expovariate(RATE_RPS))
            number = len(self.requests)
            self.requests.append(TraceRequest(self.loop.time(), 200 + int(600 * self.rng.random()), 100 + int(400 * self.rng.random())))
            request = RequestMetadata(request_id=str(number), model_name=model, kind=KIND, input_tokens=self.requests[-1].prompt_tokens)
            sinks.append(Ended())
            wire = WireRequest("/v1/completions", b"", True)
            self.managers[number % len(self.managers)].lifecycle.accept(request, wire, sinks[-1], kind=KIND, model=model)
            if self.loop.time() >= BEGIN_S:
                batches = [engine.model.running + engine.model.waiting for engine in self.engines.values()]
                self.spreads.append(max(batches) - min(batches))
        for manager in self.managers:
            await manager.stop()
        assert not any(sink.failure for sink in sinks)


@pytest.mark.parametrize("strategy", ["predicted_latency", "adaptive"])
def test_two_that_decide_at_once_spread_nearly_as_well_as_one(strategy: str) -> None:
    one, two = (Shared(planes, strategy, seed=3).run() for planes in (1, 2))
    blind = Shared(2, "random", seed=3).run()

    assert two < 2.0 * one + 2.0, f"{one:.1f} requests between the fullest and the emptiest with one, {two:.1f} with two"
    assert two < 0.7 * blind, f"{two:.1f}, by lot {blind:.1f}"
