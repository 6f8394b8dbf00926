"""The executor alone, by the seed's calls: instances in and out, requests run on live (simulated) engines, health asked."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from control_plane import (
    EngineError,
    ExecutionCoordinator,
    ExecutionInstance,
    InstanceFailed,
    InstanceNotFound,
    InvalidRequest,
    RequestMetadata,
    SchedulingDecision,
)
from control_plane.sim_engine import SimEngine

MODEL = "test-model"
HERE = SchedulingDecision("e1", "r1")


@pytest.fixture
async def engine() -> AsyncIterator[SimEngine]:
    engine = SimEngine(model_name=MODEL, speed=50.0)
    await engine.start("127.0.0.1", 0)
    yield engine
    await engine.stop()


@pytest.fixture
async def executor() -> AsyncIterator[ExecutionCoordinator]:
    executor = ExecutionCoordinator()
    yield executor
    await executor.cleanup()


def at(engine: SimEngine, instance_id: str = "e1") -> ExecutionInstance:
    return ExecutionInstance(instance_id=instance_id, host="127.0.0.1", port=engine.port, model_name=MODEL)


def test_instances_are_registered_without_a_loop_and_listed_by_state() -> None:
    executor = ExecutionCoordinator()
    well, ill, full = (ExecutionInstance(instance_id=name, model_name=MODEL, port=9000) for name in ("well", "ill", "full"))
    for instance in (well, ill, full):
        executor.register_instance(instance)
    ill.is_healthy = False
    full.max_concurrent_requests, full.active_requests = 1, 1
    assert [i.instance_id for i in executor.get_all_instances()] == ["well", "ill", "full"]
    assert executor.get_healthy_instances() == [well, full]
    assert executor.get_available_instances() == [well]
    assert executor.get_instance("ill") is ill
    with pytest.raises(InvalidRequest, match="registered"):
        executor.register_instance(ExecutionInstance(instance_id="well"))
    executor.unregister_instance("ill")
    assert set(executor.instances) == {"well", "full"}
    with pytest.raises(InstanceNotFound, match="ill"):
        executor.unregister_instance("ill")


async def test_start_and_stop_may_repeat(executor: ExecutionCoordinator, engine: SimEngine) -> None:
    for _ in range(2):
        await executor.initialize()
        await executor.initialize()
        instance = at(engine)
        executor.register_instance(instance)
        response = await executor.execute_request(RequestMetadata(request_id="r1", prompt="hi", max_tokens=3), instance, HERE)
        assert response["usage"]["completion_tokens"] == 3
        assert "e1" in executor.http_clients
        await executor.cleanup()
        await executor.cleanup()
        executor.unregister_instance("e1")
    assert executor.get_metrics()["completed_requests"] == 2
    assert executor.active_requests == {}


async def test_each_kind_of_request_goes_to_its_path(executor: ExecutionCoordinator, engine: SimEngine) -> None:
    instance = at(engine)
    completion = await executor.execute_request(RequestMetadata(prompt="once upon", max_tokens=4), instance, HERE)
    assert completion["object"] == "text_completion"
    assert completion["choices"][0]["text"]
    messages = [{"role": "user", "content": "hello"}]
    chat = await executor.execute_request(RequestMetadata(messages=messages, max_tokens=4, extra_body={"seed": 1}), instance, HERE)
    assert chat["object"] == "chat.completion"
    assert chat["usage"]["completion_tokens"] == 4
    embedder = SimEngine(model_name="embedder", kind="embedding", speed=50.0)
    await embedder.start("127.0.0.1", 0)
    try:
        there = ExecutionInstance(instance_id="e2", host="127.0.0.1", port=embedder.port, model_name="embedder")
        embedded = await executor.execute_request(RequestMetadata(input=["a", "b"]), there, SchedulingDecision("e2", ""))
        assert len(embedded["data"]) == 2
    finally:
        await embedder.stop()


async def test_errors_name_what_went_wrong(executor: ExecutionCoordinator, engine: SimEngine) -> None:
    instance = at(engine)
    with pytest.raises(EngineError) as refused:
        await executor.execute_request(RequestMetadata(prompt="x", max_tokens=10_000_000), instance, HERE)
    assert refused.value.status == 400
    assert b"error" in refused.value.body
    assert isinstance(refused.value, RuntimeError)
    with pytest.raises(InvalidRequest, match="one of prompt, messages"):
        await executor.execute_request(RequestMetadata(prompt="x", input="y"), instance, HERE)
    gone = ExecutionInstance(instance_id="gone", host="127.0.0.1", port=1, model_name=MODEL)
    with pytest.raises(InstanceFailed, match=r"127\.0\.0\.1:1"):
        await executor.execute_request(RequestMetadata(prompt="x"), gone, SchedulingDecision("gone", ""))


async def test_health_is_asked_and_kept(executor: ExecutionCoordinator, engine: SimEngine) -> None:
    instance = at(engine)
    executor.register_instance(instance)
    assert await executor.health_check("e1") is True
    info = await executor.get_instance_info(instance)
    assert info["reachable"] is True
    assert info["models"] == [MODEL]
    await engine.kill()
    assert await executor.health_check(instance) is False
    assert instance.is_healthy is False
    assert executor.get_healthy_instances() == []
    with pytest.raises(InstanceNotFound, match="nobody"):
        await executor.health_check("nobody")
