"""What was sent ahead and has shown nothing gives way to a more urgent request; nothing else does."""

from __future__ import annotations

import asyncio

import pytest
from scripted_engine import ScriptedCall
from scripted_world import Make, World, ids, stream

from control_plane.pulling_back import BESIDE, MOST


def call_of(world: World, name: str) -> ScriptedCall:
    (found,) = [call for call in world.open if call.request.request_id == name]
    return found


@pytest.fixture
def urgent_world(make: Make) -> World:
    world = make("", scheduling_policy="priority", dispatch_ahead_ms=0.001)
    world.add("a")
    return world


async def held(world: World) -> list[asyncio.Task[None]]:
    """One that has begun, two that were sent since then, two that wait here."""
    await world.manager.start()
    tasks = [stream(world, name, priority="low") for name in ("begun", "ahead1")]
    await asyncio.sleep(0)
    call_of(world, "begun").begin()
    tasks += [stream(world, name, priority="low") for name in ("ahead2", "waits1", "waits2")]
    await asyncio.sleep(0)
    assert ids(world.open_on("a")) == ["begun", "ahead1", "ahead2"]
    return tasks


async def test_what_was_sent_since_the_last_first_token_gives_way_and_is_sent_again(urgent_world: World) -> None:
    world = urgent_world
    tasks = await held(world)
    tasks.append(stream(world, "urgent", priority="critical"))
    await asyncio.sleep(0)
    assert ids(world.open_on("a")) == ["begun", "ahead1", "urgent"], "ahead1 may be computed already"
    assert next(iter(world.manager.pending_queue)).request_id == "ahead2"
    call_of(world, "ahead1").begin()
    call_of(world, "urgent").begin()
    assert ids(world.open_on("a")) == ["begun", "ahead1", "urgent", "ahead2", "waits1"], "with its old place"
    assert world.manager.get_metrics().failed_requests == 0
    for task in tasks:
        task.cancel()


async def test_one_that_may_be_computed_gives_way_only_to_save_a_deadline(urgent_world: World) -> None:
    world = urgent_world
    tasks = await held(world)
    tasks += [stream(world, name, priority="critical", ttft_slo_ms=1.0) for name in ("u1", "u2")]
    await asyncio.sleep(0)
    assert {"u1", "u2"} <= set(ids(world.open_on("a")))
    assert "begun" in ids(world.open_on("a")), "whose client has seen something runs on"
    for task in tasks:
        task.cancel()


async def test_equals_do_not_give_way(urgent_world: World) -> None:
    world = urgent_world
    tasks = await held(world)
    tasks.append(stream(world, "equal", priority="low"))
    await asyncio.sleep(0)
    assert ids(world.open_on("a")) == ["begun", "ahead1", "ahead2"]
    for task in tasks:
        task.cancel()


async def test_first_come_first_served_takes_nothing_back(make: Make) -> None:
    world = make("", scheduling_policy="fifo", dispatch_ahead_ms=0.001)
    world.add("a")
    tasks = await held(world)
    tasks.append(stream(world, "urgent", priority="critical"))
    await asyncio.sleep(0)
    assert ids(world.open_on("a")) == ["begun", "ahead1", "ahead2"]
    for task in tasks:
        task.cancel()


async def test_nobody_is_taken_back_for_ever(urgent_world: World) -> None:
    world = urgent_world
    tasks = await held(world)
    for n in range(MOST + 3):
        tasks.append(stream(world, f"urgent{n}", priority="critical"))
        await asyncio.sleep(0)
        for name in (f"urgent{n}", "ahead1"):
            if name in ids(world.open_on("a")):
                call_of(world, name).begin()
    calls = [call for call in world.engines["a"].calls if call.request.request_id == "ahead2"]
    assert 1 < len(calls) <= MOST + 1
    assert not calls[-1].cancelled
    for task in tasks:
        task.cancel()


async def test_usual_requests_make_none_give_way(make: Make) -> None:
    world = make("", scheduling_policy="priority", dispatch_ahead_ms=0.001)
    world.add("a")
    await world.manager.start()
    tasks = [stream(world, name, priority="background") for name in ("one", "two", "three")]
    await asyncio.sleep(0)
    sent = [call.request.request_id for call in world.open_on("a")]
    tasks.append(stream(world, "usual", priority="normal"))
    await asyncio.sleep(0)
    assert [call.request.request_id for call in world.open_on("a")] == sent
    for task in tasks:
        task.cancel()


async def test_an_engine_that_orders_by_priority_gets_the_urgent_one_beside_what_is_there(make: Make) -> None:
    world = make("", scheduling_policy="priority", dispatch_ahead_ms=0.001)
    world.add("a", priority_scheduling=True)
    tasks = await held(world)
    tasks.append(stream(world, "urgent", priority="critical"))
    tasks.append(stream(world, "equal", priority="low"))
    await asyncio.sleep(0)
    assert ids(world.open_on("a")) == ["begun", "ahead1", "ahead2", "urgent"]
    assert b'"priority"' in call_of(world, "urgent").wire.body or call_of(world, "urgent").request.priority == 0
    for task in tasks:
        task.cancel()


async def test_where_nothing_can_give_way_the_urgent_one_is_sent_beside_it(make: Make) -> None:
    world = make("", scheduling_policy="priority", dispatch_ahead_ms=0.001)
    world.add("a")
    await world.manager.start()
    tasks = [stream(world, name, priority="low") for name in ("one", "two", "waits")]
    await asyncio.sleep(0)
    call_of(world, "one").begin()
    call_of(world, "two").begin()
    # "waits" is the only one ahead: the engine computes it
    tasks += [stream(world, f"more{n}", priority="low") for n in range(3)]
    await asyncio.sleep(0)
    call_of(world, "waits").begin()
    before = ids(world.open_on("a"))
    tasks += [stream(world, f"urgent{n}", priority="critical") for n in range(BESIDE + 2)]
    await asyncio.sleep(0)
    there = ids(world.open_on("a"))
    urgent = [name for name in there if name.startswith("urgent")]
    assert len(urgent) == BESIDE
    assert set(before) - set(there) <= {"more1"}, "what may be computed stays"
    for task in tasks:
        task.cancel()
