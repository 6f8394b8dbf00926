"""Application, control plane and engines together: the seed's flow, streaming, failover, several models, stopping."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from control_plane import (
    ControlPlaneManager,
    Draining,
    ExecutionInstance,
    InvalidRequest,
    ModelNotFound,
    RequestMetadata,
    RequestNotFound,
    RequestPriority,
    RequestStatus,
)
from control_plane.sim_engine import SimEngine

MODEL = "test-model"


@pytest.fixture
async def engines() -> AsyncIterator[list[SimEngine]]:
    engines = [SimEngine(model_name=MODEL, speed=20.0, seed=index) for index in range(3)]
    for engine in engines:
        await engine.start("127.0.0.1", 0)
    yield engines
    for engine in engines:
        await engine.stop()


def manager_over(engines: list[SimEngine], **options: object) -> ControlPlaneManager:
    manager = ControlPlaneManager(seed=1, **options)  # type: ignore[arg-type]
    for index, engine in enumerate(engines):
        manager.register_instance(ExecutionInstance(instance_id=f"e{index}", host="127.0.0.1", port=engine.port, model_name=MODEL))
    return manager


async def test_control_plane_basic_flow(engines: list[SimEngine]) -> None:
    manager = manager_over(engines)
    request = RequestMetadata(
        request_id="sage-req-001", user_id="user-123", priority=RequestPriority.HIGH, slo_deadline_ms=60_000, max_tokens=20, prompt="Hello."
    )
    assert await manager.submit_request(request) == "sage-req-001"
    assert len(manager.pending_queue) == 1, "it waits before the start"
    assert (await manager.get_request_status("sage-req-001")).state == "queued"
    await manager.start()
    status = await manager.result("sage-req-001")
    assert status == RequestStatus.COMPLETED
    assert isinstance(status.output, str)
    assert status.usage is not None
    assert status.usage.completion_tokens == 20
    assert status.decision is not None
    assert status.decision.instance_id in {"e0", "e1", "e2"}
    assert request.latency_ms is not None
    assert request.latency_ms >= (request.queue_wait_ms or 0.0) >= 0.0
    with pytest.raises(InvalidRequest, match="already known"):
        await manager.submit_request(RequestMetadata(request_id="sage-req-001", prompt="again"))
    with pytest.raises(ModelNotFound, match=MODEL):
        await manager.submit_request(RequestMetadata(prompt="x", model_name="nobody-serves-this"))
    with pytest.raises(RequestNotFound):
        await manager.get_request_status("never-seen")
    metrics = manager.get_metrics()
    assert (metrics.total_requests, metrics.completed_requests, metrics.failed_requests) == (1, 1, 0)
    assert metrics.requests_per_second > 0
    assert metrics.p95_latency_ms == pytest.approx(request.latency_ms, rel=0.05)
    assert metrics.slo_compliance_rate == 1.0
    assert metrics.gpu_utilization is None
    await manager.stop()
    assert (await manager.get_request_status("sage-req-001")).output == status.output, "records outlive the stop"


async def test_streaming_text_and_events(engines: list[SimEngine]) -> None:
    async with manager_over(engines) as manager:
        pieces = [piece async for piece in manager.stream(RequestMetadata(messages=[{"role": "user", "content": "hi"}], max_tokens=12))]
        assert len(pieces) > 5
        assert all(pieces)
        events = [event async for event in manager.stream(RequestMetadata(request_id="s", prompt="hi", max_tokens=8), events=True)]
        assert events[-1]["usage"]["completion_tokens"] == 8
        explained = manager.explain("s")
        assert explained["ttft_ms"] > 0
        assert explained["decision"]["candidates"]
        async for _ in manager.stream(RequestMetadata(request_id="left", prompt="hi", max_tokens=4000)):
            break
        await asyncio.sleep(0)
        assert (await manager.get_request_status("left")).state in ("cancelled", "running")
        while (await manager.get_request_status("left")).state != "cancelled":
            await asyncio.sleep(0.01)
        assert manager.running_requests == {}


async def test_a_decision_is_explained_by_part(engines: list[SimEngine]) -> None:
    async with manager_over(engines, routing_strategy="predicted_latency") as manager:
        for name in ("first", "second"):
            await manager.result(await manager.submit_request(RequestMetadata(request_id=name, prompt="shared words " * 300, max_tokens=4)))
        first, second = (manager.explain(name)["decision"] for name in ("first", "second"))
        assert second["instance_id"] == first["instance_id"], "where its beginning is cached"
        parts = {candidate["instance_id"]: candidate["parts"] for candidate in second["candidates"]}
        assert parts[second["instance_id"]]["cached_tokens"] > 0
        for candidate in second["candidates"]:
            summed = sum(value for name, value in candidate["parts"].items() if name != "cached_tokens")
            assert summed == pytest.approx(candidate["predicted_ms"], abs=0.01)
        assert "tokens cached there" in second["reason"]


async def test_an_engine_that_dies_costs_no_request(engines: list[SimEngine]) -> None:
    async with manager_over(engines, routing_strategy="round_robin") as manager:
        ids = [await manager.submit_request(RequestMetadata(prompt=f"question {n}", max_tokens=300)) for n in range(30)]
        await asyncio.sleep(0.05)
        assert manager.get_instance_metrics("e1")["active_requests"] > 0
        await engines[1].kill()
        ends = await asyncio.gather(*(manager.result(request_id) for request_id in ids))
        assert [end.state for end in ends] == ["completed"] * 30
        moved = [request_id for request_id in ids if manager.explain(request_id)["tried"] == ["e1"]]
        assert moved, "some were under way on the engine that died"
        assert all(manager.explain(request_id)["attempts"] == 2 for request_id in moved)
        assert manager.fleet.get("e1").health_status == "unhealthy"  # type: ignore[union-attr]
        late = await manager.submit_request(RequestMetadata(prompt="after", max_tokens=3))
        assert (await manager.result(late)) == "completed"


async def test_requests_go_to_instances_of_their_model(engines: list[SimEngine]) -> None:
    other = SimEngine(model_name="other-model", speed=20.0)
    await other.start("127.0.0.1", 0)
    manager = manager_over(engines[:1])
    manager.register_instance(ExecutionInstance(instance_id="other", host="127.0.0.1", port=other.port, model_name="other-model"))
    async with manager:
        for model, instance_id in ((MODEL, "e0"), ("other-model", "other")) * 3:
            request_id = await manager.submit_request(RequestMetadata(prompt="x", max_tokens=2, model_name=model))
            status = await manager.result(request_id)
            assert status == "completed", status.error
            assert status.decision is not None
            assert status.decision.instance_id == instance_id
        with pytest.raises(InvalidRequest, match="other-model"):
            await manager.submit_request(RequestMetadata(prompt="which model?"))
    await other.stop()


async def test_policy_changes_cancelling_and_stopping_lose_nothing(engines: list[SimEngine]) -> None:
    manager = manager_over(engines[:1], scheduling_policy="fifo")
    instance = manager.get_instances()[0]
    instance.max_concurrent_requests = 1
    await manager.start()
    ids = [
        await manager.submit_request(RequestMetadata(request_id=f"r{n}", prompt="x", max_tokens=40, priority=RequestPriority(n % 5)))
        for n in range(12)
    ]
    assert len(manager.pending_queue) == 11
    manager.update_policy("priority")
    assert [request.priority for request in manager.pending_queue] == sorted(RequestPriority(n % 5) for n in range(1, 12))
    assert await manager.cancel_request("r5") is True
    assert (await manager.result("r5")) == RequestStatus.CANCELLED
    stopping = asyncio.create_task(manager.stop())
    await asyncio.sleep(0)
    with pytest.raises(Draining):
        await manager.submit_request(RequestMetadata(prompt="too late"))
    await stopping
    ends = {request_id: (await manager.get_request_status(request_id)).state for request_id in ids}
    assert ends.pop("r5") == "cancelled"
    assert set(ends.values()) == {"completed"}
    starts = sorted((status.schedule_time, name) for name in ids[1:] if (status := manager._records.get(name).request).schedule_time)
    started_order = [int(name[1:]) % 5 for _, name in starts]
    assert started_order == sorted(started_order), "the rest started by class"
