"""The fleet over real sockets: the HTTP engine adapter, the pooled client, and simulated servers that die, hang and change."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import pytest

from control_plane.clock import SystemClock
from control_plane.engines import OpenAICompatibleEngine
from control_plane.errors import ControlPlaneError
from control_plane.fleet import Fleet, HealthSettings
from control_plane.job import LaneKey
from control_plane.prediction import LatencyPredictor
from control_plane.protocols import Call, EngineOutcome, Headers, WireRequest
from control_plane.roofline import profile
from control_plane.sim_engine import SimEngine
from control_plane.types import ExecutionInstance, Leg, RequestKind, RequestMetadata

CHAT = LaneKey("m", RequestKind.CHAT)
FAST = {
    "probe_interval_s": 0.03,
    "probe_timeout_s": 0.1,
    "down_interval_s": 0.02,
    "down_interval_max_s": 0.05,
    "scrape_interval_s": 0.03,
    "models_interval_s": 0.1,
}


class Events(list[str]):
    def event(self, name: str, message: str, **fields: Any) -> None:
        self.append(name)


class World:
    """Simulated servers, and a fleet that watches them."""

    def __init__(self) -> None:
        clock = SystemClock()
        self.events = Events()
        settings = HealthSettings(**FAST)  # type: ignore[arg-type]
        self.fleet = Fleet(clock, LatencyPredictor(), self.events, lambda instance: OpenAICompatibleEngine(instance, clock), settings)
        self.servers: list[SimEngine] = []

    async def serve(self, port: int = 0, **options: Any) -> SimEngine:
        server = SimEngine(**{"model_name": "m", **options})
        await server.start("127.0.0.1", port)
        self.servers.append(server)
        return server

    def watch(self, server: SimEngine, **fields: Any) -> ExecutionInstance:
        instance = ExecutionInstance(instance_id="a", url=server.url, **fields)
        self.fleet.add(instance)
        self.fleet.start()
        return instance

    async def end(self) -> None:
        await self.fleet.stop()
        for server in self.servers:
            await server.stop()


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    yield world
    await world.end()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10.0):
        while not condition():
            await asyncio.sleep(0.005)


class Ignore:
    """A Sink that wants nothing."""

    def started(self, status: int, headers: Headers, call: Call) -> None: ...
    def chunk(self, data: bytes) -> None: ...
    def tokens(self, n: int, first_s: float, last_s: float) -> None: ...
    def finished(self, outcome: EngineOutcome) -> None: ...
    def failed(self, error: ControlPlaneError) -> None: ...


@pytest.mark.parametrize(
    ("kind", "kinds"),
    [("generate", {"chat", "completion"}), ("embedding", {"embedding", "rerank", "score"})],
    ids=["generate", "embedding"],
)
async def test_a_server_given_by_its_address_alone_tells_the_rest(world: World, kind: str, kinds: set[str]) -> None:
    server = await world.serve(kind=kind)
    instance = world.watch(server, warmup=True)
    await until(lambda: instance.is_usable)
    assert instance.model_name == "m"
    assert instance.supported_request_types == kinds
    assert instance.engine.simulated
    assert instance.engine.version == "0.32.0"
    assert instance.engine.max_model_len_tokens == server.context
    assert instance.engine.kv_block_size_tokens == server.profile.block_size_tokens
    assert instance.engine.kv_block_count == server.profile.kv_block_count
    assert "warmup_done" in world.events
    assert "engine_metrics_missing" not in world.events


async def test_killed_and_back_with_another_model(world: World) -> None:
    server = await world.serve()
    instance = world.watch(server, model_name="m")
    await until(lambda: "instance_up" in world.events)
    port = server.port
    await server.kill()
    await until(lambda: instance.health_status == "unhealthy")
    assert world.fleet.eligible(CHAT) == []
    other = await world.serve(port, model_name="other")
    await until(lambda: instance.health_status == "wrong_model")
    await other.kill()
    await world.serve(port)
    await until(lambda: instance.is_usable)
    assert world.fleet.eligible(CHAT) == [instance]
    assert world.events.count("wrong_model") == 1


async def test_hung_and_back(world: World) -> None:
    server = await world.serve()
    instance = world.watch(server, model_name="m")
    await until(lambda: "instance_up" in world.events)
    server.hang()
    await until(lambda: instance.health_status == "unhealthy")
    assert world.fleet.eligible(CHAT) == [instance], "with nothing better, it may still answer"
    server.resume()
    await until(lambda: instance.is_usable)


async def test_the_cap_of_a_full_engine_is_learned_under_load(world: World) -> None:
    server = await world.serve(profile=replace(profile("h100-llama3-8b"), max_num_seqs=8))
    instance = world.watch(server, model_name="m")
    await until(lambda: "instance_up" in world.events)
    wire = WireRequest("/v1/completions", b'{"model":"m","prompt":"on and on","max_tokens":3000,"ignore_eos":true}')
    calls = []
    for _ in range(40):
        world.fleet.placed(instance, 1.0)
        calls.append(world.fleet.engine("a").start(Leg("a"), wire, Ignore(), RequestMetadata(prompt="on and on")))
    await until(lambda: instance.learned_concurrency is not None)
    assert instance.learned_concurrency == 12
    assert world.fleet.with_room(CHAT) == []
    for call in calls:
        call.cancel()
        world.fleet.released(instance, 1.0)
    assert world.fleet.with_room(CHAT) == [instance]
