"""What the API promises of the classes that stand alone, the executor and the instances, clause by clause."""

from __future__ import annotations

import asyncio
import math

import pytest
from scripted_world import MODEL, Make, until

from control_plane import (
    ControlPlaneManager,
    EngineError,
    ExecutionCoordinator,
    ExecutionInstance,
    ExecutionInstanceType,
    InstanceFailed,
    InstanceNotFound,
    InvalidRequest,
    LoadBalancer,
    NoInstanceAvailable,
    PDRoutingStrategy,
    RequestMetadata,
    RequestRouter,
    SchedulingDecision,
)
from control_plane.policies import POLICIES, create_policy
from control_plane.sim_engine import SimEngine


class TestStandingAlone:
    @pytest.mark.parametrize("name", POLICIES)
    async def test_each_policy_schedules_and_refuses_an_empty_list(self, name: str) -> None:
        policy = create_policy(name)
        with pytest.raises(NoInstanceAvailable) as refused:
            await policy.schedule(RequestMetadata(prompt="x"), [])
        assert isinstance(refused.value, RuntimeError)
        decision = await policy.schedule(RequestMetadata(request_id="r", prompt="x"), [ExecutionInstance("a", model_name=MODEL)])
        assert (decision.instance_id, decision.request_id, decision.policy) == ("a", "r", name)
        assert math.isfinite(decision.estimated_latency_ms)
        assert decision.estimated_latency_ms > 0, "from the profile's prior"
        assert math.isfinite(decision.priority)
        assert 0.0 <= decision.confidence <= 1.0
        assert decision.reason

    @pytest.mark.parametrize("name", POLICIES)
    def test_each_policy_names_the_next_request_or_none(self, name: str) -> None:
        policy, instances = create_policy(name), [ExecutionInstance("a", model_name=MODEL)]
        assert policy.get_next_request([], instances) is None
        waiting = [RequestMetadata(request_id=str(n), prompt="x") for n in range(3)]
        assert policy.get_next_request(waiting, []) is None
        assert policy.get_next_request(waiting, instances) is waiting[0]

    @pytest.mark.parametrize("phase", [None, "prefilling", "decoding", ExecutionInstanceType.PREFILLING])
    async def test_a_router_takes_a_phase_as_none_string_or_enum(self, phase: str | None) -> None:
        router = RequestRouter("affinity")
        general = ExecutionInstance("general", model_name=MODEL)
        assert await router.select_instance(RequestMetadata(prompt="x"), [general], phase=phase) is general
        with pytest.raises(NoInstanceAvailable):
            await router.select_instance(RequestMetadata(prompt="x"), [], phase=phase)

    def test_the_least_loaded_goes_by_load_then_by_requests(self) -> None:
        a = ExecutionInstance("a", current_load=0.5, active_requests=0)
        b = ExecutionInstance("b", current_load=0.2, active_requests=9)
        c = ExecutionInstance("c", current_load=0.2, active_requests=3)
        balancer = LoadBalancer()
        assert balancer.get_least_loaded_instance([a, b, c]) is c
        assert balancer.least_connections([a, b, c]) is a
        for choose in (balancer.weighted_round_robin, balancer.least_response_time, balancer.power_of_two):
            assert choose([a, b, c]) in (a, b, c)
            with pytest.raises(NoInstanceAvailable):
                choose([])

    async def test_under_a_manager_policy_and_router_see_the_same_world(self, make: Make) -> None:
        world = make("ab")
        a, b = world.manager.get_instances()
        a.active_requests, a.outstanding_ms = 5, 10_000.0
        request = RequestMetadata(request_id="r", prompt="x")
        assert (await world.manager.scheduling_policy.schedule(request, [a, b])).instance_id == "b"
        assert await world.manager.router.select_instance(request, [a, b]) is b
        a.active_requests, a.outstanding_ms = 0, 0.0


