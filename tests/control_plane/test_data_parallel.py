"""Data-parallel ranks behind one address: each a target of its own, and what happens to the address happens to all of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import datetime, timedelta
from typing import Any

import pytest

from control_plane import ControlPlaneManager, ExecutionInstance, RequestMetadata
from control_plane.clock import SystemClock
from control_plane.engines import AnswerSink
from control_plane.errors import InstanceFailed, InvalidRequest
from control_plane.fleet import HealthSettings
from control_plane.fleet.ranks import takes_header
from control_plane.job import LaneKey
from control_plane.protocols import WireRequest
from control_plane.sim_engine import SimEngine
from control_plane.types import Leg, RequestKind

CHAT = LaneKey("m", RequestKind.CHAT)
FAST = HealthSettings(probe_interval_s=0.03, probe_timeout_s=0.5, down_interval_s=0.02, down_interval_max_s=0.05, scrape_interval_s=0.03)


class World:
    """A manager over simulated servers with ranks."""

    def __init__(self, **options: Any) -> None:
        self.manager = ControlPlaneManager(health=FAST, **{"routing_strategy": "load_balanced", **options})
        self.engines: list[SimEngine] = []

    async def serve(self, name: str = "a", ranks: int = 2, port: int = 0, **options: Any) -> SimEngine:
        engine = SimEngine(model_name="m", data_parallel_size=ranks, **options)
        await engine.start("127.0.0.1", port)
        self.engines.append(engine)
        if self.manager.fleet.get(name) is None:
            self.manager.register_instance(ExecutionInstance(instance_id=name, url=engine.url, **self.fields))
        return engine

    fields: dict[str, Any] = {}  # noqa: RUF012

    @property
    def targets(self) -> list[str]:
        return [one.instance_id for one in self.manager.fleet.eligible(CHAT)]

    def instance(self, name: str) -> ExecutionInstance:
        found = self.manager.fleet.get(name)
        assert found is not None
        return found

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(10.0):
            while not condition():
                await asyncio.sleep(0.005)

    async def send(self, count: int, **fields: Any) -> list[str]:
        made = [RequestMetadata(prompt="hello there", model_name="m", **{"max_tokens": 4, **fields}) for _ in range(count)]
        return [await self.manager.submit_request(request) for request in made]


class Later:
    """The clock of a server that was started an hour after the others."""

    def __init__(self) -> None:
        self._clock = SystemClock()

    def now_s(self) -> float:
        return self._clock.now_s()

    def utc(self, monotonic_s: float) -> datetime:
        return self._clock.utc(monotonic_s) + timedelta(hours=1)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    world = World()
    await world.manager.start()
    yield world
    await world.manager.stop(drain_timeout_s=0.0)
    for engine in world.engines:
        await engine.stop()


def served(engine: SimEngine) -> list[int]:
    return [rank.model.counters.prefix_queries for rank in engine.ranks]


async def test_each_rank_is_a_target_with_figures_of_its_own(world: World) -> None:
    engine = await world.serve(ranks=3)
    await world.until(lambda: world.targets == ["a@0", "a@1", "a@2"])
    fleet = world.manager.fleet
    assert [one.instance_id for one in fleet.servers()] == ["a"]
    assert [one.instance_id for one in fleet.instances()] == ["a@0", "a@1", "a@2"]
    await world.until(lambda: all(rank.engine.kv_block_count for rank in world.instance("a").ranks))
    counts = [rank.engine.kv_block_count for rank in world.instance("a").ranks]
    assert counts == [engine.model.blocks.total] * 3
    assert world.instance("a").engine.kv_block_count == sum(counts)  # type: ignore[arg-type]


async def test_placement_chooses_the_rank_and_the_header_says_it(world: World) -> None:
    engine = await world.serve()
    await world.until(lambda: world.targets == ["a@0", "a@1"])
    for name, expected in (("a@1", [0, 1]), ("a@0", [1, 1])):
        before = served(engine)
        (request_id,) = await world.send(1, preferred_instance_id=name)
        status = await world.manager.result(request_id)
        assert status.decision is not None
        assert status.decision.instance_id == name
        assert [now > then for now, then in zip(served(engine), [0, 0], strict=True)] == [bool(one) for one in expected]
        assert served(engine)[1 - int(name[-1])] == before[1 - int(name[-1])]


@pytest.mark.parametrize("wire", ["headers", "lines", "none"])
async def test_the_header_goes_with_whatever_else_is_sent(world: World, wire: str) -> None:
    """A request of the gateway's carries its head as lines, one of the Python API's none."""
    engine = await world.serve()
    await world.until(lambda: world.targets == ["a@0", "a@1"])
    given: dict[str, Any] = {
        "headers": {"headers": ((b"content-type", b"application/json"), (b"x-request-id", b"r"))},
        "lines": {"headers": ((b"x-request-id", b"r"),), "lines": b"x-request-id: r\r\ncontent-type: application/json\r\n"},
        "none": {},
    }[wire]
    body = b'{"model":"m","prompt":"hello","max_tokens":1}'
    ended = asyncio.get_running_loop().create_future()
    sink = AnswerSink(lambda sink: ended.set_result(sink.error))
    request = RequestMetadata(request_id="r", prompt="hello", model_name="m")
    world.manager.fleet.engine("a@1").start(Leg("a@1"), WireRequest("/v1/completions", body, **given), sink, request)
    assert await ended is None
    assert [count > 0 for count in served(engine)] == [False, True]


async def test_load_is_spread_over_ranks_and_added_up_for_the_server(world: World) -> None:
    engine = await world.serve(speed=0.5)
    await world.until(lambda: world.targets == ["a@0", "a@1"])
    ids = await world.send(8, max_tokens=2000)
    await world.until(lambda: sum(rank.model.running for rank in engine.ranks) == 8)
    assert [rank.model.running for rank in engine.ranks] == [4, 4]
    server = world.instance("a")
    assert [rank.active_requests for rank in server.ranks] == [4, 4]
    assert server.active_requests == 8
    assert server.outstanding_ms == pytest.approx(sum(rank.outstanding_ms for rank in server.ranks))
    assert all(rank.in_flight.requests == 4 and rank.in_flight.context_tokens > 0 for rank in server.ranks)
    for request_id in ids:
        await world.manager.cancel_request(request_id)
    await world.until(lambda: not server.active_requests)
    assert all(rank.in_flight.context_tokens == rank.in_flight.waiting_tokens == 0 for rank in server.ranks)


async def test_a_dead_address_takes_all_its_ranks_and_comes_back_with_them(world: World) -> None:
    engine = await world.serve()
    other = await world.serve("b", ranks=1)
    await world.until(lambda: world.targets == ["a@0", "a@1", "b"])
    port = engine.port
    await engine.kill()
    await world.until(lambda: world.targets == ["b"])
    (request_id,) = await world.send(1)
    assert str((await world.manager.result(request_id)).state) == "completed"
    assert sum(served(other))
    await world.serve(port=port)
    await world.until(lambda: world.targets == ["a@0", "a@1", "b"])


async def test_a_failure_under_one_rank_is_one_of_the_address(world: World) -> None:
    await world.serve()
    await world.until(lambda: world.targets == ["a@0", "a@1"])
    fleet, rank = world.manager.fleet, world.instance("a@1")
    assert [one.instance_id for one in fleet.eligible(CHAT._replace(avoid=frozenset({"a"})))] == []
    fleet.record_failure(rank, InstanceFailed("connection refused", connected=False))
    assert {str(one.health_status) for one in (world.instance("a"), *fleet.instances())} == {"unhealthy"}


async def test_drained_removed_and_capped_as_one(world: World) -> None:
    world.fields = {"max_concurrent_requests": 3}
    await world.serve()
    await world.until(lambda: world.targets == ["a@0", "a@1"])
    fleet, server = world.manager.fleet, world.instance("a")
    assert [rank.concurrency_limit for rank in server.ranks] == [2, 1]
    server.max_concurrent_requests = 8
    assert [one.concurrency_limit for one in fleet.with_room(CHAT)] == [4, 4]
    server.is_available = False
    assert world.targets == []
    server.is_available = True
    with pytest.raises(InvalidRequest, match="data-parallel rank of 'a'"):
        fleet.drain("a@1")
    fleet.drain("a")
    assert world.targets == []
    fleet.undrain("a")
    assert world.targets == ["a@0", "a@1"]
    fleet.remove("a")
    assert fleet.get("a@0") is None
    assert list(fleet.instances()) == []


async def test_a_server_that_comes_back_with_other_ranks_has_those(world: World) -> None:
    engine = await world.serve(ranks=3)
    await world.until(lambda: len(world.targets) == 3)
    port = engine.port
    await engine.kill()
    await world.until(lambda: not world.targets)
    await world.serve(port=port, ranks=2)
    await world.until(lambda: world.targets == ["a@0", "a@1"])
    assert world.manager.fleet.get("a@2") is None


async def test_what_was_learned_of_a_rank_is_forgotten_with_its_server(world: World) -> None:
    engine = await world.serve()
    await world.until(lambda: world.targets == ["a@0", "a@1"])
    forgotten: list[str] = []
    world.manager.fleet.on_forget = lambda instance: forgotten.append(instance.instance_id)
    port = engine.port
    await engine.kill()
    await world.until(lambda: not world.targets)
    await world.serve(port=port, clock=Later())
    await world.until(lambda: len(world.targets) == 2)
    assert {"a", "a@0", "a@1"} <= set(forgotten)


@pytest.mark.parametrize(
    ("version", "takes"),
    [("0.32.0", True), ("0.11.0rc1", True), ("v1.0.2", True), ("0.10.2", False), ("0.8.5.post1", False), (None, False), ("main", False)],
)
def test_only_versions_that_take_the_header_have_their_ranks_told_apart(version: str | None, takes: bool) -> None:
    assert takes_header(version) is takes
