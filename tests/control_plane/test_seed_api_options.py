"""What the API promises of options, prefill/decode separation, metrics, parallelism and priorities, clause by clause."""

from __future__ import annotations

import asyncio
import json

import pytest
from byte_tap import tapped
from scripted_world import MODEL, Make, until

from control_plane import (
    BudgetExhausted,
    ConfigurationError,
    ControlPlaneManager,
    DecodingConfig,
    EngineError,
    ExecutionInstance,
    ExecutionInstanceType,
    InstanceNotFound,
    InvalidRequest,
    ModelDoesNotFit,
    ParallelismConfig,
    ParallelismOptimizer,
    ParallelismType,
    PDRoutingStrategy,
    PDSeparationConfig,
    PrefillingConfig,
    RequestMetadata,
    RequestPriority,
)
from control_plane.clock import ManualClock
from control_plane.sim_engine import SimEngine


class TestOptions:
    async def test_role_options_cap_what_is_in_flight_in_that_role(self, make: Make) -> None:
        world = make("")
        world.add("p", instance_type="prefilling", prefilling_config=PrefillingConfig(target_batch_size=2))
        world.add("d", instance_type="decoding", decoding_config=DecodingConfig(max_parallel_requests=3))
        await world.manager.start()
        for n in range(5):
            await world.submit(f"long{n}", prompt="x" * 40_000)
        # two fill the prefill instance; the decode instance takes three, since serving there beats refusing
        assert (len(world.open_on("p")), len(world.open_on("d"))) == (2, 3)
        for n in range(4):
            await world.submit(f"short{n}")
        assert [await world.state(f"short{n}") for n in range(4)] == ["running"] * 3 + ["queued"]
        world.open_on("d")[-1].answer()
        assert await world.state("short3") == "running"

    async def test_target_latency_is_the_tpot_target_of_a_request_that_has_none(self, make: Make) -> None:
        clock = ManualClock(now_s=50.0)
        world = make("", clock=clock)
        world.add("d", instance_type="decoding", decoding_config=DecodingConfig(target_latency_ms=20.0))
        await world.manager.start()
        for name, own_ms in (("slow", None), ("patient", 1000.0)):
            request = RequestMetadata(request_id=name, prompt="x", tpot_slo_ms=own_ms)
            stream = world.manager.stream(request)
            first = asyncio.ensure_future(anext(stream))
            await until(lambda: world.open)
            call = world.open[0]
            call.sink.started(200, [], call)
            call.sink.tokens(1, clock.now_s(), clock.now_s())
            clock.advance(1.0)
            call.sink.tokens(9, clock.now_s(), clock.now_s())
            call.finish_stream(tokens=10)
            with pytest.raises(StopAsyncIteration):
                await first
            assert request.tpot_slo_ms == own_ms
            assert await world.state(name) == "completed"
        metrics = world.manager.get_metrics()
        assert (metrics.slo_violations, metrics.slo_compliance_rate) == (1, 0.5)

    async def test_sizes_of_a_role_seed_the_prediction_where_the_instance_tells_none(self, make: Make) -> None:
        predictor = make("").manager.predictor
        wide = PrefillingConfig(tensor_parallel_size=8)
        plain = ExecutionInstance("plain", model_name="llama3-70b", instance_type="prefilling", gpu_count=8)
        told = ExecutionInstance("told", model_name="llama3-70b", instance_type="prefilling", gpu_count=8, prefilling_config=wide)
        too_few = ExecutionInstance("few", model_name="llama3-70b", instance_type="prefilling", gpu_count=1, prefilling_config=wide)
        assert predictor.prefill_ms(told, 2000) < predictor.prefill_ms(plain, 2000)
        assert predictor.prefill_ms(too_few, 2000) == pytest.approx(predictor.prefill_ms(plain, 2000), rel=0.1)
        off = ExecutionInstance("off", decoding_config=DecodingConfig(enable_prefix_caching=False))
        assert (off.engine.prefix_caching, plain.engine.prefix_caching) == (False, None)

    async def test_hints_and_preferences_among_those_that_meet_the_deadline(self, make: Make) -> None:
        world = make("a")
        world.add("tp", tensor_parallel_size=2)
        world.add("pp", pipeline_parallel_size=2)
        await world.manager.start()
        await world.submit("h1", parallelism_hint="pp")
        await world.submit("h2", parallelism_hint=ParallelismType.TENSOR_PARALLEL)
        await world.submit("h3", preferred_instance_id="a", parallelism_hint="pp")
        await world.submit("h4", parallelism_hint="ep")
        placed = {call.request.request_id: call.engine.instance.instance_id for call in world.open}
        assert (placed["h1"], placed["h2"], placed["h3"]) == ("pp", "tp", "a")
        assert "h4" in placed, "a preference only"

    async def test_dearer_instances_are_left_out_and_none_left_is_an_error(self, make: Make) -> None:
        world = make("")
        cheap = world.add("cheap", price_per_gpu_hour_usd=0.001)
        world.add("dear", price_per_gpu_hour_usd=1e6)
        await world.manager.start()
        for n in range(3):
            await world.submit(f"r{n}", cost_budget=0.01)
        assert len(world.open_on("cheap")) == 3
        with pytest.raises(BudgetExhausted) as refused:
            await world.submit("poor", cost_budget=1e-15)
        assert refused.value.code == "budget_exhausted"
        cheap.max_concurrent_requests = 3
        await world.submit("waits", cost_budget=0.01)
        assert await world.state("waits") == "queued"
        world.manager.unregister_instance("cheap")
        status = await asyncio.wait_for(world.manager.result("waits"), 5)
        assert status.error.code == "budget_exhausted"  # type: ignore[union-attr]

    async def test_labels_are_carried(self, make: Make) -> None:
        world = make("a")
        await world.manager.start()
        await world.submit("r", billing_tier="gold", tags={"team": "search"})
        explained = world.manager.explain("r")
        assert (explained["billing_tier"], explained["tags"]) == ("gold", {"team": "search"})
        assert b"gold" not in world.open[0].wire.body
        json.dumps(explained)

    def test_what_is_not_there_yet_says_so(self) -> None:
        with pytest.raises(ConfigurationError, match="autoscaler"):
            ControlPlaneManager(enable_auto_scaling=True)
        with pytest.raises(InvalidRequest, match="adaptive, threshold"):
            PDSeparationConfig(routing_policy="magic")

    async def test_the_queue_is_bounded_by_bytes_before_and_after_the_start(self, make: Make) -> None:
        world = make("a", queue_max_bytes=2000)
        world.manager.get_instances()[0].max_concurrent_requests = 1
        await world.submit("early", prompt="x" * 1500)
        for _ in range(2):
            with pytest.raises(Exception, match="bytes") as full:
                await world.submit("too much", prompt="x" * 1500)
            assert full.value.code == "queue_full"  # type: ignore[attr-defined]
            await world.manager.start()
            if await world.state("early") == "running" and not len(world.manager.pending_queue):
                await world.submit("waits", prompt="x" * 1500)