class TestExecutor:
    async def test_it_runs_what_the_manager_has_too_and_leaves_its_record_alone(self, make: Make) -> None:
        world = make("a")
        await world.manager.start()
        request = RequestMetadata(request_id="both", prompt="x")
        await world.manager.submit_request(request)
        executor, (instance,) = world.manager.executor, world.manager.get_instances()
        direct = asyncio.ensure_future(executor.execute_request(request, instance, SchedulingDecision("a", "both")))
        await until(lambda: len(world.open) == 2)
        assert dict(executor.active_requests) == {"both": request}
        assert instance.active_requests == 2
        world.open[1].answer(b'{"choices":[{"text":"direct"}]}')
        assert (await direct)["choices"][0]["text"] == "direct"
        assert await world.state("both") == "running"
        assert list(world.manager.running_requests) == ["both"]
        world.open[0].answer()
        assert (await world.status("both")).output == "ok"
        assert executor.active_requests == {}
        assert instance.active_requests == 0
        assert world.manager.get_metrics().total_requests == 1

    async def test_alone_it_shows_what_it_runs_and_reads_the_instance_it_is_given(self) -> None:
        first, second = (SimEngine(model_name=name, speed=50.0) for name in ("one", "two"))
        executor = ExecutionCoordinator()
        for engine in (first, second):
            await engine.start()
            # two objects of one id, as a caller may make them anew each time: each is asked where it says
            instance = ExecutionInstance("same", "127.0.0.1", engine.port)
            request = RequestMetadata(request_id="r", prompt="x", max_tokens=40)
            running = asyncio.ensure_future(executor.execute_request(request, instance, SchedulingDecision("same", "r")))
            await asyncio.sleep(0)
            assert executor.active_requests["r"] is request
            assert (await running)["model"] == engine.model_name
        assert executor.active_requests == {}
        await executor.cleanup()
        for engine in (first, second):
            await engine.stop()

    async def test_cancelled_while_it_runs_it_stops_the_engine(self, make: Make) -> None:
        world = make("a")
        executor, (instance,) = world.manager.executor, world.manager.get_instances()
        running = asyncio.ensure_future(executor.execute_request(RequestMetadata(prompt="x"), instance, SchedulingDecision("a", "")))
        await until(lambda: world.open)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert world.engines["a"].calls[0].cancelled
        assert instance.active_requests == 0

    @pytest.mark.parametrize(("status", "tries"), [(400, 1), (404, 1), (422, 1), (408, 2), (429, 2), (500, 2), (503, 2)])
    async def test_a_4xx_is_final_and_does_not_count_against_the_instance(self, make: Make, status: int, tries: int) -> None:
        world = make("ab")
        await world.manager.start()
        await world.submit("r")
        while world.open:
            world.open[0].fail(EngineError(status, b'{"error":{"message":"its own words"}}'))
        ended = await world.status("r")
        assert (ended.state, str(ended.error)) == ("failed", "its own words")
        assert sum(len(engine.calls) for engine in world.engines.values()) == tries
        if status < 500:
            assert all(instance.is_healthy for instance in world.manager.get_instances())

    def test_its_registry_is_for_reading(self) -> None:
        executor = ExecutionCoordinator()
        instance = ExecutionInstance("a", model_name=MODEL)
        executor.register_instance(instance)
        assert executor.instances["a"] is instance
        with pytest.raises(TypeError):
            executor.instances["b"] = instance  # type: ignore[index]
        assert executor.get_instance("nobody") is None


