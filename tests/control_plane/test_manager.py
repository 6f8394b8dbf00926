"""The manager over scripted engines: what it accepts, where things wait, how it retries, what it remembers, how it stops."""

from __future__ import annotations

import asyncio

import pytest
from scripted_world import Make

from control_plane import (
    BudgetExhausted,
    ConfigurationError,
    ControlPlaneManager,
    DeadlineUnreachable,
    EngineError,
    ExecutionInstance,
    InstanceFailed,
    InvalidRequest,
    ModelNotFound,
    NoInstanceAvailable,
    QueueFull,
    RequestMetadata,
    RequestNotFound,
    RequestPriority,
    RequestStatus,
    SchedulingDecision,
    SchedulingPolicy,
)


async def test_what_is_refused_names_the_field_and_leaves_nothing(make: Make) -> None:
    world = make()
    await world.manager.start()
    for fields, param in (
        ({"slo_deadline_ms": -1}, "slo_deadline_ms"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"prompt": "x", "messages": []}, "messages"),
        ({"when_late": "drop"}, "when_late"),
        ({"top_p": 7}, "top_p"),
    ):
        with pytest.raises(InvalidRequest) as refused:
            await world.submit("bad", **fields)
        assert refused.value.param == param
        assert refused.value.code == "invalid_request"
    with pytest.raises(ModelNotFound, match="served here: m"):
        await world.submit("bad", model_name="zzz")
    with pytest.raises(RequestNotFound):
        await world.state("bad")
    assert len(world.manager.pending_queue) == 0
    assert world.manager.get_metrics().total_requests == 0 or world.manager.get_metrics().active_requests == 0
    with pytest.raises(ConfigurationError, match="enable_auto_scaling"):
        ControlPlaneManager(enable_auto_scaling=True)
    for wrong in ({"scheduling_policy": "fifi"}, {"routing_strategy": "robin"}):
        with pytest.raises(InvalidRequest, match=r"fifo|round_robin"):
            ControlPlaneManager(**wrong)


async def test_the_queue_has_bounds_and_says_when_to_come_back(make: Make) -> None:
    world = make("a", queue_max_requests=2)
    world.manager.get_instances()[0].max_concurrent_requests = 1
    await world.manager.start()
    for n in range(3):
        await world.submit(f"r{n}")
    with pytest.raises(QueueFull) as full:
        await world.submit("r3")
    assert full.value.retry_after_s
    assert full.value.http_status == 429
    for _ in range(3):
        world.open_on("a")[0].answer()
    assert [await world.state(f"r{n}") for n in range(3)] == ["completed"] * 3


async def test_budget_and_hopeless_deadlines_are_refused_where_the_caller_asked(make: Make) -> None:
    world = make("")
    world.add("dear", price_per_gpu_hour_usd=100.0)
    await world.manager.start()
    with pytest.raises(BudgetExhausted):
        await world.submit("poor", cost_budget=1e-9)
    with pytest.raises(DeadlineUnreachable):
        await world.submit("hurried", slo_deadline_ms=0.001, when_late="reject")
    await world.submit("late-but-served", slo_deadline_ms=0.001)
    world.open_on("dear")[0].answer()
    assert await world.state("late-but-served") == "completed"


async def test_an_engine_that_dies_gets_its_request_replaced_once_with_the_old_key(make: Make) -> None:
    world = make("abc", routing_strategy="round_robin")
    await world.manager.start()
    await world.submit("r")
    first = world.open[0]
    key = world.manager.explain("r")["decision"]["key"]
    first.fail(InstanceFailed("connection lost"))
    (second,) = world.open
    assert second.engine is not first.engine
    assert world.manager.explain("r")["decision"]["key"] == key
    second.fail(InstanceFailed("connection lost"))
    status = await world.manager.get_request_status("r")
    assert status.state == "failed"
    assert status.error.code == "instance_failed"  # type: ignore[union-attr]
    assert not world.open, "a request that kills engines must not kill the fleet"
    assert world.manager.explain("r")["attempts"] == 2


async def test_nothing_is_tried_again_once_the_client_has_seen_something(make: Make) -> None:
    world = make()
    await world.manager.start()
    stream = world.manager.stream(RequestMetadata(request_id="s", prompt="x"))
    first = asyncio.ensure_future(anext(stream))
    while not world.open:
        await asyncio.sleep(0)
    call = world.open[0]
    call.begin()
    assert await first == "o"
    call.fail(InstanceFailed("connection lost", sent=True))
    with pytest.raises(InstanceFailed, match="connection lost"):
        await anext(stream)
    assert not world.open
    assert await world.state("s") == "failed"


