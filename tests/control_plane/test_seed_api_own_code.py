"""What happens when the user's own code is at fault, slow or odd: policies, routers, hooks, consumers, requests changed under way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence

import pytest
from scripted_world import Make, World, until

from control_plane import (
    ControlPlaneManager,
    ExecutionInstance,
    InstanceFailed,
    InvalidRequest,
    RequestMetadata,
    RequestNotFound,
    RequestPriority,
    RequestStatusInfo,
    RoutingStrategy,
    SchedulingDecision,
    SchedulingPolicy,
)
from control_plane.errors import ConfigurationError
from control_plane.gateway.metrics_page import make_exporter
from control_plane.protocols import FleetView
from control_plane.router import Placement


class BrokenKey(SchedulingPolicy):
    answer: object = None

    def key(self, request: RequestMetadata, arrival_s: float, view: FleetView) -> float:
        if request.request_id.startswith("bad"):
            if self.answer is None:
                raise ZeroDivisionError("my own fault")
            return self.answer  # type: ignore[return-value]
        return arrival_s


class Wordy(BrokenKey):
    answer = "first"


class NotANumber(BrokenKey):
    answer = float("nan")


class TestPolicies:
    @pytest.mark.parametrize("policy", [BrokenKey, Wordy, NotANumber])
    @pytest.mark.parametrize("started", [True, False])
    async def test_one_that_fails_at_a_key_refuses_that_request_only(self, make: Make, policy: type[BrokenKey], started: bool) -> None:
        world = make("a", scheduling_policy=policy())
        if started:
            await world.manager.start()
            with pytest.raises(ConfigurationError, match="policy"):
                await world.submit("bad")
            with pytest.raises(RequestNotFound):
                await world.state("bad")
        else:
            await world.submit("bad")
            await world.submit("before")
            await world.manager.start()
            status = await world.status("bad")
            assert (status.state, status.error.code) == ("failed", "configuration_error")  # type: ignore[union-attr]
            assert await world.state("before") == "running"
        await world.submit("good")
        assert await world.state("good") == "running"

    async def test_one_that_fails_at_the_change_changes_nothing(self, make: Make) -> None:
        world = make("a", scheduling_policy="priority")
        world.manager.get_instances()[0].max_concurrent_requests = 1
        await world.manager.start()
        for name, priority in (("first", 2), ("bad low", 3), ("high", 1)):
            await world.submit(name, priority=RequestPriority(priority))
        with pytest.raises(ConfigurationError, match="my own fault"):
            world.manager.update_policy(BrokenKey())
        assert world.manager.scheduling_policy.name == "priority"
        assert [request.request_id for request in world.manager.pending_queue] == ["high", "bad low"]

    @pytest.mark.parametrize("method", ["narrow", "slack_s"])
    async def test_one_that_fails_while_deciding_fails_the_request_whose_turn_it_was(
        self, make: Make, method: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Broken(SchedulingPolicy):
            pass

        def fail(*args: object, **more: object) -> None:
            raise LookupError("lost my table")

        setattr(Broken, method, fail)
        world = make("a", scheduling_policy=Broken())
        world.manager.get_instances()[0].max_concurrent_requests = 1
        await world.manager.start()
        if method == "narrow":
            await world.submit("r")
            status = await world.status("r")
            assert status.state == "failed"
            assert "lost my table" in str(status.error)
            assert "Broken" in str(status.error)
        else:
            for n in range(3):
                await world.submit(f"r{n}")
            world.open[0].answer()
            ends = [await world.state(f"r{n}") for n in range(3)]
            assert ends == ["completed", "failed", "running"]
        world.manager.update_policy("fifo")
        await world.submit("later")
        while world.open:
            world.open[0].answer()
        assert await world.state("later") == "completed"

    @pytest.mark.parametrize(
        "answer", [None, "a", SchedulingDecision("nobody", "r"), ExecutionInstance("a")], ids=["none", "text", "stranger", "instance"]
    )
    async def test_a_foreign_answer_fails_its_request_and_says_so(self, make: Make, answer: object) -> None:
        class Odd:
            async def schedule(self, request: RequestMetadata, instances: list[ExecutionInstance]) -> object:
                return answer

        world = make("a", scheduling_policy=Odd())
        await world.manager.start()
        await world.submit("r")
        status = await asyncio.wait_for(world.manager.result("r"), 5)
        assert status.state == "failed"
        assert "Odd" in str(status.error)
        assert world.manager.get_status()["queued_requests"] == 0

    async def test_one_that_never_answers_ends_by_the_queues_time_limit_by_cancelling_or_by_stop(self, make: Make) -> None:
        class Endless(SchedulingPolicy):
            async def schedule(self, request: RequestMetadata, instances: list[ExecutionInstance]) -> SchedulingDecision:
                await asyncio.get_running_loop().create_future()
                raise AssertionError

        world = make("a", scheduling_policy=Endless(), queue_timeout_s=0.1)
        await world.manager.start()
        await world.submit("late")
        await world.submit("cancelled")
        assert await world.state("late") == "scheduled"
        assert world.manager.get_metrics().queued_requests == 2, "on no engine"
        assert await world.manager.cancel_request("cancelled")
        ended = await asyncio.wait_for(world.manager.result("late"), 5)
        assert ended.error.code == "timeout"  # type: ignore[union-attr]
        await world.submit("stopped")
        await asyncio.wait_for(world.manager.stop(drain_timeout_s=0.01), 5)
        assert (await world.status("stopped")).error.code == "draining"  # type: ignore[union-attr]
        assert await world.state("cancelled") == "cancelled"

    async def test_a_budget_holds_for_policies_that_place_too(self, make: Make) -> None:
        seen: list[list[str]] = []

        class Dearest(SchedulingPolicy):
            async def schedule(self, request: RequestMetadata, instances: list[ExecutionInstance]) -> SchedulingDecision:
                seen.append([instance.instance_id for instance in instances])
                return SchedulingDecision(instances[-1].instance_id, request.request_id)

        world = make("", scheduling_policy=Dearest())
        world.add("cheap")
        world.add("dear", price_per_gpu_hour_usd=1e6)
        await world.manager.start()
        await world.submit("r", cost_budget=0.01)
        await until(lambda: world.open_on("cheap"))
        assert seen == [["cheap"]]

    def test_by_path_class_or_object(self) -> None:
        for given in ("control_plane.policies.fifo:FIFOPolicy", SchedulingPolicy, SchedulingPolicy()):
            assert isinstance(ControlPlaneManager(scheduling_policy=given).scheduling_policy, SchedulingPolicy)
        for wrong, says in (("no.such.module:X", "imported"), ("control_plane.policies.fifo:Nope", "Nope"), (7, "no scheduling policy")):
            with pytest.raises(InvalidRequest, match=says) as refused:
                ControlPlaneManager(scheduling_policy=wrong)
            assert refused.value.param == "scheduling_policy"

    async def test_from_a_configuration_by_path(self) -> None:
        manager = ControlPlaneManager.from_config(
            {
                "scheduling_policy": "control_plane.policies.fifo:FIFOPolicy",
                "routing_strategy": "control_plane.router.round_robin:RoundRobin",
                "instances": [{"url": "http://127.0.0.1:9", "model_name": "m"}],
            }
        )
        assert (manager.scheduling_policy.name, manager.router.strategy) == ("fifo", "round_robin")
        assert [instance.port for instance in manager.get_instances()] == [9]


class TestHooks:
    @pytest.mark.parametrize("wrapped", [False, True])
    async def test_they_hear_of_instances_and_ends(self, make: Make, wrapped: bool) -> None:
        heard: list[tuple[str, str]] = []

        class Listening:
            async def schedule(self, request: RequestMetadata, instances: list[ExecutionInstance]) -> SchedulingDecision:
                return SchedulingDecision(instances[0].instance_id, request.request_id)

            def on_request_completed(self, request: RequestMetadata, info: RequestStatusInfo) -> None:
                heard.append((info.state, request.request_id))

            def on_instance_registered(self, instance: ExecutionInstance) -> None:
                heard.append(("registered", instance.instance_id))

        class Subclass(Listening, SchedulingPolicy):
            pass

        world = make("a", scheduling_policy=Listening() if wrapped else Subclass())
        await world.manager.start()
        for name, end in (("good", None), ("bad", InstanceFailed("no", retryable=False)), ("cancelled", None)):
            await world.submit(name)
            await until(lambda: world.open)
            if name == "cancelled":
                await world.manager.cancel_request(name)
            elif end is None:
                world.open[0].answer()
            else:
                world.open[0].fail(end)
        assert heard == [("registered", "a"), ("completed", "good"), ("failed", "bad"), ("cancelled", "cancelled")]
        later = make("b")
        later.manager.update_policy(Listening())
        assert heard[-1] == ("registered", "b"), "one that comes later hears of those that are there"

    async def test_those_that_raise_harm_nobody(self, make: Make) -> None:
        class Loud(SchedulingPolicy):
            def on_request_completed(self, request: RequestMetadata, info: object) -> None:
                raise RuntimeError("hook")

            def on_instance_registered(self, instance: ExecutionInstance) -> None:
                raise RuntimeError("hook")

        world = make("a", scheduling_policy=Loud())
        await world.manager.start()
        waiter = None
        for name in ("one", "two"):
            await world.submit(name)
            waiter = asyncio.ensure_future(world.manager.result(name))
            await asyncio.sleep(0)
            world.open[0].answer()
            assert (await waiter) == "completed"
        assert world.manager.get_instances()[0].active_requests == 0
        await asyncio.wait_for(world.manager.stop(), 5)


class TestRouters:
    @pytest.mark.parametrize(
        "answer", [None, 7, "nobody", ExecutionInstance("stranger"), ZeroDivisionError("mine")], ids=lambda answer: type(answer).__name__
    )
    @pytest.mark.parametrize("form", ["place", "select", "subclass"])
    async def test_a_foreign_answer_or_an_error_fails_its_request_and_no_other(self, make: Make, answer: object, form: str) -> None:
        def reply(request: RequestMetadata, instances: Sequence[ExecutionInstance]) -> object:
            if request.request_id == "good":
                return instances[0]
            if isinstance(answer, Exception):
                raise answer
            return answer

        class Places:
            def place(self, request: RequestMetadata, candidates: Sequence[ExecutionInstance], view: FleetView) -> object:
                return reply(request, candidates)

        class Selects:
            async def select_instance(self, request: RequestMetadata, available_instances: list[ExecutionInstance]) -> object:
                return reply(request, available_instances)

        class Subclass(RoutingStrategy):
            name = "mine"

            def place(self, request: RequestMetadata, candidates: Sequence[ExecutionInstance], view: FleetView) -> Placement:
                return Placement(reply(request, candidates), 0.0, (), "because")  # type: ignore[arg-type]

        router = {"place": Places, "select": Selects, "subclass": Subclass}[form]()
        world = make("ab", routing_strategy=router)
        await world.manager.start()
        assert await world.submit("odd") == "odd"
        status = await asyncio.wait_for(world.manager.result("odd"), 5)
        assert status.state == "failed"
        assert status.error is not None
        await world.submit("good")
        await until(lambda: world.open)
        world.open[0].answer()
        assert await world.state("good") == "completed"
        assert len(world.manager.pending_queue) == 0


class TestRequestsChangedUnderWay:
    async def test_the_id_it_was_accepted_under_stays(self, make: Make) -> None:
        world = make("a")
        await world.manager.start()
        request = RequestMetadata(request_id="mine", prompt="x")
        await world.manager.submit_request(request)
        request.request_id, request.prompt, request.max_tokens = "another", "y", None
        assert await world.state("mine") == "running"
        waiter = asyncio.ensure_future(world.manager.result("mine"))
        await asyncio.sleep(0)
        world.open[0].answer()
        assert (await waiter).request_id == "mine"
        assert dict(world.manager.running_requests) == {}
        assert (world.manager.get_instances()[0].active_requests, world.manager.get_status()["queued_requests"]) == (0, 0)
        await asyncio.wait_for(world.manager.stop(), 5)

    async def test_what_was_accepted_is_what_is_sent(self, make: Make) -> None:
        world = make("a")
        world.manager.get_instances()[0].max_concurrent_requests = 1
        await world.manager.start()
        await world.submit("first")
        messages = [{"role": "user", "content": "as it was"}]
        request = RequestMetadata(request_id="r", messages=messages)
        await world.manager.submit_request(request)
        messages[0]["content"] = request.model_name = "changed"
        world.open[0].answer()
        assert b"as it was" in world.open[0].wire.body
        assert b"changed" not in world.open[0].wire.body

    @pytest.mark.parametrize("started", [False, True])
    @pytest.mark.parametrize(
        ("field", "value"),
        [("priority", "urgent"), ("slo_deadline_ms", "soon"), ("max_tokens", "x"), ("cost_budget", "x"), ("extra_body", None)],
    )
    async def test_whatever_is_set_on_it_what_was_accepted_runs_and_is_counted(
        self, make: Make, started: bool, field: str, value: object
    ) -> None:
        world = make("a")
        page = make_exporter(world.manager)
        if started:
            await world.manager.start()
        request = RequestMetadata(request_id="r", prompt="x", priority=RequestPriority.LOW)
        await world.manager.submit_request(request)
        setattr(request, field, value)
        assert started or list(world.manager.pending_queue) == [request]
        world.manager.update_policy("priority")
        await world.manager.start()
        assert world.manager.running_requests["r"] is request
        world.open[0].answer()
        assert await world.state("r") == "completed"
        assert world.manager.explain("r")["priority"] == "low"
        assert world.manager.get_metrics().completed_requests == 1
        assert 'outcome="completed",priority="low"} 1.0' in page.render()[1].decode()

    async def test_inside_before_the_start_too(self, make: Make) -> None:
        world = make("a")
        messages, stop = [{"role": "user", "content": "as it was"}], ["\n"]
        await world.manager.submit_request(RequestMetadata(messages=messages, extra_body={"stop": stop}))
        messages[0]["content"], stop[0] = "changed", "changed"
        await world.manager.start()
        assert b"as it was" in world.open[0].wire.body
        assert b"changed" not in world.open[0].wire.body


class TestStreamsLeft:
    async def begin(self, world: World) -> tuple[AsyncIterator[str], asyncio.Task[str]]:
        await world.manager.start()
        stream = world.manager.stream(RequestMetadata(request_id="s", prompt="x"))
        first = asyncio.ensure_future(anext(stream))  # type: ignore[arg-type]
        await until(lambda: world.open)
        return stream, first  # type: ignore[return-value]

    async def test_never_begun_nothing_is_sent(self, make: Make) -> None:
        world = make("a")
        await world.manager.start()
        stream = world.manager.stream(RequestMetadata(request_id="s", prompt="x"))
        await stream.aclose()  # type: ignore[attr-defined]
        with pytest.raises(RequestNotFound):
            await world.state("s")

    async def test_closed(self, make: Make) -> None:
        world = make("a")
        stream, first = await self.begin(world)
        world.open[0].begin()
        await first
        await stream.aclose()  # type: ignore[attr-defined]
        assert world.engines["a"].calls[0].cancelled
        assert await world.state("s") == "cancelled"

    async def test_its_task_cancelled_before_the_first_piece(self, make: Make) -> None:
        world = make("a")
        _, first = await self.begin(world)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        assert world.engines["a"].calls[0].cancelled
        assert await world.state("s") == "cancelled"

    async def test_its_consumer_fails(self, make: Make) -> None:
        world = make("a")
        await world.manager.start()
        world.on_start = None

        async def consume() -> None:
            async for _ in world.manager.stream(RequestMetadata(request_id="s", prompt="x")):
                raise ZeroDivisionError

        task = asyncio.ensure_future(consume())
        await until(lambda: world.open)
        world.open[0].begin()
        with pytest.raises(ZeroDivisionError):
            await task
        del task
        await until(lambda: world.engines["a"].calls[0].cancelled)
        assert await world.state("s") == "cancelled"

    async def test_an_event_that_is_not_json_fails_it(self, make: Make) -> None:
        world = make("a")
        stream, first = await self.begin(world)
        world.open[0].begin()
        assert await first == "o"
        world.open[0].sink.chunk(b"data: {not json}\n\n")
        with pytest.raises(InstanceFailed, match="not JSON"):
            await anext(stream)
        assert await world.state("s") == "failed", "its caller did not give it up"
        assert world.open == []

    async def test_cancelled_by_its_id_it_raises(self, make: Make) -> None:
        world = make("a")
        stream, first = await self.begin(world)
        world.open[0].begin()
        await first
        await world.manager.cancel_request("s")
        with pytest.raises(Exception, match="cancelled") as ended:
            await anext(stream)
        assert ended.value.code == "cancelled"  # type: ignore[attr-defined]

    async def test_a_refusal_is_raised_by_the_iteration(self, make: Make) -> None:
        world = make("a")
        stream = world.manager.stream(RequestMetadata(prompt="x", max_tokens=-1))
        with pytest.raises(InvalidRequest, match="max_tokens"):
            await anext(stream)

    async def test_events_are_those_of_the_engine(self, make: Make) -> None:
        world = make("a")
        await world.manager.start()
        stream = world.manager.stream(RequestMetadata(prompt="x", extra_body={"stream": False, "stream_options": 5}), events=True)
        first = asyncio.ensure_future(anext(stream))
        await until(lambda: world.open)
        assert b'"include_usage":true' in world.open[0].wire.body
        world.open[0].begin()
        assert await first == {"choices": [{"text": "o"}]}