class TestInstances:
    def test_health_is_one_truth_under_two_names(self) -> None:
        assert ExecutionInstance(is_healthy=False).health_status == "unhealthy"
        assert ExecutionInstance(is_healthy=False, health_status="draining").health_status == "draining"
        assert ExecutionInstance(is_healthy=True, health_status="unhealthy").is_healthy is True
        instance = ExecutionInstance(health_status="starting")
        assert instance.is_healthy is False
        instance.is_healthy = True
        assert instance.health_status == "healthy"
        for state in ("unhealthy", "draining", "wrong_model", "starting"):
            instance.health_status = state
            assert (instance.is_healthy, instance.can_accept_request) == (False, False)

    def test_a_product_of_sizes_above_the_gpu_count_counts(self) -> None:
        instance = ExecutionInstance(tensor_parallel_size=4, pipeline_parallel_size=2, data_parallel_size=2, price_per_gpu_hour_usd=2.0)
        assert (instance.world_size, instance.price_per_hour_usd) == (16, 32.0)

    def test_a_key_is_not_shown(self) -> None:
        assert "sesame" not in repr(ExecutionInstance(api_key="sesame"))

    async def test_usable_right_after_the_start(self, make: Make) -> None:
        world = make("a")
        await world.manager.start()
        assert world.manager.executor.get_available_instances() == world.manager.get_instances()

    @pytest.mark.parametrize(
        ("out", "back"),
        [
            ({"health_status": "unhealthy"}, {"health_status": "healthy"}),
            ({"health_status": "draining"}, {"is_healthy": True}),
            ({"is_available": False}, {"is_available": True}),
            ({"max_concurrent_requests": 1, "active_requests": 1}, {"max_concurrent_requests": 3}),
            ({"model_name": "another"}, {"model_name": MODEL}),
        ],
        ids=str,
    )
    async def test_what_its_owner_sets_counts_from_then_on(self, make: Make, out: dict[str, object], back: dict[str, object]) -> None:
        world = make("a", default_model=MODEL)
        await world.manager.start()
        await until(lambda: "a" in world.engines and world.engines["a"].looked_at)  # the first probe is over; the next is far
        instance = world.manager.get_instances()[0]
        for name, value in out.items():
            setattr(instance, name, value)
        instance.served_models = [instance.model_name]
        await world.submit("r")
        assert not world.open
        for name, value in back.items():
            setattr(instance, name, value)
        instance.served_models = [instance.model_name]
        await until(lambda: world.open, timeout_s=2.0)

    async def test_a_role_set_as_a_plain_string_counts(self, make: Make) -> None:
        world = make("ab")
        world.manager.get_instances()[0].instance_type = "prefilling"  # type: ignore[assignment]
        world.manager.get_instances()[1].instance_type = "decoding"  # type: ignore[assignment]
        await world.manager.start()
        await world.submit("long", prompt="x" * 40_000)
        await world.submit("short")
        assert [call.request.request_id for call in world.open_on("a")] == ["long"]
        assert [call.request.request_id for call in world.open_on("b")] == ["short"]
        pd = world.manager.get_pd_metrics()
        assert (pd.prefilling_on_specialised, pd.decoding_on_specialised, pd.fallback_requests) == (1, 1, 0)
        assert (pd.prefilling_instances, pd.active_prefilling_requests, pd.active_decoding_requests) == (1, 1, 1)
        assert world.manager.get_pd_metrics() is not pd
        assert 0.0 <= PDRoutingStrategy().get_instance_specialization(world.manager.get_instances()[0]) <= 1.0

    async def test_another_address_counts_from_the_next_request_on(self) -> None:
        engines = [SimEngine(model_name=MODEL, speed=20.0) for _ in range(2)]
        for engine in engines:
            await engine.start()
        instance = ExecutionInstance("a", "127.0.0.1", engines[0].port, MODEL)
        manager = ControlPlaneManager()
        manager.register_instance(instance)
        async with manager:
            first = await manager.submit_request(RequestMetadata(prompt="x", max_tokens=100))
            await asyncio.sleep(0.02)
            instance.port = engines[1].port
            second = await manager.submit_request(RequestMetadata(prompt="x", max_tokens=5))
            assert [await manager.result(name) for name in (first, second)] == ["completed", "completed"]
            assert manager.executor.http_clients["a"].base_url.endswith(str(engines[1].port))
        for engine in engines:
            await engine.stop()

    async def test_they_come_and_go_while_requests_run_there(self, make: Make) -> None:
        world = make("a")
        await world.manager.start()
        await world.submit("stays")
        instance = world.manager.get_instances()[0]
        world.manager.unregister_instance("a")
        assert world.manager.get_instances() == []
        world.add("b")
        await world.submit("new")
        world.manager.register_instance(instance)
        world.engines["a"].calls[0].answer()
        world.engines["b"].calls[0].answer()
        assert [await world.state(name) for name in ("stays", "new")] == ["completed"] * 2
        assert instance.active_requests == 0
        with pytest.raises(InvalidRequest, match="registered"):
            world.manager.register_instance(ExecutionInstance("a"))
        with pytest.raises(InstanceNotFound, match="zzz"):
            world.manager.unregister_instance("zzz")

    async def test_removed_under_a_request_that_then_breaks_it_is_tried_elsewhere(self, make: Make) -> None:
        world = make("a")
        await world.manager.start()
        await world.submit("r")
        world.add("b")
        world.manager.unregister_instance("a")
        world.engines["a"].calls[0].fail(InstanceFailed("gone"))
        world.open_on("b")[0].answer()
        assert await world.state("r") == "completed"

    async def test_requests_go_to_those_that_can_do_their_kind(self, make: Make) -> None:
        world = make("")
        world.add("chat", supported_request_types={"chat", "completion"})
        world.add("embed", instance_type="embedding")
        world.add("both", instance_type="llm_embedding", supported_request_types=["embedding"])
        await world.manager.start()
        for n in range(4):
            await world.submit(f"c{n}", messages=[{"role": "user", "content": "x"}])
            await world.submit(f"e{n}", input=["x"])
        assert {call.wire.path for call in world.open_on("chat")} == {"/v1/chat/completions"}
        assert {call.wire.path for name in ("embed", "both") for call in world.open_on(name)} == {"/v1/embeddings"}
        assert len(world.open) == 8
        with pytest.raises(InvalidRequest, match="HTTP gateway"):
            await world.submit("r", kind="rerank")
        world.manager.get_instances()[0].supported_request_types = {"completion"}
        with pytest.raises(InvalidRequest, match="no instance of it takes chat"):
            await world.submit("c", messages=[{"role": "user", "content": "x"}])
