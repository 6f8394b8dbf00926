"""What is sent ahead to an engine: enough that it never runs dry, and no more."""

from __future__ import annotations

import asyncio
import math
from itertools import pairwise

import pytest
from scripted_engine import ScriptedCall
from scripted_world import Make, ids, stream

from control_plane import ControlPlaneManager, ExecutionInstance
from control_plane.fleet.ahead import MOST_MS, READY, count_ahead, count_begun, heard_of, learn, takes_more
from control_plane.simulator.fleet_spec import parse_fleet
from control_plane.simulator.rows import row_of
from control_plane.simulator.run import simulate
from control_plane.simulator.scenario import Arm, Scenario
from control_plane.simulator.workload import TraceRequest, Workload


def test_two_are_always_allowed_and_more_up_to_the_limit() -> None:
    instance = ExecutionInstance("a", dispatch_ahead_ms=100.0)
    for _ in range(READY):
        assert takes_more(instance)
        count_ahead(instance, 1000.0)
    assert not takes_more(instance)
    count_begun(instance, 1000.0)
    assert takes_more(instance), "one that is ready behind the one being computed"
    count_begun(instance, 1000.0)
    for _ in range(7):
        count_ahead(instance, 20.0)
    assert (instance.ahead_requests, takes_more(instance)) == (7, False)
    for _ in range(7):
        count_begun(instance, 20.0)
    assert (instance.ahead_requests, instance.ahead_ms) == (0, 0.0)
    count_begun(instance, 20.0)
    assert (instance.ahead_requests, instance.ahead_ms) == (0, 0.0)


def test_an_engine_that_ran_dry_gets_more_and_one_that_did_not_gets_less() -> None:
    instance = ExecutionInstance("a", dispatch_ahead_ms=100.0)
    learn(instance, sent_s=1.0, now_s=2.0, least_ms=50.0)
    assert instance.dispatch_ahead_ms == 100.0, "nobody was held back"
    instance.held_back, instance.began_s = True, 2.0
    learn(instance, sent_s=2.0, now_s=2.0, least_ms=50.0)
    assert instance.dispatch_ahead_ms == 100.0, "the same round"
    learn(instance, sent_s=2.001, now_s=2.5, least_ms=50.0)
    assert instance.dispatch_ahead_ms == 125.0, "nothing was ready at 2.0"
    learn(instance, sent_s=1.9, now_s=2.5, least_ms=50.0)
    assert 122.0 < instance.dispatch_ahead_ms < 125.0
    for now_s in range(3, 10_000):
        learn(instance, sent_s=1.9, now_s=float(now_s), least_ms=50.0)
    assert instance.dispatch_ahead_ms == 50.0
    for now_s in range(3, 200):
        learn(instance, sent_s=5.0, now_s=float(now_s), least_ms=50.0)
    assert instance.dispatch_ahead_ms == MOST_MS


def test_an_engine_that_says_that_nobody_waits_there_gets_more_once_each_time_it_says_so() -> None:
    instance = ExecutionInstance("a", dispatch_ahead_ms=100.0)
    assert heard_of(instance, 0, 5.0, 0.0) == 5.0
    assert instance.dispatch_ahead_ms == 100.0, "nobody was held back"
    count_ahead(instance, 60.0)
    count_ahead(instance, 60.0)
    instance.held_back, instance.began_s = True, 4.0
    assert heard_of(instance, 3, 5.0, 0.0) == 5.0
    assert instance.dispatch_ahead_ms == 100.0, "some do"
    assert heard_of(instance, 0, 6.0, 5.0) == 6.0
    assert instance.dispatch_ahead_ms == 125.0
    assert heard_of(instance, 0, 6.0, 6.0) == 6.0
    assert instance.dispatch_ahead_ms == 125.0, "it has said nothing since"