async def test_an_engines_own_refusal_is_final_and_its_words_are_kept(make: Make) -> None:
    world = make()
    await world.manager.start()
    await world.submit("r")
    world.open[0].fail(EngineError(400, b'{"error":{"message":"max_tokens is too large","code":400}}'))
    status = await world.manager.get_request_status("r")
    assert (status.state, str(status.error)) == ("failed", "max_tokens is too large")
    assert all(instance.health_status == "healthy" for instance in world.manager.get_instances())


async def test_unreachable_engines_are_passed_over_and_waited_for(make: Make) -> None:
    world = make("ab", no_instance_timeout_s=0.3)
    world.on_start = lambda call: call.fail(InstanceFailed("refused", connected=False))
    await world.manager.start()
    await world.submit("r")
    assert await world.state("r") == "queued"
    assert world.manager.explain("r")["attempts"] == 0, "no engine was reached"
    for engine in world.engines.values():
        engine.on_start = None
    for instance in world.manager.get_instances():
        instance.health_status = "healthy"
        world.manager.fleet.refresh(instance)
    world.open[0].answer()
    assert await world.state("r") == "completed"
    world.manager.get_instances()[0].health_status = world.manager.get_instances()[1].health_status = "draining"
    await world.submit("never")
    ended = await asyncio.wait_for(world.manager.result("never"), 5)
    assert isinstance(ended.error, NoInstanceAvailable)


async def test_a_hung_engine_gives_back_what_it_has_not_begun(make: Make) -> None:
    world = make("ab", routing_strategy="round_robin")
    await world.manager.start()
    await world.submit("r")
    hung = world.open[0]
    world.manager.fleet.on_hung(hung.engine.instance)  # type: ignore[misc]
    assert hung.cancelled
    (elsewhere,) = world.open
    assert elsewhere.engine is not hung.engine
    hung.answer()
    elsewhere.answer(b'{"choices":[{"text":"from the other"}]}')
    assert (await world.manager.get_request_status("r")).output == "from the other"


async def test_a_request_waits_at_most_so_long_in_the_queue(make: Make) -> None:
    world = make("a", queue_timeout_s=0.2)
    world.manager.get_instances()[0].max_concurrent_requests = 1
    await world.manager.start()
    await world.submit("runs")
    await world.submit("waits")
    ended = await asyncio.wait_for(world.manager.result("waits"), 5)
    assert (ended.state, ended.error.code) == ("failed", "timeout")  # type: ignore[union-attr]
    world.open[0].answer()
    assert await world.state("runs") == "completed"


async def test_cancelling_in_the_queue_and_on_the_engine(make: Make) -> None:
    world = make("a")
    world.manager.get_instances()[0].max_concurrent_requests = 1
    await world.manager.start()
    await world.submit("runs")
    await world.submit("waits")
    assert await world.manager.cancel_request("waits") is True
    assert await world.manager.cancel_request("waits") is False
    assert await world.manager.cancel_request("runs") is True
    assert world.engines["a"].calls[0].cancelled
    assert len(world.engines["a"].calls) == 1
    assert await world.state("runs") == RequestStatus.CANCELLED
    assert world.manager.get_instances()[0].active_requests == 0
    with pytest.raises(RequestNotFound):
        await world.manager.cancel_request("unknown")


async def test_requests_before_the_start_are_judged_at_the_start(make: Make) -> None:
    world = make("a", answer=True)
    await world.submit("good")
    await world.submit("stranger", model_name="not-here")
    assert len(world.manager.pending_queue) == 2
    await world.manager.start()
    assert await world.state("good") == "completed"
    assert (await world.manager.get_request_status("stranger")).error.code == "model_not_found"  # type: ignore[union-attr]


async def test_finished_requests_are_kept_by_count_and_age(make: Make) -> None:
    world = make("a", answer=True, history_max_requests=2, history_max_age_s=0.4)
    await world.manager.start()
    for n in range(3):
        await world.submit(f"r{n}")
    with pytest.raises(RequestNotFound):
        await world.state("r0")
    assert await world.state("r2") == "completed"
    await asyncio.sleep(1.0)
    with pytest.raises(RequestNotFound):
        await world.state("r2")


async def test_stop_fails_what_does_not_end_in_time_and_start_works_again(make: Make) -> None:
    world = make("a")
    await world.manager.start()
    await world.submit("endless")
    await world.manager.stop(drain_timeout_s=0.05)
    status = await world.manager.get_request_status("endless")
    assert (status.state, status.error.code) == ("failed", "draining")  # type: ignore[union-attr]
    await world.submit("waits for the next start")
    await world.manager.start()
    world.open[-1].answer()
    assert await world.state("waits for the next start") == "completed"


