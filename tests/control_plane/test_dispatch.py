"""The dispatcher at work in a manager over scripted engines: when it looks, what it never passes, what it puts back."""

from __future__ import annotations

import asyncio

import pytest
from scripted_engine import ScriptedCall
from scripted_world import Make, World, until

from control_plane import (
    ControlPlaneError,
    EngineError,
    ExecutionInstance,
    InstanceFailed,
    PrefillingConfig,
    RequestMetadata,
    SchedulingDecision,
    SchedulingPolicy,
    compiled,
)
from control_plane.fleet import HealthSettings
from control_plane.protocols import FleetView

LOST = InstanceFailed("connection lost")


def running(world: World, name: str) -> list[str]:
    return [call.request.request_id for call in world.open_on(name)]


async def test_a_place_that_a_cancelled_or_failed_request_leaves_is_taken_at_once(make: Make) -> None:
    world = make("")
    world.add("a", max_concurrent_requests=1)
    await world.manager.start()
    for name in ("first", "second", "third"):
        await world.submit(name)
    await world.manager.cancel_request("first")
    await asyncio.sleep(0)
    assert running(world, "a") == ["second"]
    world.manager.fail(world.manager._records.get("second"), ControlPlaneError("its caller gave it up"))
    await asyncio.sleep(0)
    assert running(world, "a") == ["third"]


async def test_of_many_that_are_cancelled_together_none_is_sent_first(make: Make) -> None:
    world = make("")
    world.add("a", max_concurrent_requests=1)
    await world.manager.start()
    for n in range(100):
        await world.submit(f"r{n}")
    for n in range(99):
        await world.manager.cancel_request(f"r{n}")
    await asyncio.sleep(0)
    assert [call.request.request_id for call in world.engines["a"].calls] == ["r0", "r99"]


@pytest.mark.skipif(compiled.in_use(), reason="a method of a compiled class cannot be replaced")
async def test_an_instance_with_room_looks_only_at_its_lanes(make: Make) -> None:
    world = make("")
    world.add("a", max_concurrent_requests=1)
    world.add("b", model_name="n", max_concurrent_requests=1)
    await world.manager.start()
    for name, model in (("a1", "m"), ("b1", "n"), ("b2", "n"), ("a2", "m")):
        await world.submit(name, model_name=model)
    looked_at: list[str] = []
    fleet, with_room = world.manager.fleet, world.manager.fleet.with_room
    fleet.with_room = lambda lane, limit=None: looked_at.append(lane.model) or with_room(lane, limit)  # type: ignore[func-returns-value,method-assign]
    world.open_on("a")[0].answer()
    assert running(world, "a") == ["a2"]
    assert set(looked_at) == {"m"}


async def test_a_request_that_kills_engines_stops_at_two_also_over_kept_connections(make: Make) -> None:
    """The kept connection broke under it and nobody takes a new one: that engine is gone at once, and this was an attempt."""
    world = make("abcd", routing_strategy="round_robin")
    world.on_start = lambda call: call.fail(InstanceFailed("refused", connected=False, reached=True))
    await world.manager.start()
    await world.submit("poison")
    status = await world.status("poison")
    assert (status.state, status.error.code) == ("failed", "instance_failed")  # type: ignore[union-attr]
    assert sorted(instance.health_status for instance in world.manager.get_instances()) == ["healthy"] * 2 + ["unhealthy"] * 2


class AlwaysA(SchedulingPolicy):
    """Thinks for a moment, and then always the same."""

    async def schedule(self, request: RequestMetadata, instances: list[ExecutionInstance]) -> SchedulingDecision:
        await asyncio.sleep(0)
        return SchedulingDecision("a", request.request_id)


async def test_a_policy_of_ones_own_does_not_pass_a_hard_cap(make: Make) -> None:
    world = make("", scheduling_policy=AlwaysA())
    world.add("a", max_concurrent_requests=2)
    world.add("b", max_concurrent_requests=4)
    await world.manager.start()
    names = [f"r{n}" for n in range(8)]
    for name in names:
        await world.submit(name)
    seen: list[str] = []
    while len(seen) < len(names):
        await until(lambda: world.open_on("a"))
        assert len(world.open_on("a")) <= 2
        assert not world.open_on("b")
        call: ScriptedCall = world.open_on("a")[0]
        seen.append(call.request.request_id)
        call.answer()
    assert seen == names, "in the order of their coming"


class SlowForM(SchedulingPolicy):
    async def schedule(self, request: RequestMetadata, instances: list[ExecutionInstance]) -> SchedulingDecision:
        if request.model_name == "m":
            await asyncio.Event().wait()
        return SchedulingDecision(instances[0].instance_id, request.request_id)


async def test_a_policy_that_thinks_long_over_one_model_holds_up_no_other(make: Make) -> None:
    world = make("a", scheduling_policy=SlowForM())
    world.add("b", model_name="n", max_concurrent_requests=1)
    await world.manager.start()
    for n in range(5):
        await world.submit(f"slow{n}", model_name="m")
    await world.submit("r", model_name="n")
    await until(lambda: running(world, "b") == ["r"])