async def test_a_first_token_makes_room_and_so_does_an_end_without_one(make: Make) -> None:
    world = make("", dispatch_ahead_ms=0.001)
    instance = world.add("a")
    await world.manager.start()
    tasks = [stream(world, f"r{n}") for n in range(6)]
    await asyncio.sleep(0)
    assert ids(world.open_on("a")) == ["r0", "r1"]
    world.open_on("a")[0].begin()
    assert ids(world.open_on("a")) == ["r0", "r1", "r2"]
    world.open_on("a")[0].begin()
    assert ids(world.open_on("a")) == ["r0", "r1", "r2"], "only the first token makes room"
    world.open_on("a")[0].finish_stream()
    assert ids(world.open_on("a")) == ["r1", "r2"], "one that has begun is no work ahead"
    await world.manager.cancel_request("r1")
    await asyncio.sleep(0)
    assert ids(world.open_on("a")) == ["r2", "r3"]
    assert instance.ahead_requests == 2
    assert instance.dispatch_ahead_ms == 0.001, "a given figure stays"
    for task in tasks:
        task.cancel()


async def test_who_is_placed_because_of_a_first_token_finds_it_in_all_books(make: Make) -> None:
    world = make("", dispatch_ahead_ms=0.001)
    seen: list[tuple[float, int, int]] = []

    def look(call: ScriptedCall) -> None:
        instance = call.engine.instance
        seen.append((world.manager.predictor.queued(instance).prompts, instance.in_flight.waiting, instance.ahead_requests))

    world.on_start = look
    world.add("a")
    await world.manager.start()
    tasks = [stream(world, f"r{n}") for n in range(3)]
    await asyncio.sleep(0)
    world.open_on("a")[0].begin()
    assert seen == [(1.0, 1, 1), (2.0, 2, 2), (2.0, 2, 2)]
    for task in tasks:
        task.cancel()


async def test_what_is_cached_there_is_no_work_ahead(make: Make) -> None:
    world = make("")
    instance = world.add("a")
    await world.manager.start()
    tasks, ahead_ms = [], [0.0]
    for name, prompt in (("new", "shared " * 4000), ("again", "shared " * 4000), ("other", "another " * 3500)):
        tasks.append(stream(world, name, prompt))
        await asyncio.sleep(0)
        ahead_ms.append(instance.ahead_ms)
    new_ms, again_ms, other_ms = (after - before for before, after in pairwise(ahead_ms))
    assert 0.0 < again_ms < 0.5 * new_ms
    assert other_ms == pytest.approx(new_ms, rel=0.01)
    for task in tasks:
        task.cancel()


async def test_answers_that_are_not_streamed_are_not_counted(make: Make) -> None:
    world = make("", dispatch_ahead_ms=0.001)
    instance = world.add("a")
    await world.manager.start()
    for n in range(6):
        await world.submit(f"r{n}")
    assert len(world.open_on("a")) == 6
    assert (instance.ahead_requests, instance.ahead_ms) == (0, 0.0)


def test_throughput_is_that_of_sending_everything_at_once_and_the_rest_waits_here() -> None:
    requests = [TraceRequest(0.001 * n, 200 + 37 * n % 3000, 20 + 31 * n % 200) for n in range(1500)]
    scenario = Scenario(parse_fleet("1xh100-llama3-8b"), Workload("by hand", requests))
    at_once, found = (
        simulate(scenario, Arm("fifo", options=options))
        for options in ({"dispatch_ahead_ms": 1e12, "enable_monitoring": False}, {"enable_monitoring": False})
    )
    assert row_of(found, 1.0)["throughput_rps"] >= 0.99 * row_of(at_once, 1.0)["throughput_rps"]
    assert max(sample.waiting[0] for sample in at_once.samples) > 500
    assert max(sample.waiting[0] for sample in found.samples) < 50


@pytest.mark.parametrize("wrong", [0, -1, math.inf, True, "much"])
def test_a_wrong_figure_is_refused(wrong: object) -> None:
    with pytest.raises(Exception, match="dispatch_ahead_ms"):
        ControlPlaneManager(dispatch_ahead_ms=wrong)  # type: ignore[arg-type]
