"""Policies and routers of the user's own in all their shapes: what they decide holds, within what the instances can take and serve."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence

import pytest
from scripted_world import Make, until

from control_plane import (
    ExecutionInstance,
    RequestMetadata,
    RequestRouter,
    RoutingStrategy,
    SchedulingDecision,
    SchedulingPolicy,
)
from control_plane.protocols import FleetView
from control_plane.queue_order import QueueState

Instances = list[ExecutionInstance]


def to(instance: ExecutionInstance | str, request: RequestMetadata) -> SchedulingDecision:
    return SchedulingDecision(instance if isinstance(instance, str) else instance.instance_id, request.request_id)


class Last(SchedulingPolicy):
    async def schedule(self, request: RequestMetadata, instances: Instances) -> SchedulingDecision:
        return to(instances[-1], request)


class PlainLast(SchedulingPolicy):
    def schedule(self, request: RequestMetadata, instances: Instances) -> SchedulingDecision:  # type: ignore[override]
        return to(instances[-1], request)


class ForeignLast:
    def schedule(self, request: RequestMetadata, instances: Instances) -> SchedulingDecision:
        return to(instances[-1], request)


class Always(SchedulingPolicy):
    """Wherever it is told, whatever the candidates are."""

    def __init__(self, instance_id: str) -> None:
        self.instance_id = instance_id
        self.asked = 0

    async def schedule(self, request: RequestMetadata, instances: Instances) -> SchedulingDecision:
        self.asked += 1
        return to(self.instance_id, request)


class TestPlacing:
    @pytest.mark.parametrize("policy", [Last, PlainLast, ForeignLast])
    async def test_a_hard_cap_holds_and_the_next_is_asked_again(self, make: Make, policy: type) -> None:
        world = make("", scheduling_policy=policy())
        for name in "ab":
            world.add(name, max_concurrent_requests=1)
        await world.manager.start()
        for name in ("one", "two", "three"):
            await world.submit(name)
        await until(lambda: len(world.open) == 2)
        assert [len(world.open_on(name)) for name in "ab"] == [1, 1]
        for n in range(3):
            await until(lambda: world.open)
            assert max(instance.active_requests for instance in world.manager.get_instances()) == 1, n
            world.open[0].answer()
        await until(lambda: world.manager.get_metrics().completed_requests == 3)

    async def test_one_that_insists_on_a_full_instance_waits_for_it_and_is_not_asked_for_ever(self, make: Make) -> None:
        policy = Always("b")
        world = make("a", scheduling_policy=policy)
        world.add("b", max_concurrent_requests=1)
        await world.manager.start()
        await world.submit("one")
        await until(lambda: world.open)
        await world.submit("two")
        await until(lambda: policy.asked == 2)
        await asyncio.sleep(0.05)
        assert policy.asked < 10
        assert (world.open_on("a"), len(world.open_on("b"))) == ([], 1)
        world.open[0].answer()
        await until(lambda: world.open)
        world.open[0].answer()
        assert await world.manager.result("two") == "completed"

    async def test_a_waiting_one_can_be_cancelled(self, make: Make) -> None:
        policy = Always("a")
        world = make("", scheduling_policy=policy)
        world.add("a", max_concurrent_requests=1)
        world.add("b")
        await world.manager.start()
        await world.submit("one")
        await until(lambda: world.open)
        await world.submit("two")
        await until(lambda: policy.asked == 2)
        assert await world.manager.cancel_request("two")
        world.open[0].answer()
        await until(lambda: world.manager.get_metrics().active_requests == 0)
        assert await world.state("two") == "cancelled"
        assert len(world.engines["a"].calls) == 1

    @pytest.mark.parametrize("form", ["policy", "coroutine", "place"])
    async def test_never_on_an_instance_of_another_model(self, make: Make, form: str) -> None:
        class Coroutine:
            async def select_instance(self, request: RequestMetadata, available_instances: Instances) -> ExecutionInstance:
                return other

        class Place(RoutingStrategy):
            def place(self, request: RequestMetadata, candidates: Sequence[ExecutionInstance], view: FleetView) -> object:  # type: ignore[override]
                return RequestRouter("random").place(request, [other], view)

        options: dict[str, dict[str, object]] = {
            "policy": {"scheduling_policy": Always("other")},
            "coroutine": {"routing_strategy": type("Own", (RequestRouter,), {"select_instance": Coroutine.select_instance})()},
            "place": {"routing_strategy": Place()},
        }
        world = make("a", **options[form])
        other = world.add("other", model_name="another")
        await world.manager.start()
        await world.submit("r", model_name="m")
        status = await asyncio.wait_for(world.manager.result("r"), 5)
        assert status == "failed"
        assert "chose 'other', which does not serve this request" in str(status.error)


class Newest(SchedulingPolicy):
    """Last come, first served."""

    def get_next_request(
        self, pending_queue: Iterable[RequestMetadata], available_instances: Sequence[ExecutionInstance]
    ) -> RequestMetadata:
        return list(pending_queue)[-1]


class ForeignNewest(ForeignLast):
    get_next_request = Newest.get_next_request


class TestOrder:
    @pytest.mark.parametrize("policy", [Newest, ForeignNewest])
    async def test_get_next_request_of_ones_own_is_the_order(self, make: Make, policy: type) -> None:
        world = make("", scheduling_policy=policy())
        world.add("a", max_concurrent_requests=1)
        for name in ("one", "two", "three"):
            await world.submit(name)
        await world.manager.start()
        for name in ("three", "two", "one"):
            await until(lambda: world.open)
            assert world.open[0].request.request_id == name
            world.open[0].answer()

    async def test_it_is_offered_what_could_start_and_may_wait(self, make: Make) -> None:
        seen: list[tuple[list[str], list[str]]] = []

        class Holding(SchedulingPolicy):
            hold = True

            def get_next_request(
                self, pending_queue: Iterable[RequestMetadata], available_instances: Sequence[ExecutionInstance]
            ) -> RequestMetadata | None:
                waiting = list(pending_queue)
                seen.append(([r.request_id for r in waiting], [i.instance_id for i in available_instances]))
                return None if self.hold else waiting[0]

        policy = Holding()
        world = make("a", scheduling_policy=policy)
        world.add("full", model_name="other", health_status="unhealthy")
        await world.submit("of-a", model_name="m")
        await world.submit("of-full", model_name="other")
        await world.manager.start()
        assert seen[-1] == (["of-a"], ["a"])
        assert world.open == []
        policy.hold = False
        await until(lambda: world.open)  # asked again at the next tick
        world.open[0].answer()
        assert await world.state("of-a") == "completed"

    @pytest.mark.parametrize("answer", [RequestMetadata(request_id="stranger"), 7, ZeroDivisionError("mine")])
    async def test_a_foreign_answer_or_an_error_fails_one_request_and_says_so(self, make: Make, answer: object) -> None:
        class Odd(SchedulingPolicy):
            def get_next_request(self, pending_queue: object, available_instances: object) -> RequestMetadata | None:
                if isinstance(answer, Exception):
                    raise answer
                return answer  # type: ignore[return-value]

        world = make("a", scheduling_policy=Odd())
        await world.manager.start()
        await world.submit("r")
        status = await world.status("r")
        assert status == "failed"
        assert "Odd" in str(status.error)
        world.manager.update_policy("fifo")
        await world.submit("next")
        assert len(world.open) == 1


class TestHooks:
    async def test_a_coroutine_is_said_not_to_run(self, make: Make) -> None:
        class Later(SchedulingPolicy):
            async def on_request_completed(self, request: RequestMetadata, info: object) -> None: ...  # type: ignore[override]

            async def on_instance_registered(self, instance: ExecutionInstance) -> None: ...  # type: ignore[override]

        world = make("a", scheduling_policy=Later(), answer=True)
        await world.manager.start()
        await world.submit("r")
        said = [event.message for event in world.manager.events.recent() if event.name == "policy_hook_failed"]
        assert [message.split()[0] for message in reversed(said)] == ["on_instance_registered", "on_request_completed"]
        assert all("make it a plain function" in message for message in said)

    async def test_a_review_that_raises_is_said_once(self, make: Make) -> None:
        class Nervous(SchedulingPolicy):
            asked = 0

            def review(self, state: QueueState) -> str | None:
                self.asked += 1
                raise RuntimeError("nerves")

        policy = Nervous()
        world = make("a", scheduling_policy=policy)
        await world.manager.start()
        await until(lambda: policy.asked)
        await asyncio.sleep(0.6)
        assert policy.asked == 1
        assert [event.name for event in world.manager.events.recent()].count("policy_hook_failed") == 1


class TestRouters:
    @pytest.mark.parametrize("answer", ["instance", "id"])
    async def test_a_subclass_may_answer_as_any_object_may(self, make: Make, answer: str) -> None:
        class Second(RoutingStrategy):
            def place(self, request: RequestMetadata, candidates: Sequence[ExecutionInstance], view: FleetView) -> object:  # type: ignore[override]
                return candidates[1] if answer == "instance" else candidates[1].instance_id

        world = make("ab", routing_strategy=Second(), answer=True)
        await world.manager.start()
        await world.submit("r")
        decision = (await world.status("r")).decision
        assert decision is not None
        assert (decision.instance_id, decision.router) == ("b", "Second")

    async def test_one_that_chooses_nothing_says_so(self, make: Make) -> None:
        class Nothing(RequestRouter):
            async def select_instance(self, *given: object, **named: object) -> ExecutionInstance:  # type: ignore[override]
                return None  # type: ignore[return-value]

        world = make("a", routing_strategy=Nothing())
        await world.manager.start()
        await world.submit("r")
        status = await asyncio.wait_for(world.manager.result("r"), 5)
        assert "the router Nothing" in str(status.error)
        assert "chose None, which is no instance" in str(status.error)