class TestPrefillDecode:
    @pytest.mark.parametrize(("switch", "enabled", "on"), [(True, True, True), (True, False, False), (False, True, False)])
    def test_it_is_on_when_both_switches_are(self, switch: bool, enabled: bool, on: bool) -> None:
        manager = ControlPlaneManager(enable_pd_separation=switch, pd_config=PDSeparationConfig(enabled=enabled))
        assert (manager.pd_router is not None) is on
        assert manager.enable_pd_separation is on, "the seed asks this before it uses pd_router"

    def test_a_phase_is_a_member_that_equals_its_name(self) -> None:
        strategy = PDRoutingStrategy(PDSeparationConfig(prefilling_threshold_input_tokens=10))
        phase = strategy.determine_request_phase(RequestMetadata(prompt="word " * 100))
        assert phase == "prefilling"
        assert phase.name == "PREFILLING"
        assert isinstance(phase, ExecutionInstanceType)
        assert strategy.determine_request_phase(RequestMetadata(prompt="hi")) == "decoding"
        scores = strategy.specialization_scores(ExecutionInstance(instance_type="prefilling"))
        assert set(scores) == {"prefilling", "decoding"}

    async def test_a_lone_instance_of_the_wrong_role_beats_refusing(self, make: Make) -> None:
        world = make("")
        world.add("p", instance_type="prefilling")
        await world.manager.start()
        await world.submit("short")
        assert len(world.open_on("p")) == 1
        assert world.manager.get_pd_metrics().fallback_requests == 1


