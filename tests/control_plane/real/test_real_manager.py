"""The Python API over two real vLLM servers: the seed's flow, streams, cancelling, metrics, and what is learned from the servers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from vllm_server import MODEL, VllmServer, eventually, idle, instance_of, working

from control_plane import (
    ControlPlaneManager,
    EngineError,
    ExecutionCoordinator,
    ExecutionInstance,
    InvalidRequest,
    RequestCancelled,
    RequestMetadata,
    RequestPriority,
    SchedulingDecision,
)

pytestmark = [pytest.mark.real, pytest.mark.timeout(300)]

Pair = tuple[VllmServer, VllmServer]
MakeManager = Callable[..., Awaitable[ControlPlaneManager]]
GREEDY = {"temperature": 0.0, "extra_body": {"ignore_eos": True}}


def long_request(**fields: object) -> RequestMetadata:
    """Some ten seconds of work if nobody stops it. As long as the context allows: on a busy machine the engines' own counts come late."""
    return RequestMetadata(**{"prompt": "Once upon a time", "max_tokens": 4000, **GREEDY, **fields})  # type: ignore[arg-type]


async def test_the_seed_flow(servers: Pair) -> None:
    """Register, start, submit, ask until it is done, read the metrics, stop: as the seed's document has it."""
    manager = ControlPlaneManager(scheduling_policy="adaptive", routing_strategy="load_balanced", enable_pd_separation=True)
    for server in servers:
        manager.register_instance(
            ExecutionInstance(instance_id=server.label, host="127.0.0.1", port=server.port, model_name=MODEL, gpu_count=1)
        )
    await manager.start()
    try:
        request = RequestMetadata(
            request_id="req-1",
            prompt="Once upon a time",
            max_tokens=16,
            priority=RequestPriority.HIGH,
            slo_deadline_ms=30_000,
            model_name=MODEL,
        )
        request_id = await manager.submit_request(request)
        assert request_id == "req-1"
        while (status := await manager.get_request_status(request_id)).state not in ("completed", "failed"):
            await asyncio.sleep(0.05)
        assert status.state == "completed", status
        assert isinstance(status.output, str)
        metrics = manager.get_metrics()
        assert metrics.completed_requests == 1
        assert metrics.failed_requests == 0
        assert metrics.avg_latency_ms > 0
    finally:
        await manager.stop()


@pytest.mark.parametrize("policy", ["fifo", "priority", "slo_aware", "cost_optimized", "adaptive"])
async def test_every_policy_serves_a_mixed_load_on_both_servers(policy: str, make_manager: MakeManager, servers: Pair) -> None:
    manager = await make_manager(*(instance_of(server, max_concurrent_requests=4) for server in servers), scheduling_policy=policy)
    before = [server.answered() for server in servers]
    priorities = list(RequestPriority)
    requests = [
        RequestMetadata(prompt=f"Story {i}", max_tokens=4 + i, priority=priorities[i % 5], slo_deadline_ms=60_000, **GREEDY)  # type: ignore[arg-type]
        for i in range(20)
    ]
    ids = [await manager.submit_request(request) for request in requests]
    ended = await asyncio.gather(*map(manager.result, ids))
    assert [(status.state, status.usage.completion_tokens) for status in ended if status.usage] == [("completed", 4 + i) for i in range(20)]
    did = [server.answered() - count for server, count in zip(servers, before, strict=True)]
    assert sum(did) == 20
    assert min(did) >= 4, f"one server did nearly all: {did}"


async def test_a_stream_says_what_the_whole_answer_says(manager: ControlPlaneManager) -> None:
    messages = [{"role": "user", "content": "Hello, who are you?"}]
    fields = {"messages": messages, "max_tokens": 24, **GREEDY}
    request_id = await manager.submit_request(RequestMetadata(**fields))
    whole = await manager.result(request_id)
    pieces = [piece async for piece in manager.stream(RequestMetadata(**fields))]
    assert "".join(pieces) == whole.output
    assert len(pieces) > 3
    events = [event async for event in manager.stream(RequestMetadata(**fields), events=True)]
    assert events[0]["object"] == "chat.completion.chunk"
    assert [event["usage"]["completion_tokens"] for event in events if event.get("usage")][-1:] == [24]


