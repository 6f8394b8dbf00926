"""A request may wait for the instance that would cost it and the others least, although another has room."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from random import Random

import pytest
from routing_world import World as Priced
from routing_world import asking
from scripted_world import Make, World, ids, stream

from control_plane import RequestMetadata
from control_plane.dispatch import MOST_WAITING
from control_plane.fleet.prefix.pieces import PIECE_BYTES
from control_plane.protocols import FleetView
from control_plane.router import create_strategy
from control_plane.router.base import RoutingStrategy
from control_plane.router.placement import Placement
from control_plane.router.pricing import priced
from control_plane.types import ExecutionInstance


class Home(RoutingStrategy):
    """Where a request asks to be (its prompt is made of the instance's name), as long as less than ``patience_ms`` waits there."""

    name = "home"
    weighs_waiting = True
    patience_ms = 1e9

    def __init__(self, rng: Random | None = None) -> None:
        self.asked: list[tuple[str, list[str]]] = []

    def place(self, request: RequestMetadata, candidates: Sequence[ExecutionInstance], view: FleetView) -> Placement:
        self.asked.append((request.request_id, [one.instance_id for one in candidates]))
        for instance in candidates:
            if instance.instance_id == str(request.prompt)[0] and instance.awaited_ms < self.patience_ms:
                return Placement(instance, 1.0)
        return Placement(candidates[0], 2.0)


class Elsewhere(Home):
    weighs_waiting = False


def asks_for(world: World, name: str, home: str) -> asyncio.Task[None]:
    return stream(world, name, home * PIECE_BYTES)


async def full(make: Make, strategy: object, *names: str) -> tuple[World, dict[str, ExecutionInstance], list[asyncio.Task[None]]]:
    """``b`` (or the names given) has all that it may have ahead; ``a`` has nothing."""
    world = make("", routing_strategy=strategy, dispatch_ahead_ms=0.001)
    instances = {name: world.add(name) for name in ("a", "b")}
    await world.manager.start()
    tasks = [asks_for(world, f"{name}{n}", name) for name in names or ("b",) for n in range(2)]
    await asyncio.sleep(0)
    return world, instances, tasks


def end(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()


async def test_it_waits_for_the_one_that_it_would_rather_have_and_gets_its_next_place(make: Make) -> None:
    world, instances, tasks = await full(make, Home())
    tasks += [asks_for(world, "r0", "b"), asks_for(world, "r1", "b")]
    await asyncio.sleep(0)
    assert (ids(world.open_on("a")), ids(world.open_on("b"))) == ([], ["b0", "b1"])
    assert instances["b"].awaited_ms > 0.0

    tasks.append(asks_for(world, "mine", "a"))
    await asyncio.sleep(0)
    assert ids(world.open_on("a")) == ["mine"], "who waits for another holds up nobody"

    world.open_on("b")[0].begin()
    assert ids(world.open_on("b")) == ["b0", "b1", "r0"]
    assert instances["b"].awaited_ms > 0.0, "one still waits"
    await world.manager.cancel_request("r1")
    assert instances["b"].awaited_ms == 0.0
    end(tasks)


async def test_a_router_that_does_not_weigh_waiting_is_asked_about_those_with_room_only(make: Make) -> None:
    strategy = Elsewhere()
    world, _, tasks = await full(make, strategy)
    strategy.asked.clear()
    tasks.append(asks_for(world, "r0", "b"))
    await asyncio.sleep(0)
    assert strategy.asked == [("r0", ["a"])]
    assert ids(world.open_on("a")) == ["r0"]
    end(tasks)


async def test_an_object_that_is_no_subclass_of_ours_may_say_so_too(make: Make) -> None:
    class Plain:
        name = "plain"
        weighs_waiting = True

        def place(self, request: RequestMetadata, candidates: Sequence[ExecutionInstance], view: FleetView) -> str:
            return str(request.prompt)[0]

    world, _, tasks = await full(make, Plain())
    tasks.append(asks_for(world, "r0", "b"))
    await asyncio.sleep(0)
    assert (ids(world.open_on("a")), ids(world.open_on("b"))) == ([], ["b0", "b1"])
    end(tasks)


async def test_what_waits_for_an_instance_counts_for_those_that_come_after(make: Make) -> None:
    strategy = Home()
    world, instances, tasks = await full(make, strategy)
    tasks.append(asks_for(world, "r0", "b"))
    await asyncio.sleep(0)
    strategy.patience_ms = instances["b"].awaited_ms
    tasks.append(asks_for(world, "r1", "b"))
    await asyncio.sleep(0)
    assert (ids(world.open_on("a")), ids(world.open_on("b"))) == (["r1"], ["b0", "b1"])
    end(tasks)


async def test_who_holds_nothing_anywhere_waits_for_none(make: Make) -> None:
    strategy = Home()
    world, _, tasks = await full(make, strategy)
    strategy.asked.clear()
    tasks.append(asks_for(world, "new", "c"))
    await asyncio.sleep(0)
    assert strategy.asked == [("new", ["a"])]
    assert ids(world.open_on("a")) == ["new"]
    end(tasks)


async def test_one_at_its_cap_is_not_waited_for(make: Make) -> None:
    world, instances, tasks = await full(make, Home())
    instances["b"].max_concurrent_requests = 2
    tasks.append(asks_for(world, "r0", "b"))
    await asyncio.sleep(0)
    assert ids(world.open_on("a")) == ["r0"]
    end(tasks)


async def test_no_engine_runs_dry_behind_many_that_wait_for_another(make: Make) -> None:
    world, _, tasks = await full(make, Home())
    tasks += [asks_for(world, f"r{n}", "b") for n in range(MOST_WAITING + 4)]
    await asyncio.sleep(0)
    assert ids(world.open_on("b")) == ["b0", "b1"]
    assert ids(world.open_on("a")) == ["r0"], "the first of them, and the others wait"
    end(tasks)


async def test_it_is_decided_anew_when_something_changes(make: Make) -> None:
    strategy = Home()
    world, instances, tasks = await full(make, strategy, "b", "a")
    tasks.append(asks_for(world, "r0", "b"))
    await asyncio.sleep(0)
    assert ids(world.open_on("a")) == ["a0", "a1"]
    strategy.patience_ms = 0.0
    world.open_on("a")[0].begin()
    assert ids(world.open_on("a")) == ["a0", "a1", "r0"], "waiting has become too dear"
    assert instances["b"].awaited_ms == 0.0
    end(tasks)


async def test_one_that_is_gone_is_not_waited_for_any_longer(make: Make) -> None:
    world, instances, tasks = await full(make, Home())
    tasks.append(asks_for(world, "r0", "b"))
    await asyncio.sleep(0)
    assert ids(world.open_on("a")) == []
    instances["b"].is_available = False
    tasks.append(asks_for(world, "r1", "a"))
    await asyncio.sleep(0)
    assert ids(world.open_on("a")) == ["r0", "r1"], "looked at when the next one came"
    end(tasks)


def test_what_is_awaited_there_is_part_of_the_wait() -> None:
    world = Priced(1, 1)
    world.instances[0].awaited_ms = 250.0
    prices = priced(asking(1000), world.instances, world.view)
    assert prices.waiting == [250.0, 0.0]
    assert prices.delay[0] > prices.delay[1], "and those who come behind wait for it as well"


@pytest.mark.parametrize("name", ["prefix_aware", "predicted_latency", "adaptive"])
def test_who_prices_waiting_says_so(name: str) -> None:
    assert create_strategy(name).weighs_waiting


@pytest.mark.parametrize("name", ["load_balanced", "affinity", "locality", "round_robin", "random", "power_of_two", "least_response_time"])
def test_who_does_not_is_not_asked_to_wait(name: str) -> None:
    assert not create_strategy(name).weighs_waiting