class TestMetrics:
    async def test_all_are_numbers_from_the_start(self, make: Make) -> None:
        metrics = make("a").manager.get_metrics()
        assert metrics.gpu_utilization is None
        assert metrics.timestamp is not None
        assert metrics.slo_compliance_rate == 1.0
        rest = set(metrics.__slots__) - {"gpu_utilization", "timestamp", "slo_compliance_rate"}
        assert {name: getattr(metrics, name) for name in rest} == dict.fromkeys(rest, 0)

    async def test_what_owners_measure_is_shown(self, make: Make) -> None:
        world = make("ab")
        first, second = world.manager.get_instances()
        first.gpu_utilization, first.gpu_memory_gb, second.gpu_memory_gb, second.tensor_parallel_size = 0.5, 80.0, 40.0, 2
        metrics = world.manager.get_metrics()
        assert (metrics.gpu_utilization, metrics.avg_gpu_utilization, metrics.total_gpu_memory_gb) == (0.5, 0.5, 160.0)

    async def test_counts_since_start_and_rates_over_the_window_or_the_uptime(self, make: Make) -> None:
        clock = ManualClock(now_s=100.0)
        world = make("a", clock=clock, metrics_window_s=60.0)
        world.on_start = None
        await world.manager.start()
        clock.advance(10.0)
        for n in range(5):
            await world.submit(f"r{n}")
        clock.advance(10.0)
        for call in world.open:
            call.answer(tokens=4)
        metrics = world.manager.get_metrics()
        assert (metrics.total_requests, metrics.completed_requests) == (5, 5)
        assert metrics.requests_per_second == pytest.approx(5 / 20)
        assert metrics.tokens_per_second == pytest.approx(20 / 20)
        assert metrics.avg_latency_ms == pytest.approx(10_000.0)
        assert metrics.p50_latency_ms == pytest.approx(10_000.0, rel=0.02)
        clock.advance(200.0)
        later = world.manager.get_metrics()
        assert (later.completed_requests, later.requests_per_second, later.p99_latency_ms) == (5, 0.0, 0.0)

    async def test_the_uptime_begins_at_the_start(self, make: Make) -> None:
        clock = ManualClock(now_s=100.0)
        world = make("a", answer=True, clock=clock)
        clock.advance(30.0)
        await world.manager.start()
        await world.submit("r")
        clock.advance(10.0)
        assert world.manager.get_metrics().requests_per_second == pytest.approx(0.1)
        await world.manager.stop()
        clock.advance(10.0)
        await world.manager.start()
        assert world.manager.get_metrics().requests_per_second == pytest.approx(0.05), "it goes on counting"

    async def test_a_failed_or_refused_request_with_a_target_is_a_violation(self, make: Make) -> None:
        clock = ManualClock(now_s=100.0)
        world = make("a", clock=clock)
        await world.manager.start()
        for name in ("late", "in time", "fails"):
            await world.submit(name, slo_deadline_ms=1000)
        await world.submit("fails without a target")
        with pytest.raises(Exception, match="not exist"):
            await world.submit("refused", model_name="nobody", slo_deadline_ms=1000)
        calls = {call.request.request_id: call for call in world.open}
        calls["in time"].answer()
        clock.advance(2.0)
        calls["late"].answer()
        for name in ("fails", "fails without a target"):
            calls[name].fail(EngineError(400, b"{}"))
        metrics = world.manager.get_metrics()
        assert (metrics.slo_violations, metrics.failed_requests, metrics.completed_requests) == (3, 2, 2)
        assert metrics.slo_compliance_rate == 0.25

    async def test_without_monitoring_it_counts_and_keeps_no_quantiles(self, make: Make) -> None:
        world = make("a", answer=True, enable_monitoring=False)
        await world.manager.start()
        await world.submit("r")
        metrics = world.manager.get_metrics()
        assert (metrics.completed_requests, metrics.p95_latency_ms) == (1, 0.0)
        assert metrics.requests_per_second > 0

    async def test_status_and_instance_metrics_can_be_written_as_json(self, make: Make) -> None:
        world = make("ab")
        await world.manager.start()
        await world.submit("r")
        status = json.loads(json.dumps(world.manager.get_status()))
        assert (status["running"], status["active_requests"], status["queued_requests"], status["models"]) == (True, 1, 0, [MODEL])
        assert [one["instance_id"] for one in status["instances"]] == ["a", "b"]
        busy = world.open[0].engine.instance.instance_id
        assert world.manager.get_instance_metrics(busy)["active_requests"] == 1
        with pytest.raises(InstanceNotFound):
            world.manager.get_instance_metrics("nobody")