class Placer(SchedulingPolicy):
    """Only the seed's ``schedule``: first come, first served, placed where it says."""

    async def schedule(self, request: RequestMetadata, instances: list[ExecutionInstance]) -> SchedulingDecision:
        await asyncio.sleep(0)
        return SchedulingDecision(instances[-1].instance_id, request.request_id, reason="always the last")


class Chooser:
    """A router that is no subclass of ours."""

    async def select_instance(
        self, request: RequestMetadata, available_instances: list[ExecutionInstance], phase: str | None = None
    ) -> ExecutionInstance:
        await asyncio.sleep(0)
        if request.request_id == "broken":
            raise LookupError("lost my table")
        return available_instances[-1]


@pytest.mark.parametrize("options", [{"scheduling_policy": Placer()}, {"routing_strategy": Chooser()}], ids=["policy", "router"])
async def test_a_policy_or_router_of_ones_own_places(make: Make, options: dict[str, object]) -> None:
    world = make("abc", **options)
    await world.manager.start()
    for n in range(4):
        await world.submit(f"r{n}")
    while len(world.open) < 4:
        await asyncio.sleep(0)
    assert [call.request.request_id for call in world.open_on("c")] == ["r0", "r1", "r2", "r3"]
    await world.submit("cancelled while being placed")
    await world.manager.cancel_request("cancelled while being placed")
    await asyncio.sleep(0.01)
    assert len(world.open) == 4


async def test_a_router_that_raises_fails_its_request_and_no_other(make: Make) -> None:
    world = make("ab", routing_strategy=Chooser())
    await world.manager.start()
    await world.submit("broken")
    ended = await world.manager.result("broken")
    assert ended.state == "failed"
    assert "lost my table" in str(ended.error)
    await world.submit("fine")
    while not world.open:
        await asyncio.sleep(0)
    world.open[0].answer()
    assert await world.state("fine") == "completed"


async def test_changing_policy_and_router_at_run_time_loses_nothing(make: Make) -> None:
    world = make("a", scheduling_policy="fifo")
    world.manager.get_instances()[0].max_concurrent_requests = 1
    await world.manager.start()
    order = [4, 0, 3, 1, 2, 0, 4]
    for n, priority in enumerate(order):
        await world.submit(f"r{n}", priority=RequestPriority(priority))
    for policy in ("priority", "slo_aware", "fifo", "cost_optimized", "adaptive", "priority"):
        world.manager.update_policy(policy)
        assert len(world.manager.pending_queue) == len(order) - 1
    world.manager.update_routing_strategy("affinity")
    started = []
    while world.open:
        call = world.open[0]
        started.append(call.request.request_id)
        call.answer()
    assert started == ["r0", "r1", "r5", "r3", "r4", "r2", "r6"]
    with pytest.raises(InvalidRequest, match="priority"):
        world.manager.update_policy("prioritty")


async def test_preferences_hold_among_those_that_meet_the_deadline(make: Make) -> None:
    world = make("ab")
    await world.manager.start()
    for n in range(4):
        await world.submit(f"r{n}", preferred_instance_id="b")
    assert len(world.open_on("b")) == 4
    assert not world.open_on("a")
    await world.submit("elsewhere", preferred_instance_id="not-there")
    assert len(world.open) == 5


async def test_duplicate_ids_are_refused_while_live_and_while_remembered(make: Make) -> None:
    world = make("a")
    await world.manager.start()
    await world.submit("same")
    for _ in range(2):
        with pytest.raises(InvalidRequest, match="same"):
            await world.submit("same")
        if world.open:
            world.open[0].answer()
    generated = await world.manager.submit_request(RequestMetadata(prompt="x"))
    assert generated


async def test_a_kind_that_no_instance_of_the_model_can_do_is_refused_at_once(make: Make) -> None:
    world = make("a")
    instance = world.manager.get_instances()[0]
    instance.supported_request_types = {"chat", "completion"}
    await world.manager.start()
    with pytest.raises(InvalidRequest, match="no instance of it takes embedding requests"):
        await world.manager.submit_request(RequestMetadata(input="x"))
    instance.supported_request_types = None
    await world.manager.submit_request(RequestMetadata(request_id="perhaps", input="x"))
    assert [call.request.request_id for call in world.open] == ["perhaps"]