async def test_cancelling_stops_the_engine(manager: ControlPlaneManager, servers: Pair) -> None:
    request_id = await manager.submit_request(long_request())
    await eventually(lambda: request_id in manager.running_requests)
    await working(1, *servers)
    assert await manager.cancel_request(request_id) is True, await manager.get_request_status(request_id)
    await idle(*servers, seconds=3.0)
    assert (await manager.result(request_id)).state == "cancelled"
    assert await manager.cancel_request(request_id) is False


async def test_leaving_a_stream_stops_the_engine(manager: ControlPlaneManager, servers: Pair) -> None:
    stream = manager.stream(long_request())
    pieces = [await anext(stream) for _ in range(5)]
    assert all(isinstance(piece, str) for piece in pieces)
    await working(1, *servers)
    await stream.aclose()  # type: ignore[attr-defined]
    await idle(*servers, seconds=3.0)


async def test_cancelling_ends_a_stream_with_its_error(manager: ControlPlaneManager, servers: Pair) -> None:
    stream = manager.stream(long_request(request_id="to-cancel"))
    await anext(stream)
    await manager.cancel_request("to-cancel")
    with pytest.raises(RequestCancelled):
        async for _ in stream:
            pass
    await idle(*servers, seconds=3.0)


async def test_a_request_waits_in_our_queue_and_is_cancelled_there(make_manager: MakeManager, server: VllmServer) -> None:
    manager = await make_manager(instance_of(server, max_concurrent_requests=1))
    first = await manager.submit_request(long_request())
    second = await manager.submit_request(long_request())
    await eventually(lambda: first in manager.running_requests)
    assert [request.request_id for request in manager.pending_queue] == [second]
    assert await manager.cancel_request(second) is True
    assert len(manager.pending_queue) == 0
    await working(1, server)
    await manager.cancel_request(first)
    await idle(server)


async def test_an_engine_s_refusal_reaches_the_caller(manager: ControlPlaneManager) -> None:
    request_id = await manager.submit_request(RequestMetadata(prompt="x", max_tokens=100_000))
    status = await manager.result(request_id)
    assert status.state == "failed"
    assert "max_tokens=100000 cannot be greater than max_model_len=4096" in str(status.error)
    with pytest.raises(EngineError) as refused:
        [piece async for piece in manager.stream(RequestMetadata(prompt="x", max_tokens=100_000))]
    assert refused.value.status == 400
    with pytest.raises(InvalidRequest):
        await manager.submit_request(RequestMetadata(prompt="x", messages=[]))


async def test_what_the_servers_tell_of_themselves(manager: ControlPlaneManager) -> None:
    for instance in manager.get_instances():
        assert (instance.model_name, instance.health_status) == (MODEL, "healthy")
        stats = instance.engine
        assert (stats.version, stats.max_model_len_tokens, stats.simulated) == ("0.32.0", 4096, False)
        assert (stats.kv_block_size_tokens, stats.prefix_caching) == (128, True)
        assert stats.kv_block_count
        assert instance.supported_request_types == {"chat", "completion"}


async def test_metrics_count_tokens_and_times(manager: ControlPlaneManager) -> None:
    streams = [manager.stream(RequestMetadata(prompt=f"Tale {i}", max_tokens=20, **GREEDY)) for i in range(4)]  # type: ignore[arg-type]

    async def read(stream: object) -> str:
        return "".join([piece async for piece in stream])  # type: ignore[attr-defined]

    texts = await asyncio.gather(*map(read, streams))
    assert all(texts)
    metrics = manager.get_metrics()
    assert (metrics.total_requests, metrics.completed_requests, metrics.active_requests) == (4, 4, 0)
    assert 0 < metrics.avg_ttft_ms < metrics.avg_latency_ms
    assert metrics.tokens_per_second > 0
    assert sum(instance.active_requests for instance in manager.get_instances()) == 0


async def test_the_executor_alone(server: VllmServer) -> None:
    executor = ExecutionCoordinator()
    instance = instance_of(server, model_name=MODEL)
    executor.register_instance(instance)
    await executor.initialize()
    try:
        assert await executor.health_check(instance) is True
        info = await executor.get_instance_info(instance)
        assert (info["reachable"], info["models"]) == (True, [MODEL])
        request = RequestMetadata(request_id="direct", prompt="Once", max_tokens=5, **GREEDY)  # type: ignore[arg-type]
        answer = await executor.execute_request(request, instance, SchedulingDecision(server.label, "direct"))
        assert answer["usage"]["completion_tokens"] == 5
    finally:
        await executor.cleanup()