class TestParallelism:
    def test_what_does_not_fit_names_the_smallest_that_would(self) -> None:
        with pytest.raises(ModelDoesNotFit) as refused:
            ParallelismOptimizer().recommend_strategy(model_size_gb=140, gpu_count=1, gpu_memory_gb=80)
        smallest = refused.value.smallest_gpu_count
        assert smallest is not None
        assert str(smallest) in str(refused.value)
        config = ParallelismOptimizer().recommend_strategy(140, smallest, 80)
        assert config.validate()
        assert config.reason
        assert config.total_parallel_size <= smallest

    @pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 7, 8, 12, 16, 24, 64, 100])
    def test_a_hybrid_has_the_product_n_and_tp_a_power_of_two_up_to_8(self, n: int) -> None:
        tp, pp, dp = ParallelismOptimizer().optimize_hybrid_config(n)
        assert tp * pp * dp == n
        assert tp in (1, 2, 4, 8)

    @pytest.mark.parametrize("n", [0, -1, 1.5, "8", None])
    def test_a_count_that_is_none_is_refused(self, n: object) -> None:
        with pytest.raises(InvalidRequest, match="gpu_count"):
            ParallelismOptimizer().optimize_hybrid_config(n)  # type: ignore[arg-type]

    def test_a_config_knows_its_sizes(self) -> None:
        config = ParallelismConfig(tensor_parallel_size=4, data_parallel_size=2, expert_parallel_size=8)
        assert (config.total_gpus, config.total_parallel_size, config.validate()) == (8, 8, True)
        assert ParallelismConfig(tensor_parallel_size=4, total_gpus=2).validate() is False
        assert ParallelismConfig(tensor_parallel_size=0).validate() is False


async def test_the_wires_priority_is_sent_only_where_the_engine_takes_it() -> None:
    """vLLM's integer is not ours: -2 critical to 2 background, added for engines that run ``--scheduling-policy priority``."""
    assert [RequestPriority.from_wire(p) for p in (-9, -1, 0, 1, 9)] == list(RequestPriority)
    assert [priority.wire for priority in RequestPriority] == [-2, -1, 0, 1, 2]
    engine = SimEngine(model_name=MODEL, speed=50.0, scheduling_policy="priority")
    await engine.start()
    async with tapped(f"http://127.0.0.1:{engine.port}") as tap, ControlPlaneManager() as manager:
        instance = ExecutionInstance("a", url=tap.url, model_name=MODEL)
        manager.register_instance(instance)
        for takes in (False, True):
            instance.priority_scheduling = takes
            name = await manager.submit_request(RequestMetadata(prompt="x", max_tokens=2, priority=RequestPriority.CRITICAL))
            assert await manager.result(name) == "completed"
        plain, with_priority = tap.bodies("/v1/completions")
    await engine.stop()
    assert "priority" not in json.loads(plain)
    assert json.loads(with_priority)["priority"] == -2