async def test_an_engine_that_raises_ends_that_request_and_takes_up_no_place(make: Make) -> None:
    world = make("a")

    def raises(call: ScriptedCall) -> None:
        raise ValueError("a line break in a header")

    world.on_start = raises
    await world.manager.start()
    await world.submit("r")
    status = await world.status("r")
    assert status.state == "failed"
    assert "line break" in str(status.error)
    (instance,) = world.manager.get_instances()
    assert instance.active_requests == 0
    assert instance.is_usable


async def test_a_preference_is_no_reason_to_wait_when_its_role_is_full(make: Make) -> None:
    world = make("")
    world.add("p", instance_type="prefilling", prefilling_config=PrefillingConfig(target_batch_size=1))
    world.add("g")
    await world.manager.start()
    for name in ("first", "second"):
        await world.submit(name, preferred_instance_id="p", input_tokens=5000)
    assert (running(world, "p"), running(world, "g")) == (["first"], ["second"])


class ByClass(SchedulingPolicy):
    """Keys that cannot be compared with arrival times."""

    def key(self, request: RequestMetadata, arrival_s: float, view: FleetView) -> float:
        return float(request.priority)


async def test_a_retry_after_a_change_of_policy_stands_where_the_new_one_puts_it(make: Make) -> None:
    world = make("", scheduling_policy="fifo")
    world.add("a", max_concurrent_requests=1)
    world.add("b", max_concurrent_requests=1)
    await world.manager.start()
    await world.submit("urgent", priority="critical")
    for n in range(4):
        await world.submit(f"r{n}")
    world.manager.update_policy(ByClass())
    (call,) = [call for call in world.open if call.request.request_id == "urgent"]
    call.fail(LOST)
    assert next(iter(world.manager.pending_queue)).request_id == "urgent"


async def test_a_request_that_started_at_once_comes_back_with_its_key(make: Make) -> None:
    asked: list[str] = []

    class Noting(SchedulingPolicy):
        def key(self, request: RequestMetadata, arrival_s: float, view: FleetView) -> float:
            asked.append(request.request_id)
            return arrival_s

    world = make("", scheduling_policy="fifo")
    world.add("a", max_concurrent_requests=1)
    world.add("b", max_concurrent_requests=1)
    await world.manager.start()
    world.manager.update_policy(Noting())
    await world.submit("first")
    await world.submit("second")
    (call,) = [call for call in world.open if call.request.request_id == "first"]
    call.fail(LOST)
    assert [request.request_id for request in world.manager.pending_queue] == ["first"]
    assert asked == ["first", "second"]


async def test_an_engines_answer_is_given_at_once_when_no_other_is_up(make: Make) -> None:
    """Waiting for one that is down cannot bring more than what an engine has said already."""
    world = make("ab", routing_strategy="round_robin")
    await world.manager.start()
    other = world.manager.fleet.get("b")
    assert other is not None
    other.health_status = "unhealthy"
    await world.submit("r")
    world.open_on("a")[0].fail(EngineError(429, b'{"error":{"message":"too much to do"}}'))
    status = await world.status("r")
    assert (status.state, str(status.error)) == ("failed", "too much to do")
    await world.submit("died")
    world.open_on("a")[0].fail(LOST)
    assert await world.state("died") == "queued", "its engine died: another may come up"


@pytest.mark.parametrize("pd_separation", [True, False])
async def test_if_all_are_bad_all_are_candidates(make: Make, pd_separation: bool) -> None:
    world = make("ab", enable_pd_separation=pd_separation)
    await world.manager.start()
    for instance in world.manager.get_instances():
        for _ in range(5):
            world.manager.fleet.record_failure(instance, EngineError(500, b"{}"))
    assert not any(instance.is_usable for instance in world.manager.get_instances())
    await world.submit("r")
    world.open[0].answer()
    assert await world.state("r") == "completed"


async def test_a_hung_engine_that_is_the_last_resort_keeps_nothing_for_ever(make: Make) -> None:
    fast = HealthSettings(probe_interval_s=0.02, down_interval_s=0.02, down_interval_max_s=0.02)
    world = make("a", no_instance_timeout_s=0.4, health=fast)
    await world.manager.start()
    (instance,) = world.manager.get_instances()
    await until(lambda: world.engines)

    async def silent(path: str, timeout_s: float) -> tuple[int, bytes]:
        raise InstanceFailed("no answer", timed_out=True)

    world.engines["a"].get = silent  # type: ignore[method-assign]
    await until(lambda: instance.health_status == "unhealthy")
    await world.submit("r")
    assert running(world, "a") == ["r"], "it may answer after all"
    status = await asyncio.wait_for(world.manager.result("r"), 5)
    assert (status.state, status.error.code) == ("failed", "instance_failed")  # type: ignore[union-attr]
    assert not world.open


async def test_a_stream_that_is_no_json_raises_an_error_of_ours(make: Make) -> None:
    world = make("a")
    await world.manager.start()

    async def read() -> list[str]:
        return [text async for text in world.manager.stream(RequestMetadata(request_id="s", prompt="x"))]

    reading = asyncio.create_task(read())
    await until(lambda: world.open)
    world.open[0].begin(b"data: {garbage\n\n")
    with pytest.raises(InstanceFailed, match="not JSON"):
        await reading
